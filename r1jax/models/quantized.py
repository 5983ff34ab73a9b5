"""Which products of the model are of rounded numbers: by rules on the path of a weight, never on its shape.

R1 says which rules hold while it is traced (`rounding_by`), and each module asks for the scheme of its weight. What has
no weight (attention's scores, the router's choice) cannot be ruled, and is not changed.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from r1jax.errors import UserError, nearest
from r1jax.ops.axes import gathered
from r1jax.ops.quantize import Quantized
from r1jax.ops.quantized_dot import Gated, Ruled, Scheme, quantized_dot, ranged_dot, rounded
from r1jax.validation import QuantRule, quant_rules

Role = Literal["linear", "experts", "embedding", "convolution", "fields", "head"]
"""What a weight is to its module: how it is multiplied, and so how its rows lie."""

RANGED = ("linear", "convolution")
"""Roles whose inputs can have one range: each group of experts and each field would need its own, and the loss
multiplies the language head in parts."""
RANGE = "input_range"
"""Name, beside a weight, of the range that its inputs have had in training: a number of the tree, and no weight."""


class Use(NamedTuple):
    """A product of the model, as an observer sees it."""

    name: str
    """Path of the weight, such as `decoder/layers_0/self_attn/o_proj/weight`."""
    role: Role
    shape: tuple[int, ...]
    """Of the weight."""
    inputs: Array | None
    """What it is multiplied with, contracted along the last axis; None of an embedding."""


_RULES: ContextVar[tuple[QuantRule, ...]] = ContextVar("rules", default=())
_WITHIN: ContextVar[tuple[str, ...]] = ContextVar("within", default=())
_OBSERVER: ContextVar[Callable[[Use], None] | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def rounding_by(rules: tuple[str, ...], within: tuple[str, ...] = ()) -> Iterator[None]:
    """Has the rules of `model.quant` hold while a model is traced.

    Args:
      rules: As in the config.
      within: Where in R1 the traced module lies, for rules name weights by their paths in R1.

    Yields:
      Nothing.
    """
    tokens = _RULES.set(quant_rules(rules)), _WITHIN.set(within)
    try:
        yield
    finally:
        _RULES.reset(tokens[0])
        _WITHIN.reset(tokens[1])


@contextlib.contextmanager
def observing(observer: Callable[[Use], None]) -> Iterator[None]:
    """Shows an observer every product with a weight while a model is traced; its arrays are those of the trace."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def scheme_for(path: tuple[str, ...], role: Role, shape: tuple[int, ...], inputs: Array | None = None) -> Scheme | None:
    """The scheme of a product with a weight, which every module asks for before it multiplies.

    Args:
      path: Of the weight.
      role: What it is.
      shape: Of the weight.
      inputs: What it is multiplied with.

    Returns:
      What the first rule says that matches the path; None is a product of floats.
    """
    name = "/".join((*_WITHIN.get(), *path))
    observer = _OBSERVER.get()
    if observer is not None:
        observer(Use(name, role, shape, inputs))
    rule = rule_of(name, _RULES.get())
    if rule is None or rule.weights == "float":
        return None
    # A row of an embedding is looked up, so that there is nothing else to be rounded.
    acts = (None, None) if role == "embedding" else (rule.activations, rule.gradients)
    return Scheme(rule.weights, *acts, rule.block, rule.running and role in RANGED)


def rule_of(name: str, rules: tuple[QuantRule, ...]) -> QuantRule | None:
    """The first rule whose pattern occurs in the path of a weight."""
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)


def parameter(module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...]) -> Array | Quantized:
    """A weight of a module: floats, or the codes that a quantized checkpoint has in their place."""
    if module.has_variable("params", name):
        held = module.get_variable("params", name)
        if isinstance(held, Quantized):
            return held
    return module.param(name, init, shape, jnp.float32)


def rounded_product(
    module: nn.Module,
    x: Float[Array, "*B I"],
    weight: Float[Array, "O I"] | Quantized,
    scheme: Scheme,
    name: str,
    gated: Gated | None = None,
) -> Float[Array, "*B O"]:
    """X w^T in the numbers of a scheme.

    Args:
      module: Whose weight it is.
      x: Activations.
      weight: Floats or codes.
      scheme: How.
      name: Of the weight in the module.
      gated: As in `quantized_dot`.

    Returns:
      Array of x's dtype.
    """
    whole = jax.tree.map(lambda part: gathered(part, (*module.path, name)), weight)
    key = rounding_key(module, scheme)
    if not scheme.running or isinstance(weight, Quantized):
        return quantized_dot(x, whole, scheme, key=key, gated=gated)
    span = module.param(RANGE, nn.initializers.zeros, (), jnp.float32)
    return ranged_dot(x, whole, scheme, span, key=key)


