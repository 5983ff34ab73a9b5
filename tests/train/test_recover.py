"""Poisoned batches: single ones are refused, many in a row are left out for good, and a kill changes nothing of it."""

import hashlib
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.train import recover
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.guard import PATIENCE, Jump, jump, read_jumps
from r1jax.train.loop import open_batches
from r1jax.train.run import open_run
from r1jax.train.step import NO_LIMIT


def name_of(batch):
    return hashlib.sha256(b"".join(np.asarray(batch[key]).tobytes() for key in sorted(batch))).hexdigest()


class Killed(Exception):
    """Stands for a kill: nothing of the process goes on."""


class Steps:
    """The compiled step; it writes down what it reads, and some batches are poisoned."""

    def __init__(self, step, poisoned=(), poison=("table", np.inf), kill_at=None):
        self.step, self.poisoned, self.poison, self.kill_at = step, set(poisoned), poison, kill_at
        self.read = []

    def __call__(self, state, batch, limit):
        if len(self.read) == self.kill_at:
            raise Killed
        self.read.append(name_of(batch))
        if self.read[-1] in self.poisoned:
            name, number = self.poison
            batch = {**batch, name: np.full_like(batch[name], number)}
        return self.step(state, batch, limit)


@pytest.fixture
def train(tiny, monkeypatch):
    """Trains as train.py does, with the step that is given."""

    def run(workdir, steps, keep=1):
        config = replace(tiny.config, workdir=str(workdir), train=replace(tiny.config.train, keep=keep))
        monkeypatch.setattr(recover, "compile_step", lambda *_: steps)
        with tiny.traced_once(), open_run(config) as opened:
            recover.train(config, opened, tiny.model, tiny.task, tiny.mesh, tiny.source, tiny.validation, tiny.batch)
        return opened

    return run


def batches_of(tiny, count):
    batches = open_batches(tiny.config, tiny.task, tiny.mesh, tiny.source, 0)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


@pytest.fixture(scope="module")
def order(tiny):
    """Names of the first 70 batches."""
    return [name_of(batch) for batch in batches_of(tiny, 70)]


def final(workdir):
    newest = CheckpointFolder(workdir / "checkpoints").all()[-1]
    newest.verify()
    return newest.read(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), newest.stored()))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("at", "poison"), [(5, ("table", np.inf)), (24, ("table", np.inf)), (15, ("target.center_mm", 1e6))]
)
def test_a_poisoned_batch_changes_no_weight(tiny, train, order, tmp_path, capsys, at, poison):
    steps = Steps(tiny.step, [order[at - 1]], poison)
    train(tmp_path, steps)
    assert steps.read == order[:24] and read_jumps(tmp_path) == ()
    logged = {row["step"]: row for row in rows(tmp_path) if "learning_rate" in row}
    assert [step for step, row in logged.items() if row["refused"]] == [at]
    assert all(np.isfinite(x) for row in rows(tmp_path) for x in row.values())
    assert f"step {at}: 1 of the last steps refused" in capsys.readouterr().err

    state = tiny.init()
    for i, batch in enumerate(batches_of(tiny, 24)):
        new, _ = tiny.step(jax.tree.map(jnp.copy, state), batch, NO_LIMIT)
        state = state._replace(step=new.step) if i == at - 1 else new
    assert same(final(tmp_path)["params"], jax.device_get(state.params))


