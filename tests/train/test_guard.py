"""The guard's arithmetic: limits from logged losses, jumps that are kept, numbers of batches."""

import json
import math
import statistics
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.config import TrainConfig
from r1jax.errors import UserError
from r1jax.train import guard
from r1jax.train.guard import (
    Guard,
    Jump,
    batch_after,
    float_steps,
    in_force,
    jump,
    logged_losses,
    loss_limit,
    read_jumps,
    way_back,
)

LOSSES = st.lists(st.floats(0.01, 100), min_size=guard.ENOUGH, max_size=60)


@given(LOSSES, st.floats(1, 20))
def test_the_limit_is_robust_deviations_above_the_median_of_the_last(losses, factor):
    last = losses[-guard.HISTORY :]
    middle = statistics.median(last)
    spread = 1.4826 * statistics.median([abs(x - middle) for x in last])
    limit = loss_limit(losses, factor)
    assert limit == pytest.approx(max(middle + factor * spread, 1.5 * middle))


def test_one_wild_loss_among_the_logged_hardly_moves_the_limit():
    calm = [1 + 0.01 * (i % 5) for i in range(30)]
    assert loss_limit([*calm, 1e6], 10.0) == pytest.approx(loss_limit(calm, 10.0), rel=0.05)


def test_without_enough_losses_or_without_a_factor_there_is_no_limit():
    assert loss_limit([1.0] * (guard.ENOUGH - 1), 10.0) == math.inf
    assert loss_limit([1.0] * 30, 0.0) == math.inf


def test_losses_are_those_of_accepted_steps_up_to_the_checkpoint(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0, "refused": 1.0}, {"step": 2, "validation.auc": 0.5}]
    rows += [{"step": 3, "loss": 2.0}, {"step": 4, "loss": 1.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert list(logged_losses(tmp_path, 3).items()) == [(1, 3.0), (3, 2.0)]
    assert logged_losses(tmp_path / "none", 3) == {}


def test_jumps_are_kept_and_bounded(tmp_path):
    assert read_jumps(tmp_path) == ()
    for i in range(guard.RETRIES):
        assert way_back([10, 20], read_jumps(tmp_path)) == 20
        jump(tmp_path, 20, 33, "no finite loss")
        assert read_jumps(tmp_path) == (Jump(20, 13, "no finite loss"),) * (i + 1)
    tried = read_jumps(tmp_path)
    assert way_back([20], tried) is None and way_back([10, 20], tried) == 10 and way_back([10, 20, 40], tried) == 40
    jump(tmp_path, 10, 33, "a loss of 9")  # also without what was left out in vain after step 20
    assert read_jumps(tmp_path) == (*tried, Jump(10, 23 + 3 * 13, "a loss of 9"))
    assert in_force(read_jumps(tmp_path)) == read_jumps(tmp_path)[-1:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["jumps.json"]


def test_damaged_jumps_are_refused(tmp_path):
    (tmp_path / "jumps.json").write_text('[{"step": 3}]')
    with pytest.raises(UserError, match=r"jumps.json cannot be read"):
        read_jumps(tmp_path)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=5))
def test_no_batch_is_read_twice_on_the_way_that_counts(places):
    jumps = [Jump(step, batches, "") for step, batches in places]
    numbers = [batch_after(step, jumps) for step in range(40)]
    assert all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    assert numbers[-1] == 39 + sum(jump.batches for jump in in_force(jumps))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=6))
def test_whoever_goes_back_reads_on_from_the_last_batch(places):
    with tempfile.TemporaryDirectory() as folder:
        for step, more in places:
            unread = batch_after(step + more, read_jumps(Path(folder)))
            jump(Path(folder), step, step + more, "")
            assert batch_after(step, read_jumps(Path(folder))) == unread


@pytest.mark.parametrize("start", [0.0, 0.1, 0.3, 1 / 3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 30, 1000])
def test_steps_in_floats_are_counted_as_the_compiled_step_does(steps, start):
    in_floats = jax.jit(lambda done: done.astype(jnp.float32) / steps < start)(jnp.arange(steps + 1))
    assert float_steps(TrainConfig(steps=steps, quant_start=start)) == int(in_floats.sum())


@pytest.mark.parametrize("floats", [0, 30])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_restart_finds_the_limits_that_the_run_had(tmp_path, every, floats):
    """Whether a row is read at once or after the next step has begun, and also where logged steps were refused, or a
    loss was no number and so is not in its row."""
    guarded, unread, limits, entered, lines = Guard(tmp_path, 10.0, 0, floats), None, {}, {}, []
    for step in range(1, 60 * every):
        limits[step] = guarded.limit(step)
        known = [loss for at, loss in entered.items() if at <= step - 2 and (at > floats or step <= floats)]
        assert limits[step] == np.float32(loss_limit(known, 10.0))
        if unread is not None:
            guarded.log(*unread)
        unread = None
        if step % every == 0:
            figures = {"loss": math.inf if step % 7 == 0 else 3 / step, "refused": float(step % 11 == 0)}
            lines.append(json.dumps({"step": step} | {k: v for k, v in figures.items() if math.isfinite(v)}))
            if step % 7 and step % 11:
                entered[step] = figures["loss"]
            unread = (step, figures)
            if step % 3 == 0:  # it is saved, and read before
                guarded.log(*unread)
                unread = None
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    for start in range(len(limits) - 2):
        again = Guard(tmp_path, 10.0, start, floats)
        assert [again.limit(start + 1), again.limit(start + 2)] == [limits[start + 1], limits[start + 2]]
    assert math.isfinite(limits[len(limits)])