def added(module: nn.Module, name: str, weight: Array | Quantized, dtype: DTypeLike) -> Array:
    """A weight that is added to activations, or stands in for them, and is rounded row by row like an embedding.

    Args:
      module: Whose weight it is.
      name: Of the weight in the module.
      weight: Floats or codes.
      dtype: Of the result.

    Returns:
      The weight, whole on every device.
    """
    path = (*module.path, name)
    whole, scheme = jax.tree.map(lambda part: gathered(part, path), weight), scheme_for(path, "embedding", weight.shape)
    return whole.astype(dtype) if scheme is None else rounded(whole, scheme, dtype)


def rounding_key(module: nn.Module, scheme: Scheme) -> PRNGKeyArray | None:
    """Key of the stochastic rounding of a module's gradients, where they are rounded and a step has given keys."""
    return module.make_rng("rounding") if scheme.gradients and module.has_rng("rounding") else None


def ruled(
    module: nn.Module, name: str, role: Role, weight: Array | Quantized, inputs: Array | None
) -> Ruled | Array | Quantized:
    """A weight together with its scheme, for a product that is formed elsewhere; without a rule the weight itself."""
    scheme = scheme_for((*module.path, name), role, weight.shape, inputs)
    return weight if scheme is None else Ruled(weight, scheme, rounding_key(module, scheme))


def uses(init: Callable[..., Any], *arguments: Any, **settings: Any) -> list[Use]:
    """Every product of a model with a weight, in order, without computing anything.

    Args:
      init: The `init` of the model.
      arguments: Of `init`.
      settings: Of `init`.

    Returns:
      One entry for each weight; `inputs` are shapes.
    """
    found: dict[str, Use] = {}

    def note(use: Use) -> None:
        inputs = None if use.inputs is None else jax.ShapeDtypeStruct(use.inputs.shape, use.inputs.dtype)
        found.setdefault(use.name, use._replace(inputs=inputs))

    with observing(note):
        jax.eval_shape(lambda *x: init(*x, **settings), *arguments)
    return list(found.values())


def check_rules(rules: tuple[str, ...], names: list[str], device: Any) -> None:
    """Refuses rules that no weight follows, and types that a device does not multiply.

    Args:
      rules: `model.quant`.
      names: Paths of the weights that can be ruled.
      device: A JAX device.

    Raises:
      UserError: Names the rule and what is possible.
    """
    read = quant_rules(rules)
    followed = {rule_of(name, read) for name in names}
    for rule in read:
        if rule not in followed:
            plain = re.sub(r"[^\w/]+", "/", rule.pattern).strip("/")
            meant = nearest(plain, {*names, *(part for name in names for part in name.split("/"))}, cutoff=0.0)
            raise UserError(
                f"model.quant: no weight follows the pattern {rule.pattern!r}, or earlier rules take all that it "
                f"matches{meant}; weights are called {', '.join(names[:3])}, ..."
            )
    if any(rule.activations == "fp8" for rule in read):
        check_fp8("model.quant asks for products of fp8", device)


def check_ranges(rules: tuple[str, ...], uses: list[Use]) -> None:
    """Refuses rules that ask for a running range where no weight can have one.

    Args:
      rules: `model.quant`.
      uses: Of the model.

    Raises:
      UserError: Names the rule.
    """
    read = quant_rules(rules)
    able = {rule_of(use.name, read) for use in uses if use.role in RANGED}
    for rule in read:
        if rule.running and rule not in able:
            raise UserError(
                f"model.quant: no weight that follows the pattern {rule.pattern!r} can have a running range (experts, "
                "fields, embeddings and the language head have none): leave out /running"
            )


def check_fp8(asked: str, device: Any) -> None:
    """Refuses fp8 on a GPU that has none.

    Args:
      asked: What asks for it, as the message begins.
      device: A JAX device.

    Raises:
      UserError: The GPU is older than Ada and Hopper.
    """
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and float(capability) < 8.9:
        raise UserError(
            f"{asked}, but {device.device_kind} has none (it takes compute capability 8.9, this is {capability}): "
            "use int8"
        )
