import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import Config
from r1jax.errors import UserError
from r1jax.telemetry import Telemetry
from r1jax.train import loop
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.loop import NORM, check_finite, served, slow_data
from r1jax.train.plan import device_need
from r1jax.train.run import open_run
from tests.train.experiment import CLOCK, Interrupted, make_experiment


def same(a, b):
    a, b = jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def rows(workdir):
    """Rows of metrics.jsonl without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def steps(workdir):
    return [c.step for c in CheckpointFolder(workdir / "checkpoints").all()]


def test_rows_and_checkpoints_of_a_run(undisturbed):
    workdir, state = undisturbed
    written = rows(workdir)
    assert [r["step"] for r in written if "loss" in r] == list(range(1, 25))
    assert [r["step"] for r in written if "loss" not in r] == [12, 24]
    assert all(k == "step" or k.startswith("validation.") for r in written if "loss" not in r for k in r)
    assert int(state.step) == 24 and set(steps(workdir)) <= {12, 24} and steps(workdir)[-1] == 24
    meta = CheckpointFolder(workdir / "checkpoints").all()[-1].meta()
    assert meta["step"] == 24 and meta["validation"]["cases"] == 16
    assert {"figures", "operating_points", "score"} <= set(meta["validation"])
    last = written[-1]
    assert meta["validation"]["figures"]["both"]["auc.malignancy"] == last["validation.both.auc.malignancy"]


def test_a_row_is_read_once_the_next_step_is_on_its_way(tiny, tmp_path, monkeypatch):
    """But before the state of its step is saved or scored."""
    begun, read, log = [], {}, Telemetry.log

    def step(state, batch, limit):
        begun.append(None)
        return tiny.step(state, batch, limit)

    def row(self, done, figures):
        if "loss" in figures:
            read[done] = len(begun)
        log(self, done, figures)

    monkeypatch.setattr(Telemetry, "log", row)
    tiny.train(tmp_path, step=step)
    assert read == {done: done if done % 3 == 0 else done + 1 for done in range(1, 25)}


@pytest.mark.parametrize(
    ("waited", "seconds", "workers", "cores", "said"),
    [
        (94.0, 100.0, 0, 16, "waited for data 94% of the time, with 1 of 16 cores to read it: --data.workers 16 may"),
        (60.0, 100.0, 4, 128, "waited for data 60% of the time, with 4 of 128 cores to read it: --data.workers 16 may"),
        (49.0, 100.0, 0, 16, None),
        (94.0, 100.0, 8, 16, None),
        (94.0, 100.0, 8, 128, None),
        (94.0, 100.0, 0, 2, None),
        (9.0, 10.0, 0, 16, None),
    ],
)
def test_a_loop_that_waits_for_data_beside_cores_that_could_read_is_told(waited, seconds, workers, cores, said):
    told = slow_data(waited, seconds, workers, cores)
    assert told is None if said is None else said in told


@pytest.mark.parametrize(("backend", "says"), [("gpu", True), ("cpu", False)])
def test_a_run_says_at_its_end_that_it_waited_for_data_but_on_a_cpu(tiny, tmp_path, monkeypatch, capsys, backend, says):
    given = []
    monkeypatch.setattr(loop, "slow_data", lambda *told: given.append(told) or "more could read")
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    tiny.train(tmp_path)
    assert ("more could read" in capsys.readouterr().err) == says
    assert all(0 < waited < seconds and workers == 0 and cores > 0 for waited, seconds, workers, cores in given)


def test_average_is_served(tiny):
    state = tiny.fresh
    assert served(state, tiny.config) is state.ema
    raw = replace(tiny.config, train=replace(tiny.config.train, ema=0.0))
    assert served(state, raw) is state.params


def test_signals_save_and_the_run_goes_on(tiny, undisturbed, tmp_path, capsys):
    calls = [(2, signal.SIGTERM), (1, signal.SIGINT), (9, signal.SIGTERM), (6, signal.SIGINT)]
    done = 0
    for at, number in calls:  # among them the first step of a run, a step that saves, and one that evaluates
        done += at
        _, said, stop = tiny.train(tmp_path, step=Interrupted(tiny.step, at, number))
        assert stop == [number] and steps(tmp_path)[-1] == done
        name = signal.Signals(number).name
        lines = [line for line in capsys.readouterr().err.splitlines() if name in line]
        assert lines == [f"{name}: saved at step {done}; the same command goes on from there"]
    state, said, stop = tiny.train(tmp_path)
    assert stop == [] and said == [f"goes on from {tmp_path / 'checkpoints' / '00000018'}"]
    assert same(state, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])
    assert steps(tmp_path) == steps(undisturbed[0])


def test_falls_back_to_the_sound_checkpoint(tiny, undisturbed, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    assert steps(workdir) == [12, 15]
    newest = workdir / "checkpoints" / "00000015"
    victim = max((p for p in (newest / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    state, said, _ = tiny.train(workdir)
    assert "00000015 is damaged" in said[0] and said[1].endswith("00000012")
    assert same(state, undisturbed[1]) and rows(workdir) == rows(undisturbed[0])
    assert steps(workdir) == steps(undisturbed[0])


def test_moments_may_wait_in_the_hosts_memory_from_any_start_on(tiny, undisturbed, stopped, tmp_path):
    """A run that began with them on the device goes on, saves and ends with the numbers of one that kept them there."""
    away, workdir = make_experiment("--train.moments_on", "host"), shutil.copytree(stopped, tmp_path / "run")
    state, said, _ = away.train(workdir)
    assert said[-1].endswith("00000015") and steps(workdir)[-1] == 24
    for x in jax.tree.leaves(state):
        moment = any(x is leaf for leaf in jax.tree.leaves(state.optimizer)) and x.ndim
        assert x.sharding.memory_kind == ("pinned_host" if moment else "device")
    for x, expected in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(undisturbed[1]), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-7)
    parts = (away.model, away.task, away.mesh, away.batch)
    there, here = (device_need(e.config, *parts, e.step)[0] for e in (away, tiny))
    assert here - there == sum(x.nbytes for x in jax.tree.leaves(state.optimizer) if x.ndim)


def test_damaged_best_does_not_stop_the_run(tiny, undisturbed, stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    (workdir / "checkpoints" / "00000012" / "meta.json").write_text("{")
    state, said, _ = tiny.train(workdir)
    assert "00000012 is damaged" in said[0] and said[1].endswith("00000015")
    assert same(state, undisturbed[1]) and steps(workdir) == [24]


def test_finished_run_changes_nothing(tiny, undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    state, _, _ = tiny.train(workdir, step=None)
    assert same(state, undisturbed[1])
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def broken_at(tiny, at, number):
    """The compiled step; from one step on it gives weights that are no numbers."""

    def step(state, batch, limit):
        state, metrics = tiny.step(state, batch, limit)
        if int(state.step) >= at:
            weights = {**state.params, "queries": state.params["queries"].at[0, 0].set(number)}
            state = state._replace(params=weights)
        return state, metrics

    return step


@pytest.mark.parametrize(("number", "at"), [(np.nan, 8), (np.inf, 12), (np.nan, 9), (np.nan, 24), (-np.inf, 1)])
def test_divergence_ends_the_run(tiny, tmp_path, number, at):
    with pytest.raises(UserError, match=f"^step {at}: .*diverged.*lower train.learning_rate") as caught:
        tiny.train(tmp_path, step=broken_at(tiny, at, number))
    kept = CheckpointFolder(tmp_path / "checkpoints").all()
    last = (at - 1) // 3 * 3
    assert [c.step for c in kept][-1:] == ([last] if last else [])
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == list(range(1, at))
    if kept:
        assert f"{kept[-1].path} is untouched" in str(caught.value)
        kept[-1].verify()
    else:
        assert "nothing was saved yet" in str(caught.value)


def test_divergence_is_not_saved_on_a_signal(tiny, tmp_path):
    step = Interrupted(broken_at(tiny, 5, np.nan), 5, signal.SIGTERM)
    quiet = replace(tiny, config=replace(tiny.config, train=replace(tiny.config.train, log_every=24)))
    with pytest.raises(UserError, match="step 5: .*diverged"):
        quiet.train(tmp_path, step=step)
    assert steps(tmp_path) == [3]


def refused_from(tiny, at):
    """The compiled step; from one step on it refuses, with or without a limit."""

    def step(state, batch, limit):
        return tiny.step(state, batch, np.float32(-np.inf) if int(state.step) + 1 >= at else limit)

    return step


@pytest.mark.parametrize("at", [1, 5])
def test_a_signal_amid_refused_steps_saves_nothing(tiny, tmp_path, capsys, at):
    """Nor does it where nothing is logged or saved, so that nobody has read yet that they were refused."""
    quiet = replace(tiny, config=replace(tiny.config, train=replace(tiny.config.train, log_every=24)))
    _, _, stop = quiet.train(tmp_path, step=Interrupted(refused_from(tiny, at), at + 3, signal.SIGTERM))
    assert stop == [signal.SIGTERM] and steps(tmp_path) == ([3] if at == 5 else [])
    told = f"SIGTERM: step {at + 3} is being refused, so nothing is saved"
    assert told in capsys.readouterr().err
    state, _, _ = quiet.train(tmp_path)
    assert int(state.step) == 24


def test_running_out_of_memory_amid_refused_steps_saves_nothing(tiny, tmp_path):
    refusing = refused_from(tiny, 5)

    def step(state, batch, limit):
        if int(state.step) == 5:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return refusing(state, batch, limit)

    with pytest.raises(jax.errors.JaxRuntimeError):
        tiny.train(tmp_path, step=step)
    assert steps(tmp_path) == [3]


def test_losses_of_floats_refuse_no_rounded_step(tiny, tmp_path):
    """Rounding to 4 bits may raise the loss at once and for good; its own losses set the limits then."""
    train, found = replace(tiny.config.train, quant_start=0.5), []

    def step(state, batch, limit):
        done = int(state.step) + 1
        state, metrics = tiny.step(state, batch, np.float32(np.inf))
        loss = metrics["loss"] * (1 if done <= 12 else 40)
        found.append((done, bool(np.isfinite(limit)), bool(loss > limit)))
        return state, metrics | {"loss": loss, "refused": (loss > limit).astype(jnp.float32)}

    config = replace(tiny.config, model=replace(tiny.config.model, quant=("decoder=int4",)), train=train)
    replace(tiny, config=config).train(tmp_path, step=step)
    assert [done for done, _, refused in found if refused] == []
    assert [done for done, limited, _ in found if limited] == [10, 11, 12, 22, 23, 24]


def test_large_numbers_are_no_divergence(tmp_path):
    with open_run(Config(workdir=str(tmp_path))) as run:
        check_finite(1, float(NORM({"weight": jnp.full((4,), 1e6)})), run)
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(UserError):
                check_finite(1, float(NORM({"weight": jnp.asarray([1.0, value])})), run)


def test_failed_save_keeps_the_earlier_ones(tiny, tmp_path, monkeypatch):
    original = CheckpointFolder.save

    def full(self, step, *rest):
        if step == 6:
            monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return original(self, step, *rest)

    monkeypatch.setattr(CheckpointFolder, "save", full)
    with pytest.raises(UserError, match="00000006 could not be written .No space left on device"):
        tiny.train(tmp_path)
    monkeypatch.undo()
    assert steps(tmp_path) == [3] and os.listdir(tmp_path / "checkpoints") == ["00000003"]
    state, said, _ = tiny.train(tmp_path)
    assert said[0].endswith("00000003") and int(state.step) == 24


def test_findings_that_cannot_be_judged_train_all_the_same(tmp_path, capsys):
    run = make_experiment("--task.fields", "long_axis_mm", "--train.steps", "6", "--train.eval_every", "3")
    state, _, _ = run.train(tmp_path / "run")
    assert int(state.step) == 6
    assert "step 6: validation no case can be judged\n" in capsys.readouterr().err
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").best().step == 6
