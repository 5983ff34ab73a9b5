"""Rows to the devices that have their experts and back, in rounds of a fixed capacity; no row is dropped.

Every device gives every other one the same number of places. What does not find one waits for a further round, which
the program enters only where some device needs it: with even routing there is one exchange there and one back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Compute = Callable[[Float[Array, "P D"], Int[Array, " P"]], Float[Array, "P D"]]


@jax.custom_vjp
def _send(x: Float[Array, "T D"], choice: Int[Array, " P"], slot: Int[Array, "T K"]) -> Float[Array, "P D"]:
    """Row of the token of each choice; zeros where no choice has the place."""
    return _take(x, choice // slot.shape[1])


def _send_forward(x: Array, choice: Array, slot: Array) -> tuple[Array, Array]:
    return _send(x, choice, slot), slot


def _send_backward(slot: Array, gradient: Array) -> tuple[Array, None, None]:
    return jnp.sum(_take(gradient, slot), axis=1), None, None


_send.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def _collect(y: Float[Array, "P D"], choice: Int[Array, " P"], slot: Int[Array, "T K"]) -> Float[Array, "T K D"]:
    """Row of the place of each choice; zeros where it has none in this round."""
    return _take(y, slot)


def _collect_forward(y: Array, choice: Array, slot: Array) -> tuple[Array, Array]:
    return _collect(y, choice, slot), choice


def _collect_backward(choice: Array, gradient: Array) -> tuple[Array, None, None]:
    return _take(gradient.reshape(-1, gradient.shape[-1]), choice), None, None


_collect.defvjp(_collect_forward, _collect_backward)


def _take(rows: Float[Array, "n D"], index: Int[Array, "*m"]) -> Float[Array, "*m D"]:
    """rows[index], with zeros where the index is out of range; a gather in both directions."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def exchange(
    x: Float[Array, "T D"],
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    compute: Compute,
    *,
    local_experts: int,
    axis: str,
    everywhere: tuple[str, ...],
    capacity: float,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """sum_k w_k E_k(x) with experts that lie on the devices of an axis, consecutive ones together; in `shard_map`.

    Args:
      x: Tokens of this device.
      experts: Chosen experts of each token, distinct within a token.
      weights: Of the choices, fp32.
      compute: Takes rows and the local expert of each, `local_experts` for an empty place; gives their results.
      local_experts: Experts of a device.
      axis: Mesh axis of the experts.
      everywhere: All axes along which devices run in step: they enter a further round together.
      capacity: Places that a device has at another in one round, as a multiple of the even share.

    Returns:
      Array of fp32, and how many choices of this device had to wait.
    """
    devices = jax.lax.axis_size(axis)
    (tokens, k), flat = experts.shape, experts.reshape(-1)
    most = tokens * min(k, local_experts)
    places = max(1, min(most, int(-(-capacity * tokens * k // devices))))
    target = flat // local_experts
    rank, counts = _rank(target, devices)
    longest = jax.lax.pmax(jnp.max(counts), everywhere)

    def round_(number: Int[Array, ""] | int) -> Float[Array, "T D"]:
        first = number * places
        here = (rank >= first) & (rank < first + places)
        slot = jnp.where(here, target * places + rank - first, devices * places).astype(jnp.int32)
        choice = jnp.full(devices * places, flat.size, jnp.int32)
        choice = choice.at[slot].set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop", unique_indices=True)
        expert = jnp.take(flat % local_experts, choice, mode="fill", fill_value=local_experts)
        slot = slot.reshape(tokens, k)
        rows = _swap(_send(x, choice, slot), axis)
        back = _swap(compute(rows, _swap(expert, axis)), axis)
        return jnp.sum(_collect(back, choice, slot).astype(jnp.float32) * weights[..., None], axis=1)

    out, rounds = round_(0), -(-most // places)
    if rounds > 1:
        out = out + jax.lax.cond(longest > places, lambda: _rest(round_, rounds, longest, places, out), lambda: 0 * out)
    return out, jnp.sum(jnp.maximum(counts - places, 0))


def _rest(
    round_: Callable[[Int[Array, ""]], Array], rounds: int, longest: Int[Array, ""], places: int, like: Array
) -> Array:
    """Sum of the rounds after the first; there are rarely any, so their activations are computed again, not kept."""

    def add(total: Array, number: Int[Array, ""]) -> tuple[Array, None]:
        needed = longest > number * places
        return total + jax.lax.cond(needed, jax.checkpoint(round_), lambda _: jnp.zeros_like(like), number), None

    return jax.lax.scan(add, jnp.zeros_like(like), jnp.arange(1, rounds))[0]


def _rank(target: Int[Array, " n"], devices: int) -> tuple[Int[Array, " n"], Int[Array, " devices"]]:
    """How many earlier choices go to the same device, for each choice, and how many go to each device."""
    order = jnp.argsort(target, stable=True)
    counts = jnp.sum(jax.nn.one_hot(target, devices, dtype=jnp.int32), axis=0)
    sorted_rank = jnp.arange(target.size) - (jnp.cumsum(counts) - counts)[target[order]]
    return jnp.zeros_like(sorted_rank).at[order].set(sorted_rank, unique_indices=True), counts


def _swap(x: Array, axis: str) -> Array:
    """Block i of every device goes to device i."""
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)