@pytest.mark.slow
def test_many_in_a_row_are_left_out(tiny, train, order, tmp_path, capsys):
    poisoned = order[7 : 7 + PATIENCE + 2]  # batches 8 to 19
    steps = Steps(tiny.step, poisoned)
    run = train(tmp_path, steps)
    # Refused ten times by step 17, which is read once step 18 has begun; checkpoint 6 lies before it. Batches 7 to 17
    # are left out; 18 and 19 are refused.
    assert read_jumps(tmp_path)[0][:2] == (6, 11) and len(read_jumps(tmp_path)) == 1
    assert steps.read == order[:18] + order[17:35]
    assert "back to step 6, without the 11 batches since" in capsys.readouterr().err
    told = [json.loads(line) for line in (run.workdir / "history.jsonl").read_text().splitlines()]
    assert [(row["step"], row["to"]) for row in told if row["event"] == "rolled back"] == [(17, 6)]
    assert [row["step"] for row in rows(tmp_path) if "learning_rate" in row] == list(range(1, 25))

    for kill_at in (14, 17, 30):  # before, just after and long after going back
        workdir = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            train(workdir, Steps(tiny.step, poisoned, kill_at=kill_at))
        train(workdir, Steps(tiny.step, poisoned))
        assert same(final(workdir), final(tmp_path)) and read_jumps(workdir) == read_jumps(tmp_path)


def test_what_going_back_does_not_help_ends_the_run(tiny, train, order, tmp_path):
    with pytest.raises(UserError, match=r"after 3 rollbacks to step 3.*train.spike_factor"):
        train(tmp_path, Steps(tiny.step, order[4:]))
    assert [j.step for j in read_jumps(tmp_path)] == [3, 3, 3]
    newest = CheckpointFolder(tmp_path / "checkpoints").all()[-1]
    assert newest.step == 3 and all(np.isfinite(x).all() for x in jax.tree.leaves(final(tmp_path)["params"]))


class Spoilt(Steps):
    """Poisons all that follows checkpoint 6, until the run has gone back behind it."""

    def __init__(self, step, workdir, kill_at=None):
        super().__init__(step, kill_at=kill_at)
        self.workdir = workdir

    def __call__(self, state, batch, limit):
        spoilt = int(state.step) >= 6 and all(jump.step == 6 for jump in read_jumps(self.workdir))
        self.poisoned = {name_of(batch)} if spoilt else set()
        return super().__call__(state, batch, limit)


@pytest.mark.slow
def test_what_the_newest_does_not_help_the_one_before_may(tiny, train, order, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    steps = Spoilt(tiny.step, whole)
    train(whole, steps, keep=2)
    assert [tuple(j)[:2] for j in read_jumps(whole)] == [(6, 10), (6, 10), (6, 10), (3, 43)]
    assert steps.read == order[:17] + order[16:27] + order[26:37] + order[36:47] + order[46:67]
    assert (whole / "checkpoints/left-00000006").is_dir()
    assert [c.step for c in CheckpointFolder(whole / "checkpoints").all()][-2:] == [21, 24]

    def killed(*_):
        raise Killed

    for kill_at in (30, 52):  # between two rollbacks, and after the run has come past step 6 again
        workdir = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            train(workdir, Spoilt(tiny.step, workdir, kill_at=kill_at), keep=2)
        if kill_at == 30:
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(
                    recover, "jump", lambda folder, step, *more: (killed if step == 3 else jump)(folder, step, *more)
                )
                train(workdir, Spoilt(tiny.step, workdir), keep=2)
        train(workdir, Spoilt(tiny.step, workdir), keep=2)
        assert same(final(workdir), final(whole)) and read_jumps(workdir) == read_jumps(whole)


def test_without_a_checkpoint_it_goes_back_to_the_start(tiny, train, order, tmp_path):
    steps = Steps(tiny.step, order[1 : 1 + PATIENCE])
    train(tmp_path, steps)
    assert [tuple(j)[:2] for j in read_jumps(tmp_path)] == [(0, 11)]
    assert steps.read == order[:12] + order[11:35]


def test_another_config_forgets_the_jumps_of_a_run_without_checkpoints(tiny, train, order, tmp_path):
    (tmp_path / "jumps.json").write_text(json.dumps([Jump(0, 5, "another run")._asdict()]))
    steps = Steps(tiny.step)
    train(tmp_path, steps)
    assert steps.read == order[:24] and read_jumps(tmp_path) == ()
