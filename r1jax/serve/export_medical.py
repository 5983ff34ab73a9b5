"""The export of a medical checkpoint: from HU, record and text to findings and calls at the operating thresholds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r1jax.models.r1 import R1
from r1jax.serve.export_graph import Graph, Held, Limits, Port, constants, text_inputs, text_ports, tokenize
from r1jax.serve.export_texts import report_texts
from r1jax.serve.scored import Points, Scored, frozen_points, score
from r1jax.tasks.medical import batch as b
from r1jax.tasks.medical.modes import MODES, shown_modes
from r1jax.tasks.medical.schema import FINDING, RECORD_FIELDS
from r1jax.tasks.medical.task import Medical
from r1jax.tasks.medical.wording import NOTICE, SYNTHETIC
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.evaluation import Evaluator

LOW_HU, GREY_HU = b.HU_WINDOW[0], (b.HU_WINDOW[1] - b.HU_WINDOW[0]) / 255
"""HU of grey value 0, and of each step above it."""
CALL = "call."
"""Begins the names of the outputs that say whether a binary finding is called present."""
BATCH = 32


class MedicalExport:
    """What is exported of a medical checkpoint (an `Exported`), and what the checkpoint says of the cases.

    Attributes:
      scored: Predictions in every mode, in the checkpoint's own precision.
      operating: Operating points that validation set, which are in the graph.
    """

    notice = NOTICE
    batch = BATCH
    generated = f"Trained on generated cases. {SYNTHETIC}"

    def __init__(self, checkpoint: Checkpoint, evaluator: Evaluator, params: Any, source: Any) -> None:
        """Has the checkpoint predict the cases.

        Args:
          checkpoint: The checkpoint.
          evaluator: Compiled forward pass of its config.
          params: Weights to serve.
          source: The cases.

        Raises:
          UserError: A prediction is not finite.
        """
        task, validation, self.source = evaluator.task, checkpoint.meta()["validation"], source
        self.scored: Scored = score(evaluator, task, params, source, validation, BATCH)
        reads = task.config.model.modalities
        self.operating: Points = frozen_points(validation, task, shown_modes(reads, reads))
        self._frozen = self.operating | self.scored.frozen
        modes = shown_modes(reads, source.schema.modalities)
        self._modes = {shown: MODES[mode] for mode, shown in modes.items()}
        self.shown = tuple(self._modes)
        self.decided = tuple(name for name in self.scored.predicted[self.shown[0]] if FINDING[name].kind == "binary")
        given = {item.name: item.shape for item in source.schema.fields}
        read = {name: getattr(task.config.model, name).size for name in b.PICTURES if name in reads}
        self.ports = ports(task, {name: tuple(given.get(name, size)) for name, size in read.items()})

    @staticmethod
    def chosen(source: Any, count: int) -> np.ndarray:
        """The first cases."""
        return np.arange(min(count, len(source)))

    def graph(self, task: Medical, model: R1, params: Any) -> Graph:
        """As `exported_graph`, with the operating points of the checkpoint."""
        return exported_graph(task, model, params, self.operating)

    def inputs(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """As `raw_inputs`."""
        return raw_inputs(raw, self.ports)

    def hidden(self, inputs: dict[str, np.ndarray], shown: str) -> dict[str, np.ndarray]:
        """The same cases without their pictures or their record."""
        mode, changed = self._modes[shown], dict(inputs)
        for name, values in inputs.items():
            if mode["hide_images"] and name.startswith("has_"):
                changed[name] = np.zeros_like(values)
            elif mode["hide_record"] and name in ("table", "text", "text_bytes"):
                changed[name] = np.full_like(values, np.nan if name == "table" else 0)
        return changed

    def held(
        self, shown: str, raw: dict[str, Any], rows: np.ndarray, found: dict[str, np.ndarray], limits: Limits
    ) -> dict[str, Held]:
        """Every finding; the calls of the binary ones are decisions."""
        thresholds = [self._thresholds(raw, row, self._modes[shown]) for row in range(len(rows))]
        held = {}
        for name, values in self.scored.predicted[shown].items():
            kind = FINDING[name].kind
            allowed = {"binary": limits.probability, "rating": limits.level}.get(kind, limits.mm)
            theirs, ours = values[rows].astype(np.float64), found[name].astype(np.float64)
            difference = np.nan_to_num(np.abs(ours - theirs), nan=np.inf)
            if kind == "binary":
                threshold = np.array([point.get(name, np.nan) for point in thresholds])
                same = (found[CALL + name] == 1) == (theirs >= threshold)
                same |= np.abs(theirs - threshold) <= limits.near
            elif kind == "rating":
                same = ours.argmax(axis=1) == theirs.argmax(axis=1)
            else:
                same = difference.reshape(len(difference), -1).max(axis=1) <= limits.mm
            held[name] = Held(kind, difference, allowed, same, kind == "binary")
        return held

    def _thresholds(self, raw: dict[str, Any], row: int, mode: dict[str, bool]) -> dict[str, float]:
        """The operating thresholds of a case that is shown in a mode, as its report takes them."""
        scored, missing = self.scored, set(self.scored.missing(raw, row))
        missing |= {name for name in scored.reads if mode["hide_images" if name in b.PICTURES else "hide_record"]}
        points = self._frozen[scored.mode_of(tuple(missing))]
        return {name: point.threshold for name, point in points.items()}

    def points(self) -> dict[str, dict[str, Any]]:
        """By mode, then by finding."""
        return {
            mode: {name: point.model_dump() for name, point in named.items()} for mode, named in self.operating.items()
        }

    def needs(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def texts(self) -> dict[str, Any]:
        """As `report_texts`."""
        return report_texts()


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
    return found | (text_ports(model.text_tokens) if "text" in model.modalities else {})


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
            found |= text_inputs(raw.get("text", [""] * count), port)
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
    mode = {name: jnp.asarray(hidden) for name, hidden in MODES["both"].items()}

    def graph(inputs: dict[str, Array]) -> dict[str, Array]:
        read = functools.partial(model.apply, {"params": constants(params)})
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
    scale = jnp.broadcast_to(jnp.asarray([field.scale for field in RECORD_FIELDS], jnp.float32)[None], table.shape)
    # Behind a barrier they are no constants, for which XLA would multiply by the inverse: the last bit is the host's.
    scale = jax.lax.optimization_barrier(scale)
    return {"table": (table - center) / scale, "has_table": ~jnp.all(jnp.isnan(table), axis=1)}


def _threshold(name: str, batch: dict[str, Array], points: Points) -> Float[Array, " B"]:
    """Operating threshold of each case, by what it has; NaN, which nothing reaches, where none is known."""
    pictures = [batch[f"has_{picture}"] for picture in b.PICTURES if picture in batch]
    records = [batch["has_table"]] if "table" in batch else []
    records += [batch["text_valid"][:, 0]] if "text" in batch else []
    main = next(iter(points))

    def of(mode: str) -> Float[Array, ""]:
        point = points.get(mode, points[main]).get(name)
        return jnp.asarray(np.nan if point is None else at_least(point.threshold), jnp.float32)

    if not (pictures and records):
        return jnp.broadcast_to(of(main), next(iter(batch.values())).shape[:1])
    has_picture, has_record = (functools.reduce(jnp.logical_or, flags) for flags in (pictures, records))
    alone = jnp.where(has_picture, of("image_only"), of("record_only"))
    return jnp.where(has_picture & has_record, of("both"), alone)


def at_least(threshold: float) -> np.float32:
    """The least fp32 number that reaches a threshold, so that fp32 decides as reports do in fp64.

    A threshold lies midway between two scores, and where these follow each other fp32 may round it to the lower.
    """
    near = np.float32(threshold)
    return near if float(near) >= threshold else np.nextafter(near, np.float32(np.inf))
