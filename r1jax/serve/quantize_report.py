"""What quantizing a checkpoint did: error of each weight, size, low-bit shares, and the metric before and after."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from r1jax.models.quantized import Use, observing
from r1jax.models.r1 import R1
from r1jax.ops.quantize import Quantized, dequantize
from r1jax.ops.quantized_dot import Scheme, quantized_dot
from r1jax.serve.quantize_weights import ROWS, SHARED, contracted
from r1jax.tasks.task import Task
from r1jax.train.flops import work_of
from r1jax.train.quantized import path_of, rows_of

MOST = 0.5
"""Share of bytes, and of FLOPs where products are meant, above which a model may bear the name of a type."""


class Layer(NamedTuple):
    """One ruled weight."""

    name: str
    role: str
    scheme: str
    numbers: int
    bytes: int
    """Of codes and scales, before they are packed."""
    inputs: str
    """"balanced" where they are divided by powers of two, "static" where one range holds for all."""
    error: float
    """Of the weight: norm of the change over norm of the weight."""
    snr_db: float | None
    """Of its outputs on calibration inputs; None where they are not formed one by one (experts, lookups, fields)."""


class Sizes(NamedTuple):
    """Bytes and shares of the whole model."""

    fp32_bytes: int
    file_bytes: int
    """Of the whole checkpoint folder."""
    low_bit_bytes: float
    """Share of codes in what is served."""
    low_bit_flops: float
    """Share of the forward pass whose products are of codes on both sides."""


class Effect(NamedTuple):
    """The task's score of the same cases before and after, higher is better."""

    before: float
    after: float
    change: float
    low: float
    """Of the 95 % interval of the change, cases resampled in pairs."""
    high: float
    cases: int


def name_of(scheme: Scheme) -> str:
    """A scheme in the words of a rule."""
    block = f"/{scheme.block}" if scheme.block else ""
    return ":".join([f"{scheme.weights}{block}", *([scheme.activations] if scheme.activations else [])])


