"""benchmarks/overhead.py takes the loop's surplus, and not the time of the step or of waiting."""

import jax.numpy as jnp
import pytest

from benchmarks.overhead import FIRST, Blocks, Enough, Repeated, table


@pytest.fixture
def measured(monkeypatch):
    """Measures blocks of a step of a millisecond, in a loop that does something else between two steps; no time passes
    but what is told."""
    now = [0.0]
    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(f"time.{clock}", lambda: now[0])

    def measure(between, waits=0.0):
        def step(state, batch, limit):
            now[0] += 1e-3
            return state + 1, {}

        blocks, state = Blocks(step, size=4, count=FIRST + 6), jnp.zeros(())
        with pytest.raises(Enough):
            while True:
                with blocks.waiting(None):
                    now[0] += waits
                state, _ = blocks(state, None, None)
                now[0] += between
        return blocks

    return measure


def test_surplus_is_what_the_loop_does_between_steps(measured):
    found = measured(between=5e-3).figures()
    assert found["blocks"] == 6 and found["surplus_ms"] == pytest.approx(5.0)
    assert (found["bare_ms"], found["loop_ms"]) == (pytest.approx(1.0), pytest.approx(6.0))


def test_waiting_does_not_count(measured):
    assert measured(between=0.0, waits=5e-3).figures()["surplus_ms"] == pytest.approx(0.0, abs=1e-9)


def test_as_many_bare_steps_as_steps_of_the_loop(measured):
    blocks = measured(between=0.0)
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
        "stands_still_first_seconds": 1.25,
        "stands_still_seconds": 0.5,
        "published_after_seconds": 4.0,
        "step_meanwhile_ms": 101.0,
        "save_every": 100,
        "share": 0.05,
    }
    told = table({"step": row, "no computation": row, "saves": saves})
    assert "| step | 100.000 | 100.500 | 0.500 | 0.50% | 1.000 | 0.900 |" in told
    assert "A save of 2.10 GB holds up the steps for 0.500 s, 5.0% of 100 steps" in told
    assert "The first one holds them up for 1.250 s." in told
