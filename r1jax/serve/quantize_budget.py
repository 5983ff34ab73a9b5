"""Bits of each weight under a size: how much the model's outputs change by rounding it alone, and what fits best."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r1jax.errors import UserError
from r1jax.models.decoder import language_logits
from r1jax.models.quantized import Use, rounding_by
from r1jax.models.r1 import R1
from r1jax.ops.quantize import dequantize
from r1jax.serve.quantize_report import code_bytes
from r1jax.serve.quantize_weights import ROWS
from r1jax.tasks.task import Task
from r1jax.train.quantized import nearest_codes, path_of, schemes_of, weight_of, with_codes

KINDS = ("float", "int8_weights", "int4")
"""What a weight may become, as presets of `model.quant` call it."""
UNITS = 8192
"""Parts of the budget in which sizes are counted, each rounded up: the sum is never above it."""


class Option(NamedTuple):
    """One weight in numbers of one kind."""

    rule: str
    """As a rule of `model.quant` says it after its pattern, such as int4/128."""
    bytes: int
    """Of codes and scales, or of fp32."""
    change: float
    """Of the model's outputs: squared change over variance, summed over outputs."""


def options(model: R1, task: Task, params: Any, uses: list[Use], batch: dict[str, Any]) -> dict[str, list[Option]]:
    """What each weight could become, and what that alone would do to the outputs for the calibration cases.

    Args:
      model: Of floats.
      task: Prepares the batch.
      params: Weights.
      uses: What they are.
      batch: Calibration cases.

    Returns:
      Options by the weight's name, floats first; kinds that come to the same for a weight are one.
    """

    def outputs(params: Any, batch: dict[str, Any]) -> list[Array]:
        out = model.apply({"params": params}, task.prepare(batch)[0], language=task.language)
        found = list(out.heads.values())
        for states in (out.text_states, out.mtp_states):
            if states is not None:
                rows = states.reshape(1, -1, states.shape[-1])
                logits = language_logits(rows[:, :: -(-rows.shape[1] // ROWS)], out.lm_head)
                found.append(jax.nn.log_softmax(logits))
        return found

    @jax.jit
    def change(params: Any, batch: dict[str, Any], exact: list[Array]) -> Float[Array, ""]:
        pairs = zip(outputs(params, batch), exact, strict=True)
        return sum(jnp.mean((new - old) ** 2) / jnp.maximum(jnp.var(old), 1e-12) for new, old in pairs)

    exact = jax.jit(outputs)(params, batch)
    found = {use.name: [Option("float", 4 * int(np.prod(use.shape)), 0.0)] for use in uses}
    floats = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for kind in KINDS[1:]:
        with rounding_by((kind,)):
            codes, schemes = nearest_codes(params, uses), schemes_of(uses)
        for name, (use, scheme) in schemes.items():
            rule = f"{scheme.weights}/{scheme.block}" if scheme.block else scheme.weights
            if rule in [option.rule for option in found[name]]:
                continue
            rounded = weight_of(dequantize(codes[name], floats[name].dtype), use)
            lost = float(change(with_codes(params, {name: rounded}), batch, exact))
            found[name].append(Option(rule, code_bytes(codes[name], scheme), lost))
    return found


def smallest(found: dict[str, list[Option]]) -> int:
    """Bytes of all weights in the fewest bits."""
    return sum(min(option.bytes for option in group) for group in found.values())


def choose(found: dict[str, list[Option]], limit: int) -> dict[str, Option]:
    """One option of each weight, the sum of whose changes is least among those that fit (a knapsack of classes).

    Changes are taken to add up, as those of small and independent roundings nearly do.

    Args:
      found: From `options`.
      limit: Bytes of all of them; the smallest must fit.

    Returns:
      Options by name.
    """
    least = smallest(found)
    # Counted from the smallest sizes, so that units divide what there is to choose and not what there is.
    unit = max((limit - least) / UNITS, 1e-9)
    best, taken = np.zeros(UNITS + 1), []
    for group in found.values():
        first = min(option.bytes for option in group)
        costs = [int(np.ceil((option.bytes - first) / unit)) for option in group]
        sums = np.full((len(group), UNITS + 1), np.inf)
        for i, (option, cost) in enumerate(zip(group, costs, strict=True)):
            if cost <= UNITS:
                sums[i, cost:] = best[: UNITS + 1 - cost] + option.change
        best = sums.min(axis=0)
        taken.append((sums.argmin(axis=0), costs))
    left, chosen = UNITS, {}
    for (name, group), (which, costs) in zip(reversed(found.items()), reversed(taken), strict=True):
        i = int(which[left])
        chosen[name] = group[i]
        left -= costs[i]
    return {name: chosen[name] for name in found}


def rules_of(chosen: dict[str, Option]) -> tuple[str, ...]:
    """`model.quant` for a choice: one rule a kind, which names its weights whole."""
    kinds: dict[str, list[str]] = {}
    for name, option in chosen.items():
        kinds.setdefault(option.rule, []).append(re.escape(name))
    return tuple(f"^({'|'.join(names)})$={rule}" for rule, names in sorted(kinds.items()))


def within_budget(found: dict[str, list[Option]], numbers: int, share: float) -> dict[str, Option]:
    """What each weight becomes so that a model fits a share of its size.

    Args:
      found: From `options`.
      numbers: Weights of the whole model, those that cannot be rounded with them.
      share: Of the bytes in fp32.

    Returns:
      Options by name.

    Raises:
      UserError: It does not fit.
    """
    whole = 4 * numbers
    rest = whole - sum(group[0].bytes for group in found.values())
    if rest + smallest(found) > whole * share:
        least = np.ceil((rest + smallest(found)) / whole * 1000) / 1000
        raise UserError(
            f"--budget {share:g} is too small: in 4 bits, and with norms and biases in fp32, the model takes {least:g} "
            "of its size"
        )
    return choose(found, int(whole * share) - rest)


def budget_table(found: dict[str, list[Option]], chosen: dict[str, Option]) -> str:
    """What rounding each weight alone changes, and what it became.

    Args:
      found: From `options`.
      chosen: From `within_budget`.

    Returns:
      Lines.
    """
    width = max(map(len, found))
    lines = [f"{'weight':{width}}  {'chosen':9} {'bytes':>10}  change of the outputs by it alone"]
    for name, option in chosen.items():
        told = ", ".join(f"{other.rule} {other.change:.1e}" for other in found[name][1:])
        lines.append(f"{name:{width}}  {option.rule:9} {option.bytes:>10,}  {told}")
    return "\n".join(lines)
