"""Saves that the training does not wait for: a copy on the host, and one thread that writes it."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from r1jax.config import Config
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.memory import out_of_memory
from r1jax.train.step import HOST
from r1jax.train.watch import Watch


class Saver:
    """Writes the checkpoints of one run, one at a time."""

    def __init__(self, checkpoints: CheckpointFolder, watch: Watch) -> None:
        """Starts nothing yet.

        Args:
          checkpoints: Where to.
          watch: Is told what the training waits for.
        """
        self.checkpoints, self.watch = checkpoints, watch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: Future[None] | None = None
        self._step = 0
        self._locked = 0  # bytes of page-locked memory that JAX has once taken, and gives to every later copy
        self._said: set[str] = set()

    def save(
        self,
        step: int,
        state: Any,
        config: Config,
        meta: dict[str, Any],
        tokenizer: Mapping[str, bytes],
        *,
        say: Callable[[str], None],
        then: Callable[[], None],
    ) -> None:
        """Copies a state and has it written; the state may be overwritten or donated once this returns.

        Where the host has no room for the copy, it is written before this returns. So it is where several processes
        write: they wait for each other, and in a thread beside the steps their waits could cross.

        Args:
          step: Steps done.
          state: Tree of arrays.
          config: The resolved config.
          meta: JSON-able.
          tokenizer: Tokenizer files by name.
          say: Prints a line.
          then: Is called once the checkpoint is published, by the thread that wrote it.

        Raises:
          UserError: The save before this one, or this one where it is written at once, has failed.
        """
        if self._pending is not None and not self._pending.done():
            text = f"the checkpoint of step {self._step} is still being written when the next is due, so training waits"
            self._once("slow", f"{text}: a larger train.save_every or a faster disk would spare that", say)
        self.wait()
        self.watch.enter("copying the state", step)
        self._step = step

        def write(copy: Any) -> None:
            self.checkpoints.save(step, copy, config, meta, tokenizer)
            then()

        # What is divided between devices is put together for the disk, and so is in memory twice.
        room = sum(x.nbytes * (1 if x.is_fully_replicated else 2) for x in jax.tree.leaves(state))
        together = jax.process_count() > 1
        if together or _available() + self._locked < room:
            if not together:
                text = "host memory has no room for a copy of the state: training waits for each save"
                self._once("narrow", text, say)
            self.watch.enter(f"writing the checkpoint of step {step}")
            write(state)
            return
        copy = locked_copy(state)
        if copy is None:
            copy = host_copy(state)
        locked = sum(x.nbytes for x in jax.tree.leaves(copy) if isinstance(x, jax.Array))
        self._locked = max(self._locked, locked)
        self._pending = self._pool.submit(lambda copy: write(jax.tree.map(np.asarray, copy)), copy)

    def check(self) -> None:
        """Raises what a finished save has failed with; costs nothing.

        Raises:
          UserError: The disk is full or the folder cannot be written.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
          UserError: The disk is full or the folder cannot be written.
        """
        pending = self.settle()
        self._pending = None
        if pending is not None:
            pending.result()

    def settle(self) -> Future[None] | None:
        """Waits until nothing is being written, and leaves a failure for `wait`."""
        if self._pending is not None and not self._pending.done():
            self.watch.enter(f"writing the checkpoint of step {self._step}")
            self._pending.exception()
        return self._pending

    def close(self) -> BaseException | None:
        """Waits for the last save and ends the thread.

        Returns:
          What a save failed with that nobody has been told of.
        """
        pending, self._pending = self.settle(), None
        self._pool.shutdown()
        return None if pending is None else pending.exception()

    def _once(self, kind: str, text: str, say: Callable[[str], None]) -> None:
        if kind not in self._said:
            self._said.add(kind)
            say(text)


def locked_copy(state: Any) -> Any:
    """Copies arrays of accelerators to page-locked memory of the host, which their copy engines write by themselves.

    Those to ordinary memory go through buffers and touch each page for the first time: 1.5 GB/s beside an H200. The
    memory stays JAX's for the next copy. Of what several devices hold alike it takes room for one.

    Args:
      state: Tree of `jax.Array`.

    Returns:
      The same tree in memory "pinned_host", but NumPy arrays of what lies in the host's memory already; None where
      there is no room to lock.
    """
    leaves, structure = jax.tree.flatten(state)
    away = [_each_part_once(x) for x in leaves if not _on_host(x)]
    try:
        # Waited for here: the next step, which overwrites the state, would wait as well, and a failure shows in time.
        there = jax.block_until_ready(jax.device_put(away, [x.sharding.with_memory_kind(HOST) for x in away]))
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    copies = iter(there)
    return structure.unflatten([np.array(x) if _on_host(x) else next(copies) for x in leaves])


def _each_part_once(x: jax.Array) -> jax.Array:
    """The array on as few devices as hold every part of it."""
    if not isinstance(x.sharding, NamedSharding):
        return x
    mesh, spec = x.sharding.mesh, x.sharding.spec
    divided = {name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)}
    some = mesh.devices[tuple(slice(None if name in divided else 1) for name in mesh.axis_names)]
    parts = {part.device: part.data for part in x.addressable_shards}
    where = NamedSharding(Mesh(some, mesh.axis_names, axis_types=mesh.axis_types), spec)
    return jax.make_array_from_single_device_arrays(x.shape, where, [parts[device] for device in some.flat])


def host_copy(state: Any) -> Any:
    """Copies arrays to NumPy arrays that share no memory with them.

    Args:
      state: Tree of `jax.Array`.

    Returns:
      The same tree; the copies from accelerators run side by side.
    """
    # What lies in host memory already is only viewed by `device_get`, and the next step overwrites it.
    own = lambda x, copied: np.array(copied) if _on_host(x) else np.asarray(copied)  # noqa: E731
    return jax.tree.map(own, state, jax.device_get(state))


def _on_host(x: jax.Array) -> bool:
    return x.sharding.memory_kind not in (None, "device") or next(iter(x.devices())).platform == "cpu"


def _available() -> float:
    """Bytes of memory that a process may take before the machine swaps; infinite where Linux does not say."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(rows["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")
