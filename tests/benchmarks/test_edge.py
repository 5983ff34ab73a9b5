"""The benchmark of edge artefacts: each way in a process that answers by lines, and a table of what they took."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.edge import JITTED, Running, Taken, Way, agreements, measure, model_of, row_of, table
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


def card_of(folder: Path, name: str) -> None:
    """An exported model of 1 MB that has agreed with its checkpoint."""
    rows = {"binary": ("malignancy", 2e-4), "vector": ("center_mm", 0.5)}
    findings = {name: {"kind": kind, "largest_difference": value} for kind, (name, value) in rows.items()}
    decisions = {"same": 9, "required": 9, "of": 9}
    folder.mkdir()
    card = {"file": name, "agreement": {"findings": findings, "decisions": decisions}}
    (folder / "card.json").write_text(json.dumps(card))
    (folder / name).write_bytes(bytes(10**6))


def test_the_table_has_a_row_for_each_way(tmp_path):
    card_of(tmp_path / "edge", "model.tflite")
    way = Way("litert", "python", tmp_path / "edge")
    agreement = json.loads((way.folder / "card.json").read_text())["agreement"]
    took = {"peak_bytes": 60 * 10**6, "runtime_bytes": 138 * 10**6}
    ways = {
        JITTED: row_of(Taken([2.5, 2.0], [1.0, 3.0, 2.0], took)),
        "edge": row_of(Taken([0.5, 0.6], [0.8, 1.0, 1.5], took)) | model_of(way, agreement),
    }
    lines = table({"ways": ways}).splitlines()
    assert lines[2] == f"| {JITTED} | 2.00 | 1.00 | 1.00 | 2.00 | 60 | - | 138 | - | - |"
    assert lines[3] == "| edge | 1.00 | 0.80 | 0.80 | 0.50 | 60 | 1.00 | 138 | 9 of 9 | 0.0002 |"


def test_starts_and_calls_take_turns(tmp_path, monkeypatch):
    told = []

    class Told:
        cold_start_s = 1.0

        def __init__(self, way, inputs, core):
            self.name = way.kind
            told.append(f"start {self.name}")

        def predict(self, times):
            told.append(f"{self.name} x {times}")
            return [1.0] * times

        def close(self):
            return {"peak_bytes": 1}

    monkeypatch.setattr("benchmarks.edge.Running", Told)
    asked = argparse.Namespace(starts=2, rounds=2, calls=3)
    taken = measure({name: Way(name, "python", tmp_path) for name in "ab"}, tmp_path, asked)
    assert told == [*["start a", "start b"] * 2, *["a x 3", "b x 3"] * 2]
    assert taken["b"] == Taken([1.0, 1.0], [1.0] * 6, {"peak_bytes": 1})


def test_codes_are_held_to_the_checkpoint_that_they_were_made_from(tmp_path, monkeypatch):
    """Its card says how far they agree with their own."""
    ways = {JITTED: Way("checkpoint", "python", tmp_path)}
    for name, kind in (("exported, IREE fp32", "iree"), ("codes of int8, IREE", "iree")):
        ways[name] = Way(kind, "python", tmp_path / name)
        card_of(ways[name].folder, "model.vmfb")
    asked = argparse.Namespace(checkpoint=tmp_path / "run", cases=7, converter="litert", compiler="compiler")
    opened = []
    monkeypatch.setattr("benchmarks.edge.find_checkpoint", lambda path: path)
    monkeypatch.setattr(
        "benchmarks.edge.open_checkpoint",
        lambda found, told: opened.append((found, told.cases)) or SimpleNamespace(exported="said"),
    )
    monkeypatch.setattr(
        "benchmarks.edge.compare", lambda run, said, limits: (run.args, run.keywords["converter"], said)
    )
    found = agreements(ways, asked)
    assert found["exported, IREE fp32"]["decisions"]["same"] == 9 and opened == [(tmp_path / "run", 7)]
    assert found["codes of int8, IREE"] == ((tmp_path / "codes of int8, IREE",), "compiler", "said")
    assert JITTED not in found


def test_the_child_needs_nothing_of_r1jax_to_start():
    words = [sys.executable, "-I", "-c", f"import runpy; runpy.run_path({str(ROOT / 'benchmarks/edge_child.py')!r})"]
    done = subprocess.run([*words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
