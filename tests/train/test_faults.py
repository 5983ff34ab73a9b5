"""What may befall checkpoints: killed writers and damaged files, many times over."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from r1jax.config import Config
from r1jax.errors import UserError
from r1jax.train.checkpoint import MANIFEST, abstract_like
from r1jax.train.checkpoints import CheckpointFolder
from tests.train.kill_saves import state

ROOT = Path(__file__).resolve().parents[2]


def restored(checkpoint):
    like = state(0)
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), like)
    return jax.device_get(checkpoint.restore(abstract_like(like, where)))


def assert_is(checkpoint, step):
    found = restored(checkpoint)
    assert found["step"] == step
    np.testing.assert_array_equal(found["weights"], state(step)["weights"])


@pytest.mark.slow
def test_fifty_kills_amid_saves(tmp_path):
    folder, rng = CheckpointFolder(tmp_path / "checkpoints"), np.random.default_rng(0)
    call = [sys.executable, "-m", "tests.train.kill_saves", str(folder.path)]
    drafts, last = 0, 0
    with subprocess.Popen(call, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def line():
            text = server.stdout.readline()
            assert text, "the saving process is gone"
            return text.split()

        for kills in range(50):
            hold = kills % 2  # every other kill comes at a random time, and may find no draft
            server.stdin.write("hold\n" if hold else "go\n")
            server.stdin.flush()
            seen = [line(), line()]  # "child", and the first "saved": it is in full swing
            child = next(int(words[1]) for words in seen if words[0] == "child")
            while hold and seen[-1] != ["holding"]:
                seen.append(line())
            if not hold:
                time.sleep(rng.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
            while (words := line()) != ["dead"]:
                seen.append(words)
            promised = max(int(words[1]) for words in seen if words[0] == "saved")
            drafts += any(folder.path.glob(".draft-*/state/*"))
            folder.clear_drafts()
            assert not list(folder.path.glob(".*"))
            sound, damaged = folder.verify()
            assert damaged == [] and sound[0].step in (promised, promised + 1) and promised > last
            assert_is(sound[0], sound[0].step)
            last = promised
        server.stdin.close()
    assert drafts >= 25, "the kills have not met the writing"


def swap(a, b):
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    return one != other


def damage(checkpoint, kind, rng):
    """Damages one file, or swaps two; returns whether anything changed."""
    files = sorted(p for p in checkpoint.path.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return True
    if kind == "swap":
        return swap(path, files[rng.integers(len(files))])
    if not data:
        return False
    at = int(rng.integers(len(data)))
    if kind == "cut":
        data = data[:at]
    else:
        data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return True


def test_of_200_damaged_checkpoints_none_is_taken(tmp_path):
    folder, rng = CheckpointFolder(tmp_path), np.random.default_rng(0)
    for step, score in ((1, 0.5), (2, None)):
        folder.save(step, state(step), Config(), {"step": step, "validation": score and {"score": score}})
    newest = folder.all()[-1]
    kept = shutil.copytree(newest.path, tmp_path / "kept")
    caught = 0
    while caught < 200:
        if damage(newest, ("flip", "cut", "delete", "swap")[rng.integers(4)], rng):
            sound, damaged = folder.verify()
            assert [c.step for c in sound] == [1] and [c.step for c, _ in damaged] == [2]
            caught += 1
            if caught % 20 == 0:
                assert_is(sound[0], 1)
        shutil.rmtree(newest.path)
        shutil.copytree(kept, newest.path)
    sound, damaged = folder.verify()
    assert damaged == [] and [c.step for c in sound] == [2, 1] and (newest.path / MANIFEST).is_file()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=["permission", "read-only"])
def test_storage_that_cannot_be_written_any_more_keeps_what_is_there(tmp_path, monkeypatch, number):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, state(1), Config(), {"step": 1, "validation": None})

    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)  # root may write anywhere, so that taking the rights away would not do
        with pytest.raises(UserError, match=rf"00000002 could not be written .{os.strerror(number)}.; earlier"):
            folder.save(2, state(2), Config(), {"step": 2, "validation": None})
    assert os.listdir(tmp_path) == ["00000001"]
    assert_is(folder.all()[0], 1)