def layer_errors(
    model: R1,
    task: Task,
    params: Any,
    batch: dict[str, Any],
    chosen: dict[str, tuple[Use, Scheme]],
    codes: dict[str, Quantized],
) -> list[Layer]:
    """Compares each weight, and its outputs on the inputs that it meets in the float model, with what codes give.

    Args:
      model: Of floats.
      task: Prepares the batch.
      params: Weights.
      batch: Calibration cases.
      chosen: Ruled weights and their schemes.
      codes: Of each.

    Returns:
      A row for each weight, in the order of the model.
    """
    held = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def run(params: Any, batch: dict[str, Any], codes: dict[str, Quantized]) -> dict[str, tuple[Array, Array]]:
        flat = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
        found: dict[str, tuple[Array, Array]] = {}

        def note(use: Use) -> None:
            if use.name not in codes or use.inputs is None or use.role not in SHARED:
                return
            x, weight = contracted(use), rows_of(flat[use.name], use)
            x = x[:: -(-len(x) // ROWS)]
            exact = jnp.einsum("RI,OI->RO", x, weight.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            change = quantized_dot(x, codes[use.name], chosen[use.name][1]) - exact
            found[use.name] = jnp.sum(exact**2), jnp.sum(change**2)

        with observing(note):
            model.apply({"params": params}, task.prepare(batch)[0], language=task.language)
        return found

    powers = jax.device_get(jax.jit(run)(params, batch, codes))
    rows = []
    for name, (use, scheme) in chosen.items():
        weight, q = np.asarray(rows_of(held[name], use), np.float64), codes[name]
        error = np.linalg.norm(weight - np.asarray(dequantize(q), np.float64)) / max(np.linalg.norm(weight), 1e-30)
        snr = None
        if name in powers:
            signal, noise = (max(float(x), 1e-30) for x in powers[name])
            snr = 10 * float(np.log10(signal / noise))
        told = {"balanced": q.balance, "static": q.span}
        inputs = " ".join(word for word, part in told.items() if part is not None)
        size = code_bytes(q, scheme)
        rows.append(Layer(name, use.role, name_of(scheme), weight.size, size, inputs, float(error), snr))
    return rows


def code_bytes(q: Quantized, scheme: Scheme) -> int:
    """Bytes of codes, of int4 half a byte each, of scales, and of what goes with them."""
    values = -(-q.values.size // 2) if scheme.weights == "int4" else q.values.size
    more = (0 if q.balance is None else q.balance.size) + (0 if q.span is None else 4)
    return values + 2 * q.scale.size * (1 if q.zero is None else 2) + more


def sizes(
    folder: Path,
    params: Any,
    layers: list[Layer],
    chosen: dict[str, tuple[Use, Scheme]],
    model: R1,
    task: Task,
    batch: dict[str, Any],
) -> Sizes:
    """Sizes of the checkpoint, and how much of the model is low-bit.

    Args:
      folder: The sealed checkpoint.
      params: Float weights.
      layers: From `layer_errors`.
      chosen: Ruled weights and their schemes.
      model: The model.
      task: The task.
      batch: Any collated batch, the one that `chosen` was found with.

    Returns:
      The sizes.
    """
    numbers = sum(x.size for x in jax.tree.leaves(params))
    files = [path for path in folder.rglob("*") if path.is_file() and "report" not in path.relative_to(folder).parts]
    low = sum(layer.bytes for layer in layers)
    rest = 4 * (numbers - sum(layer.numbers for layer in layers))
    narrow = sum(products(use, model) for use, scheme in chosen.values() if scheme.activations)
    total = sum(term.forward for term in work_of(model.config, task, batch).terms) / 2
    return Sizes(4 * numbers, sum(p.stat().st_size for p in files), low / (low + rest), min(narrow / total, 1.0))


def products(use: Use, model: R1) -> float:
    """Multiply-adds of a weight in the forward pass of the batch with which it was found."""
    size = int(np.prod(use.shape))
    if use.role == "experts":
        decoder = model.config.decoder
        rows = int(np.prod(use.inputs.shape[:-1]))
        return rows * decoder.num_experts_per_tok * size / decoder.n_routed_experts
    rows = 0 if use.inputs is None else int(np.prod(use.inputs.shape[:-1]))
    return rows * size / (use.shape[0] if use.role == "fields" else 1)


def verdict(name: str, found: Sizes) -> str:
    """What the model may be called: a type's name only where most of it is of that type.

    Args:
      name: What it was to be.
      found: Its sizes.

    Returns:
      The name, or why not.
    """
    shares = f"{found.low_bit_bytes:.1%} of its bytes and {found.low_bit_flops:.1%} of its FLOPs are low-bit"
    if found.low_bit_bytes <= MOST:
        return f"not {name}: only {shares}"
    if found.low_bit_flops <= MOST:
        return f"{name} weights alone: {shares}"
    return f"{name}: {shares}"


Score = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], float | None]
"""From outcomes and targets of cases; higher is better, None where nothing can be judged."""


def score_of(task: Task) -> Score:
    """The number by which a task's best checkpoint is kept."""
    return lambda found, targets: task.score(task.figures(found, targets))


def effect(
    scored: Score,
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    targets: dict[str, np.ndarray],
    resamples: int,
) -> Effect | None:
    """The task's score before and after, and the interval of its change.

    Args:
      scored: The task's score.
      before: Outcomes of the float model, cases first.
      after: Those of the quantized model, of the same cases.
      targets: Of these cases.
      resamples: Bootstrap resamples; both models are scored on the same cases of each.

    Returns:
      The effect; None where the cases cannot be scored.
    """

    def score(found: dict[str, np.ndarray], rows: np.ndarray) -> float | None:
        taken, known = ({k: v[rows] for k, v in group.items()} for group in (found, targets))
        return scored(taken, known)

    count = len(next(iter(targets.values())))
    every, rng = np.arange(count), np.random.default_rng(0)
    whole = score(before, every), score(after, every)
    if None in whole:
        return None
    changes = []
    for _ in range(resamples):
        rows = rng.integers(0, count, count)
        pair = score(before, rows), score(after, rows)
        if None not in pair:  # a resample without any case of one class has no score
            changes.append(pair[1] - pair[0])
    low, high = np.quantile(changes, [0.025, 0.975]) if changes else (np.nan, np.nan)
    return Effect(*whole, whole[1] - whole[0], float(low), float(high), count)


def table(layers: list[Layer], found: Sizes, called: str, measured: Effect | None) -> str:
    """The report as text.

    Args:
      layers: From `layer_errors`.
      found: From `sizes`.
      called: From `verdict`.
      measured: From `effect`.

    Returns:
      Lines.
    """
    width = max(len(layer.name) for layer in layers)
    lines = [f"{'weight':{width}}  {'scheme':12} {'bytes':>10} {'error':>8} {'output SNR':>11}  inputs"]
    for layer in layers:
        snr = "" if layer.snr_db is None else f"{layer.snr_db:8.1f} dB"
        line = f"{layer.name:{width}}  {layer.scheme:12} {layer.bytes:>10,} {layer.error:8.2%} {snr:>11}"
        lines.append(f"{line}  {layer.inputs}".rstrip())
    lines += [
        "",
        f"size      {found.file_bytes:,} bytes, {found.fp32_bytes / found.file_bytes:.2f} times smaller than fp32",
        f"model     {called}",
    ]
    if measured is None:
        return "\n".join([*lines, "score     the validation cases cannot be scored"])
    return "\n".join(
        [
            *lines,
            f"score     {measured.before:.4f} -> {measured.after:.4f} on {measured.cases} validation cases, change "
            f"{measured.change:+.4f} (95 % interval {measured.low:+.4f} to {measured.high:+.4f}, paired)",
        ]
    )


def write_report(
    folder: Path, layers: list[Layer], found: Sizes, called: str, measured: Effect | None, budget: dict[str, Any]
) -> None:
    """Writes report.json and layers.svg; arguments as in `table`, after the folder, which is made.

    Args:
      folder: The report's.
      layers: As in `table`, like the next three.
      found: Sizes.
      called: What the model is.
      measured: The score before and after.
      budget: What each weight could have become, {} where nothing was chosen by size.
    """
    folder.mkdir(exist_ok=True)
    content = {
        "model": called,
        "sizes": found._asdict(),
        "score": None if measured is None else measured._asdict(),
        "layers": [layer._asdict() for layer in layers],
        **({"budget": budget} if budget else {}),
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "layers.svg").write_bytes(_chart(layers))


def _chart(layers: list[Layer]) -> bytes:
    """Bars of the error of each weight, the worst in reading order of the model."""
    out = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "r1jax", "font.size": 7}):
        figure = Figure(figsize=(8, 1 + 0.14 * len(layers)), layout="constrained")
        axes = figure.subplots()
        axes.barh([layer.name for layer in layers], [layer.error for layer in layers])
        axes.invert_yaxis()
        axes.set(xlabel="relative error of the weight", xscale="log")
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
