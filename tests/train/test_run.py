import json
import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from r1jax.config import Config
from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.train import checkpoint
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.run import describe, open_run, restore_or_init
from r1jax.train.watch import Watch


@pytest.fixture
def workdir(stopped, tmp_path):
    """A copy of a run with checkpoints of steps 12 and 15."""
    return shutil.copytree(stopped, tmp_path / "run")


def restore(experiment, workdir, **changes):
    config = replace(experiment.config, workdir=str(workdir), **changes)
    with open_run(config) as run:
        e = experiment
        return restore_or_init(config, run, e.model, e.task, e.mesh, changes.get("source", e.source), e.batch)


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_fresh_run(tiny, tmp_path):
    state, said = restore(tiny, tmp_path / "a" / "b")
    assert said == [] and int(state.step) == 0
    assert same(state.params, tiny.fresh.params)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["name"] == "tiny"


def test_goes_on_from_the_newest(tiny, workdir):
    state, said = restore(tiny, workdir)
    assert said == [f"goes on from {workdir / 'checkpoints' / '00000015'}"]
    assert int(state.step) == 15


def test_each_file_that_is_summed_up_at_a_start_is_progress(tiny, workdir, monkeypatch):
    files = sum(len(json.loads(path.read_text())) for path in workdir.glob("checkpoints/*/manifest.json"))
    newest = len(json.loads((workdir / "checkpoints/00000015/manifest.json").read_text()))
    order, summed, beat = [], checkpoint.sha256, Watch.beat
    monkeypatch.setattr(checkpoint, "sha256", lambda path: order.append("file") or summed(path))
    monkeypatch.setattr(Watch, "beat", lambda watch: order.append("beat") or beat(watch))
    restore(tiny, workdir)
    assert order.count("file") == files + newest > 20
    assert all(after == "beat" for before, after in pairwise(order) if before == "file")


def test_another_process_is_waited_for_while_it_sums_up_and_not_while_all_read(tiny, workdir, monkeypatch):
    """What all do together is watched in each of them: storage that hangs would else hang the run for good."""
    seen, summed, read = [], Checkpoint.verify, ocp.StandardCheckpointer.restore

    @contextmanager
    def waits(watch, whether):
        seen.append("waits")
        yield
        seen.append("is watched")

    monkeypatch.setattr(Watch, "left_to_another", waits)
    monkeypatch.setattr(Checkpoint, "verify", lambda *a, **b: seen.append("sums") or summed(*a, **b))
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", lambda *a, **b: seen.append("reads") or read(*a, **b))
    restore(tiny, workdir)
    assert seen == ["waits", *["sums"] * (len(seen) - 3), "is watched", "reads"] and len(seen) > 4


def test_finished_state_is_read_back(tiny, undisturbed, tmp_path):
    state, _ = restore(tiny, shutil.copytree(undisturbed[0], tmp_path / "run"))
    assert same(state, undisturbed[1])


def test_checkpoint_of_another_model(tiny, workdir):
    inside = tiny.model.clone(heads=tiny.model.heads[:-1])
    config = replace(tiny.config, workdir=str(workdir))
    with open_run(config) as run, pytest.raises(UserError, match="00000015 was written by r1jax .* other arrays"):
        restore_or_init(config, run, inside, tiny.task, tiny.mesh, tiny.source, tiny.batch)


def test_damaged_checkpoint_is_set_aside(tiny, workdir):
    meta = workdir / "checkpoints" / "00000015" / "meta.json"
    meta.write_text(meta.read_text()[:-3])
    before = content(meta.parent)
    state, (skipped, goes_on) = restore(tiny, workdir)
    assert int(state.step) == 12
    assert "00000015 is damaged: meta.json" in skipped and skipped.endswith("damaged-00000015")
    assert goes_on.endswith("00000012")
    assert content(workdir / "checkpoints" / "damaged-00000015") == before


def test_all_damaged(tiny, workdir):
    for path in workdir.glob("checkpoints/*/manifest.json"):
        path.unlink()
    before = content(workdir)
    with pytest.raises(UserError, match="00000015.*missing.*none of the 2 .*is sound: delete them"):
        restore(tiny, workdir)
    assert content(workdir) == before


def test_other_config(tiny, workdir):
    before = content(workdir)
    with pytest.raises(UserError, match="seed 0, but this command says 5"):
        restore(tiny, workdir, seed=5)
    with pytest.raises(UserError, match="train.learning_rate 0.003, but this command says 0.5"):
        restore(tiny, workdir, train=replace(tiny.config.train, learning_rate=0.5))
    assert content(workdir) == before
    restore(tiny, workdir, platform="cpu", train=replace(tiny.config.train, log_every=7))


def test_other_data(tiny, workdir):
    class Other(Source):
        name, fingerprint = "other cases", "0" * 64

    before = content(workdir)
    config = replace(tiny.config, workdir=str(workdir))
    with open_run(config) as run, pytest.raises(UserError, match="was trained on 'synthetic.*now 'other cases'"):
        restore_or_init(config, run, tiny.model, tiny.task, tiny.mesh, Other(), tiny.batch)
    assert content(workdir) == before


def test_a_run_of_before_there_were_orders_does_not_go_on(tiny, workdir, monkeypatch):
    whole = Checkpoint.meta
    late = ("order", "preprocess")
    monkeypatch.setattr(Checkpoint, "meta", lambda self: {k: v for k, v in whole(self).items() if k not in late})
    with pytest.raises(UserError, match="version 0 of the order of cases, this is 1"):
        restore(tiny, workdir)


def test_one_process_a_folder(tmp_path):
    config = Config(workdir=str(tmp_path))
    with open_run(config), pytest.raises(UserError, match="another process is training in"), open_run(config):
        pass
    with open_run(config):  # it is free again
        pass


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), open_run(Config(workdir=str(tmp_path / "file" / "run"))):
        pass


def test_drafts_of_killed_writers_go(tmp_path):
    draft = tmp_path / "checkpoints" / ".draft-00000003" / "state"
    draft.mkdir(parents=True)
    with open_run(Config(workdir=str(tmp_path))):
        assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_second_leaves(tmp_path, number):
    before = signal.getsignal(number)
    with open_run(Config(workdir=str(tmp_path))) as run:
        os.kill(os.getpid(), number)
        assert run.stop == [number]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_run_that_a_signal_ended_before_its_first_checkpoint_has_the_exit_code_of_the_signal(tmp_path, monkeypatch):
    """As it is amid refused steps, which are not saved."""
    monkeypatch.setattr(train, "train", lambda config, run, *_: run.stop.append(signal.SIGTERM))
    file = Path(__file__).with_name("tiny.py")
    assert train.main(["--config", str(file), "--workdir", str(tmp_path / "run")]) == 128 + signal.SIGTERM


def test_description_of_a_run(tiny):
    made = describe(tiny.source, tiny.task.pipeline)
    assert made["data"] == {"name": tiny.source.name, "fingerprint": tiny.source.fingerprint}
    assert made["versions"]["jax"] == jax.__version__ and made["git"] and json.dumps(made)
