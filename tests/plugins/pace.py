"""A plug-in of tests: reads as slowly as a file says, so that a test can disturb a run in its middle."""

import os
import time
from pathlib import Path

from r1jax.data import bounded
from r1jax.data.plugins import Preprocessor

if "TEST_TIMEOUT_S" in os.environ:
    bounded.TIMEOUT_S = float(os.environ["TEST_TIMEOUT_S"])  # a test need not wait for the half minute of users


class Pace(Preprocessor):
    """Waits as many seconds a case as the file of `TEST_PACE` says."""

    def process(self, case):
        time.sleep(float(Path(os.environ["TEST_PACE"]).read_text("utf-8")))
        return case
