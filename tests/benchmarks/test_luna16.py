"""The benchmarks of luna16_fpr_2d: blocks of scans never touch the validation part, gains are paired, seeds join."""

import json
import sys

import numpy as np
import pytest

from benchmarks import luna16, luna16_folds
from benchmarks.luna16_peers import FIGURES
from r1jax.data.folder import FolderCases


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    rows = np.random.default_rng(0).permutation(50)
    np.savez(
        tmp_path / "set" / "set.npz",
        image=np.repeat(rows.astype(np.uint8), 16).reshape(-1, 4, 4),
        label=(rows % 3 == 0).astype(np.uint8),
        candidate_row=(1000 + rows).astype(np.int32),
        split=(rows >= 40).astype(np.int8),  # the last rows are the validation part
    )
    return tmp_path / "set"


def test_blocks_are_runs_of_scans_of_the_training_part(folder, tmp_path):
    held = []
    for block in range(luna16_folds.BLOCKS):
        cut = luna16_folds.cut(folder, block, tmp_path / "cut")
        parts = [FolderCases.open(cut, split) for split in ("train", "val")]
        seen = [sorted(part.read_batch(np.arange(len(part)))["image"][:, 0, 0]) for part in parts]
        assert sorted(seen[0] + seen[1]) == list(range(40))
        assert seen[1] == list(range(10 * block, 10 * block + 10))
        held += seen[1]
    assert held == list(range(40))


def run(variant, block, scores, labels):
    told = {"variant": variant, "block": block, "seconds": 1.0, "images_per_second": 2.0}
    told |= {"labels": labels.tolist(), "scores": scores.tolist()}
    return told | {"figures": luna16_folds.judge(labels, scores)}


def test_gains_are_differences_over_the_blocks_that_both_have(monkeypatch):
    monkeypatch.setattr(luna16_folds, "RESAMPLES", 20)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    good, bad = (np.clip(0.5 + (labels - 0.5) * 0.6 + s * rng.standard_normal(80), 0.01, 0.99) for s in (0.1, 0.6))
    names = list(luna16_folds.VARIANTS)
    runs = [run(names[0], 0, bad, labels), run(names[1], 0, good, labels), run(names[1], 1, bad, labels)]
    runs += [run(names[2], 0, bad, labels), run(names[3], 2, good, labels)]
    found = luna16_folds.gains(runs)
    assert set(found) == {names[1], names[2]}
    ours, theirs = (luna16_folds.judge(labels, scores) for scores in (good, bad))
    for figure, gain in found[names[1]].items():
        assert gain["value"] == pytest.approx(ours[figure] - theirs[figure]) and gain["error"] > 0
    assert all(gain == {"value": 0, "error": 0} for gain in found[names[2]].values())
    expected = -np.mean(labels * np.log(good) + (1 - labels) * np.log(1 - good))
    assert ours["log_loss"] == pytest.approx(expected)
    assert f"| {names[1]} | 2 | " in luna16_folds.table({"runs": runs, "gains": found})


def test_seeds_that_are_there_are_kept_and_the_rest_joined_in_order(tmp_path, monkeypatch, capsys):
    def seed(number):
        figures = dict.fromkeys(FIGURES, 0.9 + number / 100)
        return {"seed": number, "seconds": 1.0, "views": {"8": figures}}

    def children(commands, *, jobs, timeout):
        assert jobs == 2
        for name, words in reversed(commands.items()):
            assert words[1:3] == ["--child", name]
            failed = {"error": "exit code 1"}
            yield name, failed if name == "4" else {"run": seed(int(name)), "environment": environment}

    environment = {"arguments": {"overrides": ["--x=1"]}, "hardware": "one"}
    output = tmp_path / "luna16.json"
    output.write_text(json.dumps({"models": {"r1jax": {"runs": [seed(1)]}}}))
    monkeypatch.setattr(luna16, "run_at_once", children)
    words = ["luna16.py", "--data", "set", "--output", str(output), "--seeds", "5", "--jobs", "2", "--resume"]
    monkeypatch.setattr(sys, "argv", [*words, "--", "--x=1"])
    luna16.main()
    told = json.loads(output.read_text())["models"]["r1jax"]
    assert [run["seed"] for run in told["runs"]] == [0, 1, 2, 3] and told["settings"] == {"overrides": ["--x=1"]}
    assert told["summary"]["8"]["auc"]["mean"] == pytest.approx(0.915)
    assert "seed 4: exit code 1" in capsys.readouterr().out
