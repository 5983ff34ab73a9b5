"""benchmarks/overhead.py takes the loop's surplus, and not the time of the step or of waiting."""

import time

import jax.numpy as jnp
import pytest

from benchmarks.overhead import FIRST, Blocks, Enough, Repeated, table


def measured(between, waits=0.0):
    """Blocks of a step that takes a millisecond, in a loop that does something else between two steps."""

    def step(state, batch, limit):
        time.sleep(1e-3)
        return state + 1, {}

    blocks, state = Blocks(step, size=4, count=FIRST + 6), jnp.zeros(())
    with pytest.raises(Enough):
        while True:
            with blocks.waiting(None):
                time.sleep(waits)
            state, _ = blocks(state, None, None)
            time.sleep(between)
    return blocks, state


def test_surplus_is_what_the_loop_does_between_steps():
    blocks, _ = measured(between=5e-3)
    found = blocks.figures()
    assert found["blocks"] == 6 and found["surplus_ms"] == pytest.approx(5.0, rel=0.4)
    assert found["loop_ms"] - found["bare_ms"] == pytest.approx(found["surplus_ms"], rel=0.4)


def test_waiting_does_not_count():
    assert measured(between=0.0, waits=5e-3)[0].figures()["surplus_ms"] < 3.0


def test_as_many_bare_steps_as_steps_of_the_loop():
    blocks, _ = measured(between=0.0)
    assert len(blocks.bare) == len(blocks.looped) == len(blocks.worked) == FIRST + 6
    assert int(blocks.state) == 2 * 4 * (FIRST + 6)


def test_a_repeated_source_reads_once():
    class Source:
        name, reads = "cases", 0

        def read_batch(self, indices):
            self.reads += 1
            return {"case_id": [str(i) for i in indices], "x": indices * 2}

    source = Source()
    repeated = Repeated(source, 4)
    for indices in ([7, 8, 9, 5], [3]):
        assert repeated.read_batch(indices)["case_id"] == ["0", "1", "2", "3"][: len(indices)]
    assert source.reads == 1 and repeated.name == "cases"


def test_table_names_share_and_saves():
    row = {
        "bare_ms": 100.0,
        "loop_ms": 100.5,
        "surplus_ms": 0.5,
        "share": 0.005,
        "processor_ms": 1.0,
        "processor_least_ms": 0.9,
    }
    saves = {
        "state_bytes": 2.1e9,
        "stands_still_seconds": 0.5,
        "published_after_seconds": 4.0,
        "step_meanwhile_ms": 101.0,
        "save_every": 100,
        "share": 0.05,
    }
    told = table({"step": row, "no computation": row, "saves": saves})
    assert "| step | 100.000 | 100.500 | 0.500 | 0.50% | 1.000 | 0.900 |" in told
    assert "A save of 2.10 GB holds up the steps for 0.500 s, 5.0% of 100 steps" in told
