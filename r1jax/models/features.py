"""The model read from the features of those inputs that have no gradient: tokens of a text, and events with states."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from r1jax.models.decoder import Decoder
from r1jax.models.layers import Linear
from r1jax.models.r1 import R1, Inputs, Output
from r1jax.models.series import StreamEncoder

Features = dict[str, Float[Array, "B _ _"]]
"""By name: "text" is the embedded tokens, "stream_0" and so on the features of each event of a stream."""


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


def read_from(model: R1, params: Any, inputs: Inputs, features: Features) -> Output:
    """Reads a batch with other features than its own.

    Args:
      model: The model.
      params: Its weights.
      inputs: The batch; all that is not in `features` is read as it is.
      features: Replace what the model would have made of the batch, in the shapes that `record` gives.

    Returns:
      What the model says.
    """
    return _tapped(model, params, inputs, lambda name, x: features[name].astype(x.dtype) if name in features else x)


def _tapped(model: R1, params: Any, inputs: Inputs, tap: Callable[[str, Array], Array]) -> Output:
    """Applies the model and lets `tap` replace each feature by name."""

    def intercept(call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, Decoder) and context.method_name == "embed":
            return tap("text", call(*args, **kwargs))
        if isinstance(module, Linear) and isinstance(module.parent, StreamEncoder) and module.name == "events":
            return call(tap(module.parent.name, args[0]), *args[1:], **kwargs)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return model.apply({"params": params}, inputs)
