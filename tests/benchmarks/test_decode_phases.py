"""Tests of what `benchmarks/decode_phases.py` does without a GPU."""

import subprocess
import sys

import numpy as np

from benchmarks.decode_phases import PHASES, markdown, phases_of


def test_phases_are_of_the_middle_layer_and_layers_of_all_also_where_a_clock_begins_anew() -> None:
    layers, blocks = 4, 3
    each = np.tile(np.arange(1, 8), layers) * np.repeat([100, 100, 2000, 100], len(PHASES))
    since = np.cumsum(np.concatenate([[0], each]))[:, None]
    clocks = (since + np.array([0, 5, 2**32 - 30000])).astype(np.uint32)
    found = phases_of(np.concatenate([np.full(9, 7, np.uint32), clocks.reshape(-1)]), layers, blocks, 2000.0)
    assert found["phases_us"] == dict(zip(PHASES, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), strict=True))
    assert found["layers_us"] == [1.4, 1.4, 28.0, 1.4]


def test_the_table_has_a_row_for_each_run_with_its_macros_phases_and_layers() -> None:
    row = {"name": "bf16", "macros": {"SLOTS": 8}, "us": 786.4, "iqr_us": 4.0, "layers_us": [9.0, 42.0, 43.0]}
    row["phases_us"] = dict(zip(PHASES, range(1, 8), strict=True))
    _, _, line = markdown({"results": [row]}).splitlines()
    assert line == "| bf16 | SLOTS 8 | 786 ± 2 | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 7.0 | 42.0 |"


def test_without_a_hopper_gpu_it_says_so_in_a_sentence(tmp_path) -> None:
    command = [sys.executable, "benchmarks/decode_phases.py", "--output", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().endswith("the kernel is for a Hopper GPU, which JAX does not find here.")
    assert "Traceback" not in done.stderr
