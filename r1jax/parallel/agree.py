"""What the processes of a run agree on: what process 0 has found, whether to stop, and which cases each reads."""

import collections
import json
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.errors import UserError
from r1jax.parallel.launch import Told
from r1jax.parallel.mesh import batch_sharding

T = TypeVar("T")
BLOCK = 4096
"""Messages are multiples of so many bytes, so that few sizes are compiled."""
LAG = 2
"""Steps after which a vote is counted: by then the devices have done it, and no step waits."""


def is_first() -> bool:
    """Whether this is process 0, which alone writes the run folder and says how the run comes on."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line on stderr, once for all processes."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def from_first(find: Callable[[], T]) -> T:
    """Has process 0 do something, and gives its result to all; all have come here before any goes on.

    Args:
      find: Is called by process 0 alone; its result is JSON-able.

    Returns:
      The result, as it is in one process alone; else as JSON has it, so that tuples are lists.

    Raises:
      UserError: `find` raised it.
      OSError: `find` raised it.
    """
    if jax.process_count() == 1:
        return find()
    found, raised = None, None
    if is_first():
        try:
            found = {"value": find()}
        except UserError as error:
            raised, found = error, {"mistake": str(error)}
        except OSError as error:
            raised, found = error, {"errno": error.errno, "strerror": error.strerror or str(error)}
    found = json.loads(_broadcast(json.dumps(found).encode()))
    if raised is not None:
        raise raised
    if "mistake" in found:
        raise Told(found["mistake"])
    if "errno" in found:
        raise OSError(found["errno"], found["strerror"])
    return found["value"]


def _broadcast(message: bytes) -> bytes:
    """Gives the bytes of process 0 to all."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    padded = np.zeros(-(-size // BLOCK) * BLOCK, np.uint8)
    if is_first():
        padded[:size] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


class Vote:
    """The largest number that any process gives, step by step; all learn it at the same step."""

    def __init__(self, mesh: Mesh) -> None:
        """Compiles nothing yet.

        Args:
          mesh: All devices.
        """
        self.mesh, self.pending = mesh, collections.deque[jax.Array]()
        self.largest = jax.jit(lambda given: given.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, number: int) -> int:
        """Gives a number.

        Args:
          number: Of this process; 0 is none.

        Returns:
          The largest one that was given `LAG` steps ago; in one process alone, the number itself.
        """
        if jax.process_count() == 1:
            return number
        place = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        mine = np.full(len(self.mesh.local_devices), number, np.int32)
        self.pending.append(self.largest(jax.make_array_from_process_local_data(place, mine, (self.mesh.size,))))
        return int(self.pending.popleft()) if len(self.pending) > LAG else 0


def share_of(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """The part of every global batch that the devices of this process hold.

    Args:
      mesh: Devices.
      batch_size: Cases of a global batch, a multiple of the number of devices.

    Returns:
      Number of the part, and how many there are; processes between which no batch is divided have the same part.

    Raises:
      UserError: The mesh gives a process cases that do not follow one another.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    parts = sorted({part.indices(batch_size)[:2] for (part,) in places})
    first, last = parts[0][0], parts[-1][1]
    if any(end != start for (_, end), (start, _) in zip(parts, parts[1:], strict=False)) or first % (last - first):
        raise UserError(
            f"the mesh {dict(mesh.shape)} gives process {jax.process_index()} cases of a batch that do not follow one "
            "another: let mesh.data and mesh.fsdp be multiples of the devices of a process, or divisors"
        )
    return first // (last - first), batch_size // (last - first)


def place_share(mesh: Mesh, part: np.ndarray, batch_size: int) -> jax.Array:
    """Puts the part of a batch that this process has read on its devices.

    Args:
      mesh: Devices.
      part: Cases first, those of `share_of`.
      batch_size: Cases of the global batch.

    Returns:
      The global array.
    """
    shape = (batch_size, *part.shape[1:])
    return jax.make_array_from_process_local_data(batch_sharding(mesh), part, shape)


def whole_rows(mesh: Mesh, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Puts together what the processes have read of some batches, each its part of every batch, bit for bit.

    Args:
      mesh: Devices.
      rows: [batches x part, ...] of this process, one batch after the other; numbers or texts, the same type in all.
      batch_size: Cases of a global batch.

    Returns:
      [batches x batch_size, ...], the same in all processes.
    """
    index, count = share_of(mesh, batch_size)
    if count == 1:
        return rows
    if rows.dtype.kind == "U":  # each has made room for its own longest text
        widest = int(multihost_utils.process_allgather(np.int32(rows.dtype.itemsize)).max())
        rows = rows.astype(f"<U{widest // np.dtype('<U1').itemsize}")
    order = multihost_utils.process_allgather(np.int32(index)).tolist()
    sent = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)  # JAX would round 64 bits to 32
    found = np.asarray(multihost_utils.process_allgather(sent))[[order.index(part) for part in range(count)]]
    found = found.reshape(count, -1, batch_size // count, sent.shape[1]).swapaxes(0, 1)
    return np.ascontiguousarray(found).view(rows.dtype).reshape(-1, *rows.shape[1:])
