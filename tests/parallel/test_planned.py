"""What train.py says of meshes whose devices are not there."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COMMAND = (sys.executable, "train.py", "--config", "configs/language.py:smoke", "--mesh.data", "1")


def run(*flags):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run([*COMMAND, *flags], cwd=ROOT, env=kept, capture_output=True, text=True)


def test_shows_where_weights_lie():
    ran = run("--mesh.show", "--mesh.fsdp", "64", "--mesh.tensor", "2", "--model.decoder.hidden_size", "1024")
    assert ran.returncode == 0, ran.stderr
    rows = [re.split(r"\s{2,}", line.strip()) for line in ran.stdout.splitlines()]
    assert ["decoder/lm_head/weight", "264 x 1024", "tensor, fsdp", "132 x 16", "8,448"] in rows
    assert ["128 devices: fsdp 64, tensor 2"] in rows


def test_what_cannot_be_divided_is_refused_before_anything_is_compiled():
    ran = run("--mesh.show", "--mesh.expert", "3")
    assert ran.returncode == 2
    told = "error: mesh.expert is 3, but model.decoder.n_routed_experts is 8: it must be a multiple of mesh.expert"
    assert ran.stderr.splitlines()[-1] == told


@pytest.mark.slow
def test_plans_for_devices_that_are_not_there():
    ran = run("--dry-run", "--mesh.fsdp", "4", "--mesh.expert", "4", "--train.batch_size", "16")
    assert ran.returncode == 0, ran.stderr
    rows = dict(
        re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in ran.stdout.splitlines() if "  " in line.strip()
    )
    assert rows["mesh"] == "fsdp 4, expert 4"
    assert "of an H100: the step fits" in rows["memory of a device"]
    assert float(rows["all-to-all, expert"].split()[0]) > 0
    assert rows["H100s need at least"].endswith("ms if nothing")
