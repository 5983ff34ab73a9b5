"""Settings are compared on blocks of the training part of luna16_fpr_2d, beside networks trained on the same blocks."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import children as children_module
from benchmarks import common, luna16_folds
from benchmarks.luna16_peers import FIGURES, figures
from r1jax.data.folder import FolderCases
from r1jax.errors import UserError


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
        cases = [part.read_batch(np.arange(len(part))) for part in parts]
        for part in cases:
            assert (part["target.nodule_present"] == (part["image"][:, 0, 0] % 3 == 0)).all()  # labels go along
        seen = [sorted(part["image"][:, 0, 0].tolist()) for part in cases]
        assert sorted(seen[0] + seen[1]) == list(range(40))
        assert seen[1] == list(range(10 * block, 10 * block + 10))
        held += seen[1]
    assert held == list(range(40))


def arguments(folder, tmp_path, **changes):
    given = {"data": str(folder), "workdir": str(tmp_path / "work"), "epochs": 2, "overrides": []} | changes
    return argparse.Namespace(**given)


def test_a_set_of_overrides_is_trained_through_train_py_and_judged_on_its_block(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(luna16_folds, "BATCH", 8)
    monkeypatch.setattr(sys, "argv", ["luna16_folds.py", "--data", str(folder)])
    labels, scores, trained = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.5, 0.9]), []

    def train_run(words, workdir):
        trained.append((words, workdir))
        return common.Trained("its checkpoint", 7.0, 1.0)

    def predict(checkpoint, split, batch_size, views):
        assert (checkpoint, split, views) == ("its checkpoint", "val", 8)
        return {"nodule_present": scores}, {"nodule_present": labels}, None

    monkeypatch.setattr(common, "train_run", train_run)
    monkeypatch.setattr(common, "predict", predict)
    args = arguments(folder, tmp_path, overrides=["--seed=3"])
    told = luna16_folds.train_variant("a.b=1 c=2", 1, args)
    assert told["run"] == {"variant": "a.b=1 c=2", "block": 1, "seconds": 7.0, "figures": figures(labels, scores)}
    assert "jax" in told["environment"]["versions"] and told["environment"]["command"].endswith("--data set")
    ((words, workdir),) = trained
    assert words[-3:] == ["--a.b=1", "--c=2", "--seed=3"]
    assert words[words.index("--train.steps") + 1] == "6"  # 2 epochs of 30 cases
    data = Path(words[words.index("--data.path") + 1])
    assert data.is_dir() and data.parent == workdir.parent  # its own, and not in the folder that train_run empties


def test_a_network_is_trained_and_judged_on_the_same_block(folder, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(sys, "argv", ["luna16_folds.py", "--data", str(folder), "--variants", "cnn3"])
    told = luna16_folds.train_variant("cnn3", 2, arguments(folder, tmp_path, epochs=1))
    assert told["run"]["variant"] == "cnn3" and told["run"]["block"] == 2
    assert set(told["run"]["figures"]) == set(FIGURES) and told["run"]["seconds"] > 0
    environment = told["environment"]
    assert environment["command"] == "python benchmarks/luna16_folds.py --data set --variants cnn3"
    assert environment["versions"]["torch"] and environment["hardware"]


def row(variant, block, auc, precision):
    values = dict(zip(FIGURES, (auc, precision, 0.9, 0.5), strict=True))
    return {"variant": variant, "block": block, "seconds": 1.0, "figures": values}


def test_gains_are_differences_over_the_blocks_that_both_have():
    runs = [row("a", 0, 0.8, 0.5), row("a", 1, 0.9, 0.6), row("a", 2, 0.7, 0.7)]
    runs += [row("b", 0, 0.82, 0.5), row("b", 1, 0.96, 0.6), row("b", 3, 0.1, 0.1), row("c", 1, 0.8, 0.8)]
    assert luna16_folds.table(runs).splitlines()[2:] == [
        "| a | 3 | 0.8000 | 0.6000 | 0.9000 |  |  |",
        "| b | 3 | 0.6267 | 0.4000 | 0.9000 | +0.0400 ± 0.0200 | +0.0000 ± 0.0000 |",
        "| c | 1 | 0.8000 | 0.8000 | 0.9000 |  |  |",  # of one block, no error can be told
    ]


def test_a_folder_without_the_data_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    words = ["--data", str(tmp_path / "none"), "--output", str(tmp_path / "x.json"), "--variants", "a=1"]
    monkeypatch.setattr(sys, "argv", ["luna16_folds.py", *words])
    with pytest.raises(UserError, match="none, but no .npz lies there"):
        luna16_folds.main()


def test_what_variants_tell_is_joined_in_their_order_and_one_that_fails_is_named(folder, tmp_path, monkeypatch, capsys):
    def children(commands, *, jobs, timeout, devices):
        assert (jobs, devices) == (3, 4) and len(commands) == 4
        for name, words in reversed(commands.items()):
            variant, block = words[2:4]
            assert words[1] == "--child" and words[4:] == sys.argv[1:]
            versions = {"torch": "2"} if variant == "densenet121" else {"jax": "1"}
            told = {"run": row(variant, int(block), 0.9, 0.8), "environment": {"command": "it", "versions": versions}}
            yield name, {"error": "exit code 1"} if name == "x=1 y=2, block 3" else told

    output = tmp_path / "new" / "folds.json"
    words = ["luna16_folds.py", "--data", str(folder), "--output", str(output), "--jobs", "3", "--devices", "4"]
    monkeypatch.setattr(children_module, "run_at_once", children)
    monkeypatch.setattr(sys, "argv", [*words, "--blocks", "1", "3", "--variants", "x=1 y=2", "densenet121"])
    with pytest.raises(SystemExit, match=r"^without x=1 y=2, block 3 \(above\)$"):
        luna16_folds.main()
    told = json.loads(output.read_text())
    assert [(run["variant"], run["block"]) for run in told["runs"]] == [
        ("x=1 y=2", 1),
        ("densenet121", 1),
        ("densenet121", 3),
    ]
    assert told["command"] == "it" and told["versions"] == {"jax": "1", "torch": "2"} and told["seconds"] > 0
    printed = capsys.readouterr().out
    assert "x=1 y=2, block 3: exit code 1" in printed and "| densenet121 | 2 | " in printed


def test_a_child_tells_its_row_and_nothing_else(tmp_path, monkeypatch, capsys):
    def train_variant(name, block, args):
        print("a long run's words")
        return {"run": [name, block, sys.argv, "child" in vars(args)]}

    words = ["--data", "set", "--output", str(tmp_path / "folds.json"), "--variants", "x=1 y=2"]
    monkeypatch.setattr(luna16_folds, "train_variant", train_variant)
    monkeypatch.setattr(sys, "argv", ["luna16_folds.py", "--child", "x=1 y=2", "3", *words])
    luna16_folds.main()
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": ["x=1 y=2", 3, ["luna16_folds.py", *words], False]}
    assert "a long run's words" in err
