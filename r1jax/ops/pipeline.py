"""Layers on the devices of a ring, through which the microbatches of a batch travel (GPipe, Huang et al. 2019).

With several rounds each device has several runs of layers, and a microbatch passes it as often (the interleaved
schedule of Narayanan et al. 2021). Microbatches go in groups of as many as the ring holds, and each group makes all of
its rounds before the next one starts: what comes back to the first device is wanted there at once, and nothing waits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.ops.axes import Ring, constrain, placed, placement

STACKED = "stages"
"""Where the tree of a decoder has the weights of these layers: stacked, those of a device together."""
MICROBATCHES = 4
"""Microbatches a device that are aimed at where the config names no number: a fifth of the turns is idle then."""


@dataclass(frozen=True)
class Stages:
    """Which layers of a decoder lie on which device of the ring; the others lie on all of them."""

    devices: int
    rounds: int
    layers: range
    """The same number for each device and round, all of one kind."""

    @property
    def depth(self) -> int:
        """Layers that a device computes in one turn."""
        return len(self.layers) // (self.devices * self.rounds)

    def of(self, device: int) -> tuple[range, ...]:
        """Layers of a device, those of each round together."""
        first = self.layers.start + device * self.depth
        starts = range(first, self.layers.stop, self.devices * self.depth)
        return tuple(range(start, start + self.depth) for start in starts)

    @property
    def order(self) -> tuple[int, ...]:
        """Numbers of the layers, those of a device together: so they are stacked."""
        return tuple(i for device in range(self.devices) for run in self.of(device) for i in run)


def stages_of(decoder: DecoderConfig, devices: int, rounds: int) -> Stages:
    """Divides the longest run of equal layers; what is left over comes before it.

    Args:
      decoder: The layers.
      devices: Of the ring.
      rounds: Runs of layers a device.

    Returns:
      The stages.

    Raises:
      UserError: There are fewer layers than runs.
    """
    dense = min(decoder.first_k_dense_replace, decoder.num_hidden_layers)
    equal = max(range(dense, decoder.num_hidden_layers), range(dense), key=len)
    if len(equal) < devices * rounds:
        runs = f"mesh.pipe is {devices}" + (f" and mesh.interleave {rounds}" if rounds > 1 else "")
        raise UserError(
            f"{runs}, but the longest run of equal layers of model.decoder has {len(equal)}: it must have at least "
            f"{devices * rounds}"
        )
    return Stages(devices, rounds, equal[len(equal) % (devices * rounds) :])


class Turn(NamedTuple):
    """What a device does in one tick."""

    round: Int[Array, "*n"] | Int[np.ndarray, "*n"] | int
    microbatch: Int[Array, "*n"] | Int[np.ndarray, "*n"] | int
    busy: Bool[Array, "*n"] | Bool[np.ndarray, "*n"] | bool
    """Whether it is anything; else the two numbers are those of some other tick."""


@dataclass(frozen=True)
class Schedule:
    """Who computes what when; one tick is the time of a turn."""

    devices: int
    rounds: int
    microbatches: int
    """With several rounds, a multiple of devices x hop."""
    hop: int = 1
    """Ticks from a device's turn to that of the next device with its result: with 2, it travels while both compute."""

    @property
    def ticks(self) -> int:
        """From the first turn of the first device to the last one of the last device."""
        return self.rounds * self.microbatches + self.hop * (self.devices - 1)

    @property
    def bubble(self) -> float:
        """Share of the ticks in which a device is idle."""
        return self.hop * (self.devices - 1) / self.ticks

    def turn(self, device: Any, tick: Any) -> Turn:
        """What a device does in a tick; both may be arrays."""
        group, turns = self.hop * self.devices, self.rounds * self.microbatches
        number = tick - self.hop * device
        busy = (number >= 0) & (number < turns)
        number = number % turns
        first, inner = number // (self.rounds * group) * group, number % (self.rounds * group)
        if self.rounds == 1:
            return Turn(0 * number, number, busy)
        return Turn(inner // group, first + inner % group, busy)

    def tick(self, device: Any, round_: Any, microbatch: Any) -> Any:
        """When a device does it; undoes `turn`."""
        group = self.hop * self.devices
        before = microbatch // group * self.rounds * group + round_ * group + microbatch % group
        return before + self.hop * device


def schedule_of(ring: Ring, cases: int) -> Schedule:
    """Divides a batch into microbatches.

    Args:
      ring: Devices, and how many microbatches the config wants.
      cases: Of the batch, or of each part of it with accumulation.

    Returns:
      The schedule.

    Raises:
      UserError: The cases cannot be divided so.
    """
    unit = ring.devices * (ring.hop if ring.rounds > 1 else 1)
    most = MICROBATCHES * ring.hop * ring.devices // unit
    tried = [ring.microbatches] if ring.microbatches else [unit * n for n in range(most, 0, -1)]
    share = ring.inside.devices("batch") * math.prod(ring.inside.mesh.shape[axis] for axis in ring.repeated)
    for count in tried:
        if count % unit == 0 and cases % (count * share) == 0:
            return Schedule(ring.devices, ring.rounds, count, ring.hop)
    told = f"mesh.microbatches is {ring.microbatches}" if ring.microbatches else f"mesh.pipe is {ring.devices}"
    raise UserError(
        f"{told}, but a batch or a part of it has {cases} cases: there must be a multiple of {unit} microbatches, each "
        f"with a multiple of {share} case(s) for the devices that share it"
    )


Stage = Callable[[Any, Int[Array, " k"], Float[Array, "b T D"], Any, Any], tuple[Float[Array, "b T D"], Any]]
"""(weights of k layers, their numbers, x, what else the cases have, what all have) -> (x, results of each layer)."""


def pipeline(
    stages: Stages, stage: Stage, weights: Any, x: Float[Array, "B T D"], rows: Any, shared: Any
) -> tuple[Float[Array, "B T D"], Any]:
    """Runs a batch through the layers of a ring.

    Every device computes in every tick, also where it is idle by the schedule: its results are not used then, and as
    the devices wait for each other it costs no time.

    Args:
      stages: Which layers lie where.
      stage: Some consecutive layers; it is traced once.
      weights: Tree of stacked weights, in the order of `stages`.
      x: Divided over the ring too, as everything outside of it.
      rows: Tree of small arrays [B, ...] that a layer needs of the cases.
      shared: Tree of arrays that it needs besides.

    Returns:
      The states, where x was, and the results with the leading dimensions [layer, share of the batch, microbatch of its
      cases]; the layers are in the order of `stages`.
    """
    where = placement()
    assert where is not None and where.ring is not None
    ring, schedule = where.ring, schedule_of(where.ring, len(x))
    axes = {ring.axis, *ring.repeated}
    layers, cases, whole = PartitionSpec(ring.axis), PartitionSpec((ring.axis, *ring.repeated)), PartitionSpec()

    def device(weights: Any, x: Array, rows: Any, shared: Any) -> tuple[Array, Any]:
        with placed(ring.inside):
            return _device(ring, schedule, stages, stage, weights, x, rows, shared)

    taken, given = (layers, cases, cases, whole), (cases, PartitionSpec(ring.axis, None, ring.repeated))
    run = jax.shard_map(device, mesh=where.mesh, in_specs=taken, out_specs=given, axis_names=axes, check_vma=False)
    x, found = run(weights, x, rows, shared)
    return x, jax.tree.map(lambda y: y.reshape(len(y), -1, *y.shape[3:]), found)


def _device(
    ring: Ring, schedule: Schedule, stages: Stages, stage: Stage, weights: Any, x: Array, rows: Any, shared: Any
) -> tuple[Array, Any]:
    """What one device of the ring does; its other axes are the compiler's."""
    own, last = jax.lax.axis_index(ring.axis), ring.devices - 1
    senders = ring.devices if ring.rounds > 1 else last  # with one round nothing comes back to the first device
    around = [(i, (i + 1) % ring.devices) for i in range(senders)]
    fold = lambda w: w.reshape(ring.rounds, stages.depth, *w.shape[1:])  # noqa: E731
    weights, order = jax.tree.map(fold, weights), jnp.asarray(stages.order).reshape(ring.devices, ring.rounds, -1)
    own_parts = schedule.microbatches // ring.devices
    parts = lambda x: divide(x, own_parts)  # noqa: E731
    gather = lambda x: jax.lax.all_gather(parts(x), ring.axis, tiled=True)  # noqa: E731
    rows = jax.tree.map(gather, rows)
    fed = schedule.turn(0, np.arange(schedule.ticks))
    inputs = _to_first(parts(x), ring)[np.where(fed.busy & (fed.round == 0), fed.microbatch, 0)]

    def tick(carry: tuple[Array, Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], Any]:
        arrived, made, results = carry
        turn = schedule.turn(own, item[1])
        sent = jax.lax.ppermute(made, ring.axis, around) if schedule.hop == 2 else None
        x = constrain(jnp.where((own == 0) & (turn.round == 0), item[0], arrived), "batch", "length", None)
        at = (lambda w: w[0]) if ring.rounds == 1 else (lambda w: w[turn.round])
        here = jax.tree.map(lambda row: row[turn.microbatch], rows)
        x, found = stage(jax.tree.map(at, weights), order[own, turn.round], x, here, shared)
        final = turn.busy & (own == last) & (turn.round == ring.rounds - 1)
        results = results.at[turn.microbatch].set(jnp.where(final, x, results[turn.microbatch]))
        return (jax.lax.ppermute(x, ring.axis, around) if sent is None else sent, x, results), found

    empty = jnp.zeros_like(inputs[0])
    start = empty, empty, jnp.zeros((schedule.microbatches, *empty.shape), empty.dtype)
    (_, _, results), found = jax.lax.scan(tick, start, (inputs, jnp.arange(schedule.ticks)))
    when = schedule.tick(own, *jnp.indices((ring.rounds, schedule.microbatches)))
    by_layer = lambda y: jnp.moveaxis(y[when], 2, 1).reshape(-1, ring.devices, 1, own_parts, *y.shape[2:])  # noqa: E731
    return join(_from_last(results, ring)), jax.tree.map(by_layer, found)


def divide(x: Array | np.ndarray, count: int) -> Array:
    """Parts [count, n / count, ...] of rows, every count-th row in the same one, so that a division of them stays."""
    return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)


def join(parts: Array) -> Array:
    """Undoes `divide`."""
    return jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[2:])


def _to_first(own: Float[Array, "n *rest"], ring: Ring) -> Float[Array, "m *rest"]:
    """The microbatches of all devices, on the first one; each sends its own once, and the others receive zeros."""
    others = [jax.lax.ppermute(own, ring.axis, [(device, 0)]) for device in range(1, ring.devices)]
    return jnp.concatenate([own, *others])


def _from_last(results: Float[Array, "m *rest"], ring: Ring) -> Float[Array, "n *rest"]:
    """The results of the last device, each where its microbatch came from."""
    *others, own = jnp.split(results, ring.devices)
    last = ring.devices - 1
    sent = [jax.lax.ppermute(part, ring.axis, [(last, device)]) for device, part in enumerate(others)]
    return jnp.where(jax.lax.axis_index(ring.axis) == last, own, sum(sent))
