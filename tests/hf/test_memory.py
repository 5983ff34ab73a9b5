"""Loading and exporting take little host memory, and every byte is read once: the benchmark, on a small checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_host_never_holds_the_model_twice(tmp_path):
    script, output = ROOT / "benchmarks" / "hf_loading.py", tmp_path / "told.json"
    command = [sys.executable, str(script), "--size", "0.4", "--repeats", "1", "--jobs", "load", "import", "export"]
    command += ["--output", str(output), "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())["result"]
    load, export = result["jobs"]["load"], result["jobs"]["export"]
    assert load["array_bytes"] > 400e6 and result["files"] > 3
    assert load["beyond_arrays_bytes"] < 60e6
    assert 1 <= load["read_per_file_bytes"] < 1.1
    assert export["peak_bytes"] < 0.75 * result["checkpoint_bytes"]  # 100 to 150 MB of it are programs
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]
