"""Whether r1jax computes with a checkpoint what the reference computed with it."""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.hf.config import CONFIG_FILE, read_json
from r1jax.hf.forward import logits_of, trace, trace_gradients, whole
from r1jax.hf.load import Progress, load_params, read_config
from r1jax.hf.names import layout
from r1jax.ops.precision import exact_products
from r1jax.ops.rope import inverse_frequencies, softmax_scale

REFERENCE = "reference.npz"
HALF = ("bfloat16", "float16")
FP32 = 5e-6
"""Largest difference of fp32 numbers whose standard deviation is at most 1; it grows with theirs."""
INNER_FP32 = 3 * FP32
"""The same of what no main head has read: a norm amplifies the rounding of single places. In float64 neither side is
right: of MTP's states, which follow the whole main model, ours and those of `transformers` are each up to 6e-6 off."""
GRADIENT = 1e-4
"""Largest relative difference of a gradient."""
NO_GRADIENT = float(np.finfo(np.float32).eps)
"""Gradients below this share of the largest one are rounding: those of a router whose one expert has weight 1."""
HALF_KL = 0.02
"""Largest mean KL divergence, in nats, of logits that the reference computed in half precision from ours in fp32."""
TRANSFORMERS_TOKENS = (2, 24)
"""Sequences and tokens that are put to `transformers` where there is no reference."""


