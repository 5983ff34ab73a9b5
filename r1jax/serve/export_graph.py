"""One function from a raw case to its findings and calls: preprocessing, model with its weights, thresholds."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from r1jax.data import tokenizer
from r1jax.models.r1 import R1
from r1jax.serve.scored import Points
from r1jax.tasks.medical import batch as b
from r1jax.tasks.medical.modes import MODES
from r1jax.tasks.medical.schema import FINDING, RECORD_FIELDS
from r1jax.tasks.medical.task import Medical

Graph = Callable[[dict[str, Array]], dict[str, Array]]
LOW_HU, GREY_HU = b.HU_WINDOW[0], (b.HU_WINDOW[1] - b.HU_WINDOW[0]) / 255
"""HU of grey value 0, and of each step above it."""
CALL = "call."
"""Begins the names of the outputs that say whether a binary finding is called present."""


class Port(NamedTuple):
    """One array that goes into the graph."""

    shape: tuple[int, ...]
    """Without the batch."""
    dtype: str
    unit: str
    meaning: str


def ports(task: Medical, sizes: dict[str, tuple[int, ...]]) -> dict[str, Port]:
    """Describes what the graph reads.

    Args:
      task: The task.
      sizes: Voxels of each picture as the cases come, before they are cropped or padded to what the model reads.

    Returns:
      By name.
    """
    model, found = task.config.model, {}
    for name in b.PICTURES:
        if name in model.modalities:
            rank = len(getattr(model, name).size)
            axes = "z, y, x"[-3 * rank + 2 :]
            found[name] = Port(sizes[name], "float32", "HU", f"Hounsfield units, axes {axes}; anything where missing")
            found[f"{name}_spacing"] = Port((rank,), "float32", "mm", f"edges of a voxel, {axes}; 1 where missing")
            found[f"has_{name}"] = Port((), "bool", "1", f"whether the case has the {name}")
    if "table" in model.modalities:
        fields = ", ".join(f"{field.name} ({field.unit})" for field in RECORD_FIELDS)
        found["table"] = Port((len(RECORD_FIELDS),), "float32", "see meaning", f"record, NaN where unknown: {fields}")
    if "text" in model.modalities:
        length = model.text_tokens - 1
        found["text"] = Port((length,), "int32", "1", f"first {length} UTF-8 bytes of the record's text, then zeros")
        found["text_bytes"] = Port((), "int32", "bytes", "length of the whole text, 0 where it is missing")
    return found


def raw_inputs(raw: dict[str, Any], wanted: dict[str, Port]) -> dict[str, np.ndarray]:
    """Turns a source's batch into what the graph reads; all that is left to the host.

    Args:
      raw: What `Source.read_batch` returned.
      wanted: From `ports`.

    Returns:
      Arrays with a leading batch axis.
    """
    count, found = len(raw["case_id"]), {}
    for name, port in wanted.items():
        if name == "text":
            encoded = [text.encode("utf-8") for text in raw.get("text", [""] * count)]
            found["text_bytes"] = np.array([len(text) for text in encoded], np.int32)
            rows = [list(text[: port.shape[0]].ljust(port.shape[0], b"\0")) for text in encoded]
            found["text"] = np.array(rows, np.int32).reshape(count, *port.shape)
        elif name.startswith("has_"):
            found[name] = np.asarray(raw.get(name, np.full(count, name.removeprefix("has_") in raw)), bool)
        elif name in b.PICTURES:
            picture = raw.get(name, np.zeros((count, *port.shape), np.int16))
            grey = picture.dtype == np.uint8
            picture = picture.astype(np.float32)
            found[name] = picture * np.float32(GREY_HU) + np.float32(LOW_HU) if grey else picture
        elif name != "text_bytes":
            missing = np.nan if name == "table" else 1.0
            found[name] = np.asarray(raw.get(name, np.full((count, *port.shape), missing)), np.float32)
    return found


def exported_graph(task: Medical, model: R1, params: Any, points: Points) -> Graph:
    """Puts everything between a raw case and its calls into one function of arrays.

    Args:
      task: The task.
      model: The model.
      params: Its weights, which become constants of the graph.
      points: Operating points by reported mode, then by finding.

    Returns:
      (arrays of `ports` with a leading batch axis) -> predictions by finding, and `call.FINDING` of each binary one:
      1 at or above the threshold of what the case has, else 0.
    """
    read = functools.partial(model.apply, {"params": jax.tree.map(jnp.asarray, params)})
    mode = {name: jnp.asarray(hidden) for name, hidden in MODES["both"].items()}

    def graph(inputs: dict[str, Array]) -> dict[str, Array]:
        batch = {name: x for name, x in inputs.items() if name not in ("table", "text", "text_bytes")}
        if "table" in inputs:
            batch |= standardise(inputs["table"])
        if "text" in inputs:
            batch["text"], batch["text_valid"] = tokenize(inputs["text"], inputs["text_bytes"])
        found = task.outcomes(read, batch, mode)
        binary = [name for name in found if FINDING[name].kind == "binary"]
        calls = {CALL + name: found[name] >= _threshold(name, batch, points) for name in binary}
        return found | {name: call.astype(jnp.int32) for name, call in calls.items()}

    return graph


def standardise(table: Float[Array, "B F"]) -> dict[str, Array]:
    """Brings record fields to order one, as `collate` does on the host, and says which cases have any."""
    center = jnp.asarray([field.center for field in RECORD_FIELDS], jnp.float32)[None]
    scale = jnp.asarray([field.scale for field in RECORD_FIELDS], jnp.float32)[None]
    return {"table": (table - center) / scale, "has_table": ~jnp.all(jnp.isnan(table), axis=1)}


def tokenize(text: Int[Array, "B n"], length: Int[Array, " B"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Byte-level tokens as `tokenizer.encode_batch` gives them, T = n + 1.

    Args:
      text: UTF-8 bytes.
      length: Bytes of the whole text.

    Returns:
      Tokens, and which of them exist.
    """
    place, last = jnp.arange(text.shape[1] + 1)[None], length[:, None] + 1
    start = jnp.full_like(text[:, :1], tokenizer.BOS)
    tokens = jnp.concatenate([start, text + tokenizer.OFFSET], axis=1)
    valid = (place <= last) & (length[:, None] > 0)
    tokens = jnp.where(place == last, tokenizer.EOS, tokens)
    return jnp.where(valid, tokens, tokenizer.PAD), valid


def _threshold(name: str, batch: dict[str, Array], points: Points) -> Float[Array, " B"]:
    """Operating threshold of each case, by what it has; NaN, which nothing reaches, where none is known."""
    pictures = [batch[f"has_{picture}"] for picture in b.PICTURES if picture in batch]
    records = [batch["has_table"]] if "table" in batch else []
    records += [batch["text_valid"][:, 0]] if "text" in batch else []
    main = next(iter(points))

    def of(mode: str) -> Float[Array, ""]:
        point = points.get(mode, points[main]).get(name)
        return jnp.asarray(np.nan if point is None else point.threshold, jnp.float32)

    if not (pictures and records):
        return jnp.broadcast_to(of(main), next(iter(batch.values())).shape[:1])
    has_picture, has_record = (functools.reduce(jnp.logical_or, flags) for flags in (pictures, records))
    alone = jnp.where(has_picture, of("image_only"), of("record_only"))
    return jnp.where(has_picture & has_record, of("both"), alone)
