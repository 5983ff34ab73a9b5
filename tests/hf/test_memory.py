"""Loading takes little host memory beyond the arrays: the benchmark, on a small checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_host_never_holds_the_model_twice(tmp_path):
    script, output = ROOT / "benchmarks" / "hf_loading.py", tmp_path / "told.json"
    command = [sys.executable, str(script), "--size", "0.2", "--output", str(output), "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())["result"]
    assert result["array_bytes"] > 200e6 and result["files"] > 3
    assert result["beyond_arrays_bytes"] < result["largest_stacked_bytes"] + 40e6
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]
