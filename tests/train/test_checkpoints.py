import asyncio
import errno
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.config import Config, TrainConfig
from r1jax.errors import UserError
from r1jax.train import checkpoints
from r1jax.train.checkpoint import MANIFEST, Checkpoint, abstract_like
from r1jax.train.checkpoints import CheckpointFolder, check_same_run, find_checkpoint

STATE = {
    "step": np.int32(7),
    "weights": np.arange(3000, dtype=np.float32).reshape(30, 100),
    "key": np.arange(4, dtype=np.uint32),
}


def save(folder, step, score=None):
    state = jax.tree.map(lambda x: jnp.asarray(x + step).astype(x.dtype), STATE)
    return folder.save(step, state, Config(), {"step": step, "validation": score and {"score": score}})


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder with one sound checkpoint; whoever changes it puts it back."""
    folder = CheckpointFolder(tmp_path_factory.mktemp("written"))
    save(folder, 3, 0.5)
    return folder


def files(checkpoint):
    return sorted(p for p in checkpoint.path.rglob("*") if p.is_file())


def steps(folder):
    return [c.step for c in folder.all()]


def test_round_trip(written):
    (checkpoint,) = written.all()
    abstract = jax.tree.map(lambda x: jnp.asarray(x), STATE)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    state = checkpoint.restore(abstract_like(abstract, where))
    for name, x in STATE.items():
        np.testing.assert_array_equal(state[name], x + np.asarray(3, x.dtype))
        assert state[name].dtype == x.dtype
    assert checkpoint.config() == Config()
    assert checkpoint.meta()["validation"] == {"score": 0.5}
    assert set(json.loads((checkpoint.path / MANIFEST).read_text())) == {
        str(p.relative_to(checkpoint.path)) for p in files(checkpoint) if p.name != MANIFEST
    }


def test_a_relative_folder_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(CheckpointFolder(Path("runs/medical/checkpoints")), 3)
    checkpoint = find_checkpoint(Path("runs/medical"))
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), STATE)
    restored = checkpoint.restore(abstract_like(STATE, where))
    np.testing.assert_array_equal(restored["weights"], STATE["weights"] + 3)


def test_everything_is_on_the_disk_before_it_is_published(folder, monkeypatch):
    flushed, at_rename = set(), set()
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(source, target):
        if Path(target) == folder.path / "00000003":
            at_rename.update(flushed)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    checkpoint = save(folder, 3)
    written = [checkpoint.path, *checkpoint.path.rglob("*")]
    assert {p.stat().st_ino for p in written} <= at_rename
    assert folder.path.stat().st_ino in flushed


def damage(path, kind, rng):
    """Flips a bit, cuts, empties, lengthens or deletes; returns whether the file is not what it was."""
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
        return True
    if kind == "flip":
        if not data:
            return False
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == "cut":
        changed = data[: rng.integers(len(data))] if data else data
    else:
        changed = data + b"\0"
    path.write_bytes(changed)
    return bytes(changed) != data


def test_every_damage_is_found(written):
    (checkpoint,) = written.all()
    rng, found, kinds = np.random.default_rng(0), 0, ("flip", "flip", "cut", "lengthen", "delete")
    every = files(checkpoint)
    assert len(every) >= 8
    for i in range(250):
        path = every[i % len(every)]
        before = path.read_bytes()
        if damage(path, kinds[rng.integers(len(kinds))], rng):
            with pytest.raises(UserError, match=str(checkpoint.path)):
                checkpoint.verify()
            found += 1
        path.write_bytes(before)
    checkpoint.verify()
    assert found >= 200


def test_damaged_checkpoint_is_not_restored(written, tmp_path):
    copy = shutil.copytree(written.all()[0].path, tmp_path / "00000003")
    (copy / "state" / "_METADATA").write_text("{}")
    with pytest.raises(UserError, match="_METADATA is not what was written"):
        Checkpoint(copy).restore(STATE)


def test_best_and_newest_are_kept(folder):
    kept = []
    for step, score in ((2, 0.6), (4, None), (6, 0.8), (8, None), (10, 0.7), (12, None), (14, 0.8)):
        save(folder, step, score)
        kept.append(steps(folder))
    assert kept == [[2], [2, 4], [6], [6, 8], [6, 10], [6, 12], [14]]
    assert folder.best().step == 14  # of equals the newest


@given(st.lists(st.sampled_from([None, 0.1, 0.5, 0.9]), min_size=1, max_size=12), st.integers(1, 5))
def test_the_last_ones_and_the_best_are_kept(scores, keep):
    def without_arrays(final, state, config, meta, tokenizer):
        final.mkdir(parents=True)
        (final / "meta.json").write_text(json.dumps(meta))

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "write_sealed", without_arrays)
        folder = CheckpointFolder(Path(place), keep)
        for step, score in enumerate(scores, 1):
            save(folder, step, score)
            scored = [(known, at) for at, known in enumerate(scores[:step], 1) if known is not None]
            best = {max(scored)[1]} if scored else set()
            assert set(steps(folder)) == {*range(max(1, step - keep + 1), step + 1), *best}
            assert folder.kept() == folder.all()


def test_without_scores_the_newest_is_the_best(folder):
    assert folder.best() is None
    for step in (1, 2, 3):
        save(folder, step)
    assert steps(folder) == [3] and folder.best().step == 3


def test_kill_amid_removal_leaves_no_half_checkpoint(folder, monkeypatch):
    save(folder, 1)

    def killed(path, **_):
        next(p for p in path.rglob("meta.json")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path, **k: killed(path) if path.is_dir() else None)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 2)
    monkeypatch.undo()
    assert steps(folder) == [2]
    folder.clear_drafts()
    assert os.listdir(folder.path) == ["00000002"]
    save(folder, 3)
    assert steps(folder) == [3]


def test_existing_step_is_left_as_it_is(folder):
    digest = save(folder, 5, 0.5).digest()
    assert save(folder, 5, 0.9).digest() == digest


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tensorstore_fails(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 85007 bytes: No space left on device\nmore")


def raises(error, after=None):
    def fail(*args, **kwargs):
        if after is not None:
            after(*args, **kwargs)
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Event loop is closed\nmore"),
        asyncio.CancelledError(),
        BaseExceptionGroup("2 writes failed", [asyncio.CancelledError(), OSError(28, "No space left on device")]),
    ],
)
@pytest.mark.parametrize("method", ["save", "close"])
def test_whatever_orbax_raises_is_one_sentence(folder, monkeypatch, method, error):
    save(folder, 1)
    close = ocp.Checkpointer.close if method == "close" else None  # it waits for the writing threads
    monkeypatch.setattr(ocp.Checkpointer, method, raises(error, after=close))
    with pytest.raises(UserError, match="00000002 could not be written") as caught:
        save(folder, 2)
    assert "\n" not in str(caught.value)
    assert os.listdir(folder.path) == ["00000001"]


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("os.rename", no_room),
        ("pathlib.Path.mkdir", no_room),
        ("pathlib.Path.write_text", no_room),
        ("orbax.checkpoint.Checkpointer.save", tensorstore_fails),
        ("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100)),
    ],
)
def test_full_disk(folder, monkeypatch, target, failure):
    kept = save(folder, 1)
    digest = kept.digest()
    with monkeypatch.context() as patch:
        patch.setattr(target, failure)
        with pytest.raises(UserError, match="00000002 could not be written .*No space left") as caught:
            save(folder, 2)
    assert "\n" not in str(caught.value)
    assert os.listdir(folder.path) == ["00000001"] and kept.digest() == digest
    kept.verify()
    save(folder, 2).verify()


def test_leftovers_are_no_checkpoints(folder):
    save(folder, 1)
    for name in (".draft-00000004", "damaged-00000003"):
        (folder.path / name / "state").mkdir(parents=True)
    assert steps(folder) == [1]
    folder.clear_drafts()
    assert sorted(os.listdir(folder.path)) == ["00000001", "damaged-00000003"]


def test_damaged_one_makes_way(folder):
    bad = save(folder, 1)
    (bad.path / "meta.json").unlink()
    for _ in range(2):  # also where one was set aside before
        assert folder.set_aside(folder.all()[0]).name == "damaged-00000001"
        assert steps(folder) == []
        save(folder, 1).verify()


def test_find_checkpoint(folder, tmp_path):
    for step, score in ((1, 0.9), (2, 0.5)):
        save(folder, step, score)
    assert [find_checkpoint(p).step for p in (tmp_path, folder.path, folder.path / "00000002")] == [1, 1, 2]
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")
    (folder.path / "00000002" / MANIFEST).unlink()
    with pytest.raises(UserError, match="manifest.json is missing"):
        find_checkpoint(folder.path / "00000002")


def test_other_config_is_refused(tmp_path):
    stored = Config()
    check_same_run(stored, replace(stored, workdir="elsewhere", platform="cpu"), tmp_path)
    with pytest.raises(UserError, match="train.learning_rate 0.002, but this command says 0.01:") as caught:
        check_same_run(stored, replace(stored, train=TrainConfig(learning_rate=0.01)), tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match=r"seed 0, but this command says 1 \(and 1 more fields\)"):
        check_same_run(stored, replace(stored, seed=1, train=TrainConfig(steps=999)), tmp_path)
    with pytest.raises(UserError, match="steps 800, and the learning rate falls over just as many steps, but .* 999"):
        check_same_run(stored, replace(stored, train=TrainConfig(steps=999)), tmp_path)
