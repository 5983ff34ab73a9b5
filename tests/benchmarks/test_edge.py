"""The benchmark of edge artefacts: each way in a process that answers by lines, and a table of what they took."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.edge import Running, Way, _row, table
from benchmarks.edge_child import installed_bytes

ROOT = Path(__file__).resolve().parents[2]


def test_a_process_is_ready_answers_and_says_what_it_took(tmp_path, monkeypatch):
    """With a way that predicts nothing; the others need packages that are not here."""
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks import edge_child\n"
        "edge_child.litert = lambda folder, inputs: (lambda: None, ['numpy'])\n"
        "edge_child.main()\n"
    )
    monkeypatch.setattr("benchmarks.edge.CHILD", child)
    running = Running(Way("litert", sys.executable, tmp_path), tmp_path / "case.npz", max(os.sched_getaffinity(0)))
    assert len(running.predict(3)) == 3
    took = running.close()
    assert running.cold_start_s > 0 and took["peak_bytes"] > 2**20
    assert took["runtime_bytes"] == installed_bytes(["numpy"]) > 2**20


def test_the_table_has_a_row_for_each_way(tmp_path):
    rows = {"binary": ("malignancy", 2e-4), "vector": ("center_mm", 0.5)}
    findings = {name: {"kind": kind, "largest_difference": value} for kind, (name, value) in rows.items()}
    decisions = {"same": 9, "required": 9, "of": 9}
    card = {"file": "model.tflite", "agreement": {"findings": findings, "decisions": decisions}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "model.tflite").write_bytes(bytes(10**6))
    took = {"peak_bytes": 60 * 10**6, "runtime_bytes": 138 * 10**6}
    ways = {
        "jitted": _row([2.0, 1.0, 3.0, 2.0], Way("checkpoint", "python", tmp_path), took),
        "edge": _row([0.5, 1.0, 1.0, 1.5], Way("litert", "python", tmp_path), took),
    }
    lines = table({"ways": ways}).splitlines()
    assert lines[2] == "| jitted | 2.00 | 1.00 | 2.00 | 60 | - | 138 | - | - |"
    assert lines[3] == "| edge | 1.00 | 1.00 | 0.50 | 60 | 1.00 | 138 | 9 of 9 | 0.0002 |"


def test_the_child_needs_nothing_of_r1jax_to_start():
    words = [sys.executable, "-I", "-c", f"import runpy; runpy.run_path({str(ROOT / 'benchmarks/edge_child.py')!r})"]
    done = subprocess.run([*words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