class Row(NamedTuple):
    """One comparison."""

    name: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is tolerable; NaN is not."""
        return self.difference <= self.tolerance


class Report(NamedTuple):
    """All comparisons of a checkpoint."""

    against: str
    rows: tuple[Row, ...]
    skipped: tuple[str, ...]
    """Arrays of the reference that nothing was compared with."""

    @property
    def holds(self) -> bool:
        """Whether everything is within its tolerance."""
        return all(row.holds for row in self.rows)


def verify(folder: str | Path, *, mesh: Mesh | None = None, progress: Progress | None = None) -> Report:
    """Runs a checkpoint in fp32 and compares with reference.npz beside it, or else with `transformers`.

    Args:
      folder: The checkpoint.
      mesh: Devices; None takes the first one.
      progress: As in `load_params`.

    Returns:
      Differences and tolerances.

    Raises:
      UserError: The checkpoint cannot be read, or there is nothing to compare with.
    """
    folder = Path(folder)
    config = read_config(folder)
    reference, against = _reference(folder, config)
    params = load_params(folder, config, mesh=mesh, dtype=jnp.float32, progress=progress)
    published = read_json(folder / CONFIG_FILE)
    # Numbers that were stored in half precision; `transformers` is asked for fp32.
    half = against.endswith(REFERENCE) and published.get("dtype", published.get("torch_dtype")) in HALF
    with exact_products(jnp.float32):
        rows = (_half if half else _exact)(config, params, reference)
    compared = {row.name for row in rows}
    skipped = tuple(n for n in reference if n not in compared and n not in ("input_ids", "attention_mask"))
    return Report(against, tuple(rows), skipped)


def table(report: Report) -> str:
    """Writes a report for a terminal; gradients are summed up by the worst.

    Args:
      report: From `verify`.

    Returns:
      One line a comparison.
    """
    rows = []
    for group in ("grad/", "gradnorm/"):
        inside = [row for row in report.rows if row.name.startswith(group)]
        if inside:
            worst = max(inside, key=lambda row: np.nan_to_num(row.difference, nan=np.inf))
            rows.append(worst._replace(name=f"{group}* ({len(inside)}, worst {worst.name.removeprefix(group)})"))
    rows = [row for row in report.rows if not row.name.startswith(("grad/", "gradnorm/"))] + rows
    width = max(len(row.name) for row in rows)
    lines = [f"compared with {report.against}", f"{'':{width}}  largest difference  tolerance"]
    for row in rows:
        told = "ok" if row.holds else "DIFFERS"
        lines.append(f"{row.name:{width}}  {row.difference:18.2e}  {row.tolerance:9.2e}  {told}")
    if report.skipped:
        lines.append(f"not compared: {', '.join(report.skipped)}")
    return "\n".join(lines)


def _reference(folder: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], str]:
    """Arrays to compare with, and where they are from."""
    path = folder / REFERENCE
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except Exception as error:  # a damaged archive fails in many ways
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): make it again.") from None
        ids = arrays.get("input_ids")
        if ids is None or ids.ndim != 2 or "logits" not in arrays:
            raise UserError(f"{path} must hold input_ids [B, T] and logits [B, T, V]; it has {', '.join(arrays)}.")
        if ids.dtype.kind not in "iu" or not ids.size or arrays["logits"].shape != (*ids.shape, config.vocab_size):
            raise UserError(
                f"{path}: input_ids are {ids.dtype}{list(ids.shape)} and logits {list(arrays['logits'].shape)}, but "
                f"they must be whole numbers [B, T] and [B, T, {config.vocab_size}]."
            )
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise UserError(
                f"{path}: input_ids go from {ids.min()} to {ids.max()}, but the vocabulary has "
                f"{config.vocab_size} tokens."
            )
        return arrays, str(path)
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise UserError(f"{folder} has no {REFERENCE} and transformers is not installed: install r1jax[hf].")
    return _ask_transformers(folder, config)


def _ask_transformers(folder: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], str]:
    """Logits of random tokens by `transformers`, in fp32."""
    import torch
    import transformers

    ids = np.random.default_rng(0).integers(0, config.vocab_size, TRANSFORMERS_TOKENS)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"transformers cannot run {folder} ({reason}): put a {REFERENCE} beside it.") from error
    return {"input_ids": ids.astype(np.int32), "logits": logits}, f"transformers {transformers.__version__}"


def _half(config: DecoderConfig, params: Any, reference: dict[str, np.ndarray]) -> list[Row]:
    """Compares distributions: near ties of experts flip in half precision, so single numbers cannot agree."""
    tokens = jnp.asarray(reference["input_ids"], jnp.int32)
    ours = jax.jit(functools.partial(logits_of, config))(params, tokens, *whole(tokens))
    log_p, log_q = jax.nn.log_softmax(ours), jax.nn.log_softmax(jnp.asarray(reference["logits"], jnp.float32))
    return [Row("logits", float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))), HALF_KL)]


def _exact(config: DecoderConfig, params: Any, reference: dict[str, np.ndarray]) -> list[Row]:
    """Compares every array that the decoder has a counterpart of."""
    tokens = jnp.asarray(reference["input_ids"], jnp.int32)
    gradients = None
    if any(name.startswith("grad") for name in reference):
        traced, gradients = jax.jit(functools.partial(trace_gradients, config))(params, tokens)
    else:
        traced = jax.jit(functools.partial(trace, config))(params, tokens)
    ours: dict[str, Any] = {"logits": traced.logits, "loss": traced.loss}
    ours |= {f"hidden_{i}": x for i, x in enumerate(traced.hidden)}
    ours |= {f"topk_w_{i}": x for i, x in enumerate(traced.weights)}
    if traced.mtp_logits is not None:
        ours |= {"mtp_hidden": traced.mtp_hidden, "mtp_logits": traced.mtp_logits}
    if "leftpad_logits" in reference:
        ours["leftpad_logits"] = _padded_logits(config, params, tokens)
    rows = [_row(name, ours[name], reference[name]) for name in ours if name in reference]
    for i, experts in enumerate(traced.experts):
        if f"topk_idx_{i}" in reference:
            rows.append(_count(f"topk_idx_{i}", experts, reference[f"topk_idx_{i}"]))
    if "greedy" in reference:
        rows.append(
            _count("greedy", _greedy(config, params, reference["greedy"], tokens.shape[1]), reference["greedy"])
        )
    rope = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)
    scale = softmax_scale(config.qk_nope_head_dim + config.qk_rope_head_dim, config.rope_scaling)
    for name, value in (("rope_inv_freq", rope), ("softmax_scale", np.float32(scale))):
        if name in reference:
            rows.append(_row(name, value, reference[name]))
    return rows if gradients is None else [*rows, *_gradients(config, gradients, reference)]


def _row(name: str, ours: Any, reference: np.ndarray) -> Row:
    """Largest absolute difference of two arrays."""
    if ours.shape != reference.shape:
        return Row(f"{name} {list(ours.shape)} against {list(reference.shape)}", np.inf, FP32)
    difference = np.max(np.abs(np.asarray(ours) - reference), initial=0.0)
    tolerance = INNER_FP32 if name.startswith(("hidden_", "mtp_")) else FP32
    return Row(name, float(difference), tolerance * max(1.0, float(np.std(reference))))


def _count(name: str, ours: Any, reference: np.ndarray) -> Row:
    """How many whole numbers differ; none may."""
    if ours.shape != reference.shape:
        return Row(f"{name} {list(ours.shape)} against {list(reference.shape)}", np.inf, 0.0)
    return Row(name, float(np.sum(np.asarray(ours) != reference)), 0.0)


def _padded_logits(config: DecoderConfig, params: Any, tokens: jax.Array, padding: int = 3) -> jax.Array:
    """Logits of the same tokens behind padding on the left."""
    valid = jnp.pad(jnp.ones(tokens.shape, bool), ((0, 0), (padding, 0)))
    positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    padded = jnp.pad(tokens, ((0, 0), (padding, 0)))
    return jax.jit(functools.partial(logits_of, config))(params, padded, positions, valid)[:, padding:]


def _greedy(config: DecoderConfig, params: Any, reference: np.ndarray, prompt: int) -> np.ndarray:
    """The likeliest continuation, one forward pass of the whole sequence a token."""
    run = jax.jit(functools.partial(logits_of, config))
    tokens = np.zeros_like(reference)
    tokens[:, :prompt] = reference[:, :prompt]
    for t in range(prompt, tokens.shape[1]):
        batch = jnp.asarray(tokens)
        tokens[:, t] = np.argmax(run(params, batch, *whole(batch))[:, t - 1], axis=-1)
    return tokens


def _gradients(config: DecoderConfig, gradients: Any, reference: dict[str, np.ndarray]) -> Iterator[Row]:
    """Gradients and their norms, under the names that Hugging Face has in memory."""
    named = dict(memory_names(config))
    by_path = {tuple(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(gradients)}
    noise = NO_GRADIENT * max(float(np.linalg.norm(x)) for x in by_path.values())

    def row(name: str, distance: Any, size: Any) -> Row:
        return Row(name, 0.0 if max(distance, size) <= noise else float(distance / max(size, noise)), GRADIENT)

    for name, path in named.items():
        if f"grad/{name}" in reference:
            other = reference[f"grad/{name}"]
            yield row(f"grad/{name}", np.linalg.norm(np.asarray(by_path[path]) - other), np.linalg.norm(other))
        if f"gradnorm/{name}" in reference:
            other = reference[f"gradnorm/{name}"]
            yield row(f"gradnorm/{name}", abs(np.linalg.norm(np.asarray(by_path[path])) - other), other)


def memory_names(config: DecoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of the parameters of Hugging Face's model, which stacks the experts in memory as we do.

    Args:
      config: The decoder.

    Yields:
      Name there and path here, of every leaf that both have.
    """
    for leaf in layout(config):
        if leaf.pieces:
            name = leaf.pieces[0].name
            if leaf.path[-1] in ("gate_up_proj", "down_proj"):
                name = f"{name.partition('.experts.')[0]}.experts.{leaf.path[-1]}"
            yield name, leaf.path
