"""Saves that training does not wait for: what is written, what waits, and where a failure shows."""

import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from r1jax.config import Config
from r1jax.errors import UserError
from r1jax.train import saver as module
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.history import History
from r1jax.train.saver import Saver, host_copy, locked_copy
from r1jax.train.watch import Watch


class Folder(CheckpointFolder):
    """Stands for a checkpoint folder: keeps what it is given, when the gate is open."""

    def __init__(self, path):
        super().__init__(path)
        self.saved, self.gate, self.fails = {}, threading.Event(), set()
        self.gate.set()

    def save(self, step, state, config, meta, tokenizer):
        assert self.gate.wait(240)
        if step in self.fails:
            raise UserError(f"step {step}: the disk is full")
        self.saved[step] = (jax.tree.map(np.array, state), meta, dict(tokenizer), threading.current_thread().name)


@pytest.fixture
def saver(tmp_path):
    watch = Watch(tmp_path, History(tmp_path), 0.0)
    made = Saver(Folder(tmp_path), watch)
    yield made
    made.checkpoints.gate.set()
    made.close()
    watch.close()


def save(saver, step, state, said=None, then=lambda: None):
    say = (said if said is not None else []).append
    saver.save(step, state, Config(), {"step": step}, {"tokenizer.json": b"{}"}, say=say, then=then)


def test_training_goes_on_and_its_next_step_changes_nothing_of_what_is_written(saver):
    folder, order = saver.checkpoints, []
    folder.gate.clear()
    state = {"a": jnp.arange(4.0), "b": jnp.asarray([1, 2], jnp.bfloat16)}
    save(saver, 3, state, then=lambda: order.append(sorted(folder.saved)))
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree), donate_argnums=0)
    state = donate(state)
    assert not folder.saved and not order
    folder.gate.set()
    saver.wait()
    written, meta, tokenizer, thread = folder.saved[3]
    assert np.array_equal(written["a"], np.arange(4.0)) and written["b"].dtype == ml_dtypes.bfloat16
    assert (meta, tokenizer) == ({"step": 3}, {"tokenizer.json": b"{}"}) and thread.startswith("save")
    assert order == [[3]]  # told once it is published


def test_a_slow_disk_is_waited_for_and_said_once(saver, monkeypatch):
    folder, said, enter = saver.checkpoints, [], saver.watch.enter

    def waits(phase, step=None):
        if phase.startswith("writing"):  # it is about to wait: now the disk goes on
            folder.gate.set()
        enter(phase, step)

    monkeypatch.setattr(saver.watch, "enter", waits)
    for step in (1, 2, 3):
        folder.gate.clear()
        save(saver, step, {"a": jnp.zeros(2)}, said)
        save(saver, 10 * step, {"a": jnp.zeros(2)}, said)
        saver.wait()
    assert sorted(folder.saved) == [1, 2, 3, 10, 20, 30]
    assert len(said) == 1 and said[0].startswith("the checkpoint of step 1 is still being written")


def test_without_room_for_a_copy_it_is_written_at_once(saver, monkeypatch):
    monkeypatch.setattr(module, "_available", lambda: 7.0)
    said = []
    for step in (1, 2):
        save(saver, step, {"a": jnp.zeros(2)}, said)
        assert saver.checkpoints.saved[step][3] == threading.current_thread().name
    assert len(said) == 1 and "no room for a copy" in said[0]


@pytest.mark.parametrize("how", ["check", "wait", "save", "close"])
def test_a_failed_save_shows_at_the_next_occasion_and_once(saver, how):
    folder = saver.checkpoints
    folder.fails = {4}
    save(saver, 4, {"a": jnp.zeros(2)}, then=lambda: pytest.fail("nothing was published"))
    saver.settle()
    if how == "close":
        assert "the disk is full" in str(saver.close())
        return
    with pytest.raises(UserError, match="step 4: the disk is full"):
        save(saver, 5, {"a": jnp.zeros(2)}) if how == "save" else getattr(saver, how)()
    saver.check()
    assert saver.close() is None and 5 not in folder.saved


def test_copies_share_no_memory(saver):
    state = {"a": jax.device_put(jnp.arange(3.0), jax.devices()[1])}
    copy = host_copy(state)
    assert not np.shares_memory(copy["a"], np.asarray(state["a"]))


@pytest.fixture
def accelerator(monkeypatch):
    """Arrays of the CPU pass for those of a device that has a memory of its own."""
    monkeypatch.setattr(module, "_on_host", lambda x: x.sharding.memory_kind == "pinned_host")


def test_from_an_accelerator_page_locked_memory_is_filled_and_taken_again(saver, accelerator, monkeypatch):
    devices = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data"))
    state = {"a": jax.device_put(jnp.arange(16.0), spread), "b": jnp.asarray([1, 2], jnp.bfloat16)}
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree), donate_argnums=0)
    for step in (1, 2, 3):
        said = []
        save(saver, step, state, said)
        state = donate(state)
        saver.wait()
        written, _, _, thread = saver.checkpoints.saved[step]
        assert np.array_equal(written["a"], np.arange(16.0) + step - 1) and written["b"].dtype == ml_dtypes.bfloat16
        assert thread.startswith("save") and not said
        # But for what the first copy has taken, room for what is put together of eight parts.
        monkeypatch.setattr(module, "_available", lambda: 64.0)
    monkeypatch.setattr(module, "_available", lambda: 63.0)
    save(saver, 4, state, said)
    assert len(said) == 1 and "no room for a copy" in said[0]


@pytest.mark.parametrize(("axes", "parts"), [((), 1), (("fsdp",), 4), ((None, "data"), 2), ((("data", "fsdp"),), 8)])
def test_page_locked_memory_has_what_devices_hold_alike_once(accelerator, axes, parts):
    devices = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*axes))
    x = jax.device_put(jnp.arange(64.0).reshape(8, 8), where)
    (copy,) = locked_copy([x])
    assert len(copy.addressable_shards) == parts and copy.sharding.memory_kind == "pinned_host"
    assert np.array_equal(copy, x)


def test_where_no_memory_can_be_locked_the_copy_goes_to_ordinary_memory(saver, accelerator, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate in pinned_host")

    monkeypatch.setattr(jax, "device_put", full)
    save(saver, 1, {"a": jnp.arange(4.0)})
    saver.wait()
    assert np.array_equal(saver.checkpoints.saved[1][0]["a"], np.arange(4.0))


def test_what_lies_in_host_memory_is_copied_within_it(accelerator):
    """As moments that wait there do, beside weights on the device."""
    x = jnp.arange(4.0)
    there = jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
    copy = locked_copy({"moment": there, "weight": x})
    assert isinstance(copy["moment"], np.ndarray) and not np.shares_memory(copy["moment"], np.asarray(there))
    assert copy["weight"].sharding.memory_kind == "pinned_host"
    assert np.array_equal(copy["moment"], x) and np.array_equal(copy["weight"], x)
