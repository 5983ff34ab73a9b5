"""The model read from the features of those inputs that have no gradient: tokens of a text, and events with states.

It can also be read with the experts of another reading. Where a token changes its experts the model jumps, and no
gradient sees a jump; with its experts held the model has none.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r1jax.models.decoder import Decoder
from r1jax.models.layers import Linear
from r1jax.models.moe import Router, select_experts
from r1jax.models.ngrams import NgramScores
from r1jax.models.r1 import R1, Inputs, Output
from r1jax.models.series import StreamEncoder

Features = dict[str, Float[Array, "B _ _"]]
"""By name: "text" is the embedded tokens, "ngrams" what those of a text say, "stream_0" and so on the features of each
event of a stream."""
Chosen = dict[str, Bool[Array, "*T E"]]
"""By name of the router: whether a token chose an expert."""


def record(model: R1, params: Any, inputs: Inputs) -> Features:
    """The features that the model makes of a batch.

    Args:
      model: The model.
      params: Its weights.
      inputs: The batch.

    Returns:
      Those of the modalities that the model reads.
    """
    seen: Features = {}

    def keep(name: str, x: Array) -> Array:
        seen[name] = x
        return x

    _tapped(model, params, inputs, keep)
    return seen


def record_experts(model: R1, params: Any, inputs: Inputs) -> Chosen:
    """The experts that each token of a batch chooses.

    Args:
      model: The model; without `remat` and `scan_layers`, under which a router's choice cannot be had from outside.
      params: Its weights.
      inputs: The batch.

    Returns:
      Those of every router.
    """
    seen: Chosen = {}

    def keep(router: Router, scores: Array, bias: Array) -> tuple[Array, Array]:
        experts, _ = select_experts(scores.reshape(-1, scores.shape[-1]), bias, router.config)
        chosen = jnp.any(jax.nn.one_hot(experts, scores.shape[-1], dtype=bool), axis=1)
        seen["/".join(router.path)] = chosen.reshape(scores.shape)
        return scores, bias

    _tapped(model, params, inputs, lambda _, x: x, keep)
    return seen


def read_from(model: R1, params: Any, inputs: Inputs, features: Features, experts: Chosen | None = None) -> Output:
    """Reads a batch with other features than its own.

    Args:
      model: The model.
      params: Its weights.
      inputs: The batch; all that is not in `features` is read as it is.
      features: Replace what the model would have made of the batch, in the shapes that `record` gives.
      experts: From `record_experts`: what each token is read by, whatever its features would choose. How much each of
        its experts weighs still follows the features. None leaves the choice free.

    Returns:
      What the model says; the statistics of the routers are of no use where the experts are held.
    """

    def hold(router: Router, scores: Array, bias: Array) -> tuple[Array, Array]:
        if experts is None:
            return scores, bias
        # Scores are positive, so that these, and the groups that they are in, come before all others.
        return jnp.where(experts["/".join(router.path)], scores, -1), jnp.zeros_like(bias)

    def replace(name: str, x: Array) -> Array:
        return features[name].astype(x.dtype) if name in features else x

    return _tapped(model, params, inputs, replace, hold)


def _tapped(
    model: R1,
    params: Any,
    inputs: Inputs,
    tap: Callable[[str, Array], Array],
    route: Callable[[Router, Array, Array], tuple[Array, Array]] = lambda _, *scored: scored,
) -> Output:
    """Applies the model and lets `tap` replace each feature by name, and `route` the scores and bias of each router."""

    def intercept(call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, Decoder) and context.method_name == "embed":
            return tap("text", call(*args, **kwargs))
        if isinstance(module, NgramScores) and context.method_name == "__call__":
            return tap("ngrams", call(*args, **kwargs)[:, None])[:, 0]
        if isinstance(module, Linear) and isinstance(module.parent, StreamEncoder) and module.name == "events":
            return call(tap(module.parent.name, args[0]), *args[1:], **kwargs)
        if isinstance(module, Router) and context.method_name == "__call__":
            return route(module, *call(*args, **kwargs))
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return model.apply({"params": params}, inputs)
