"""Arrays that are filled on their devices, part after part, so that the host never holds one of them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

STAGED_BYTES = 2**25
"""Arrays up to this size are put together on the host; larger ones need a program for each shape and device."""
Box = tuple[tuple[int, int], ...]
"""Start and stop on each axis."""


class Filling:
    """An array on its devices that is not complete yet; what nobody writes is zero."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> None:
        """Takes the memory.

        Args:
          shape: Of the whole array.
          dtype: Of its numbers.
          sharding: Where it shall be; of its devices, those of this process are filled here.
        """
        self._shape, self._dtype, self._sharding = shape, dtype, sharding
        self._devices: dict[Box, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            box = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
            self._devices.setdefault(box, []).append(device)
        self._staged: dict[Box, np.ndarray] = {}
        self._arrays: dict[jax.Device, jax.Array] = {}
        if math.prod(shape) * dtype.itemsize <= STAGED_BYTES:
            self._staged = {box: np.zeros([stop - start for start, stop in box], dtype) for box in self._devices}
        else:
            zeros = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
            self._arrays = {shard.device: shard.data for shard in zeros.addressable_shards}

    def wants(self, place: Box) -> bool:
        """Whether a device of this process holds any of that place."""
        return any(_overlap(box, place) is not None for box in self._devices)

    def write(self, place: Box, values: np.ndarray) -> None:
        """Writes a part, and waits until it is there.

        Args:
          place: Where in the whole array.
          values: Numbers of that shape and any dtype.
        """
        for box, devices in self._devices.items():
            shared = _overlap(box, place)
            if shared is None:
                continue
            part = values[_within(place, shared)]
            if self._staged:
                self._staged[box][_within(box, shared)] = part
                continue
            part = np.ascontiguousarray(part.astype(self._dtype, copy=False))
            start = tuple(np.int32(low - first) for (low, _), (first, _) in zip(shared, box, strict=True))
            for device in devices:
                self._arrays[device] = _write(self._arrays[device], jax.device_put(part, device), start)
        jax.block_until_ready(list(self._arrays.values()))

    def finish(self) -> jax.Array:
        """The array; nothing may be written afterwards."""
        for box, buffer in self._staged.items():
            for device in self._devices[box]:
                self._arrays[device] = jax.block_until_ready(jax.device_put(buffer, device))
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, list(self._arrays.values()))


@partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, part: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    """Puts a part into an array, in the array's own memory."""
    return jax.lax.dynamic_update_slice(array, part, start)


def _overlap(one: Box, other: Box) -> Box | None:
    """What two boxes share, or None."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(low < high for low, high in shared) else None


def _within(box: Box, part: Box) -> tuple[slice, ...]:
    """The index of a part in an array that holds a box."""
    return tuple(slice(low - start, high - start) for (start, _), (low, high) in zip(box, part, strict=True))
