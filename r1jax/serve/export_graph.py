"""What is exported, whatever the task: ports, one function of arrays, and what holds its outputs to the checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from r1jax.data import tokenizer
from r1jax.data.source import Source
from r1jax.models.r1 import R1
from r1jax.ops.quantize import pack_int4
from r1jax.tasks.task import Task
from r1jax.train.quantized import is_codes

Graph = Callable[[dict[str, Array]], dict[str, Array]]
"""Arrays of the ports with a leading batch axis -> arrays by output, cases first."""


class Port(NamedTuple):
    """One array that goes into the graph."""

    shape: tuple[int, ...]
    """Without the batch."""
    dtype: str
    unit: str
    meaning: str


@dataclass(frozen=True)
class Limits:
    """Largest differences that are let through.

    Attributes:
      probability: Of a probability on which a call or a band hangs.
      level: Of that of a level of a rating, on which none does.
      mm: Of lengths and positions.
      near: A decision may differ where the checkpoint's probability is this close to the threshold.
    """

    probability: float
    level: float
    mm: float
    near: float = 0.0


class Held(NamedTuple):
    """How an output of some cases compares to what the checkpoint says."""

    kind: str
    difference: Float[np.ndarray, "n ..."]
    limit: float
    """Of the difference."""
    same: Bool[np.ndarray, " n"]
    """Whether it comes to the same."""
    decides: bool
    """Whether that is a decision: all of a case are counted together."""


@runtime_checkable
class Exported(Protocol):
    """What a task says of its export; command, gate and card know no more of it.

    Attributes:
      source: The cases that the export is compared on.
      batch: Cases that the checkpoint read at once.
      ports: What the graph reads.
      shown: Names of the ways to show a case, the one that shows all first.
      decided: Names of the outputs, probabilities, on which calls hang.
      notice: What the model is not.
      generated: Said of a model that was trained on generated cases.
    """

    source: Source
    batch: int
    ports: dict[str, Port]
    shown: tuple[str, ...]
    decided: tuple[str, ...]
    notice: str
    generated: str

    def graph(self, task: Task, model: R1, params: Any) -> Graph:
        """Everything between a raw case and its calls as one function of arrays.

        Args:
          task: The task, of the config that is exported.
          model: The model of that config.
          params: Its weights, which become constants of the graph.

        Returns:
          The graph.
        """
        ...

    def inputs(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """A source's batch as the graph reads it; all that is left to the host."""
        ...

    def hidden(self, inputs: dict[str, np.ndarray], shown: str) -> dict[str, np.ndarray]:
        """The inputs of the same cases, shown in one of the ways."""
        ...

    def held(
        self, shown: str, raw: dict[str, Any], rows: np.ndarray, found: dict[str, np.ndarray], limits: Limits
    ) -> dict[str, Held]:
        """Compares what an artefact says of some cases.

        Args:
          shown: How they were shown.
          raw: Their batch.
          rows: Which cases of `source` they are.
          found: Outputs of the artefact.
          limits: What may differ.

        Returns:
          By what is predicted.
        """
        ...

    def points(self) -> dict[str, dict[str, Any]]:
        """Operating points in the graph, by the way a case is shown; JSON."""
        ...

    def needs(self) -> dict[str, Any]:
        """What the host must know beside the ports; JSON for the card."""
        ...

    def texts(self) -> dict[str, Any]:
        """What a device fills its reports from; JSON."""
        ...


class GroupedCodes(NamedTuple):
    """Codes of a weight, in groups that have one scale each."""

    kind: str
    """int8 or int4."""
    groups: Int[np.ndarray, "G b"]
    """The last group of each row is filled up with zeros where it is shorter."""
    scale: Float[np.ndarray, " G"]
    row: int
    """Numbers of a row."""


def constants(params: Any) -> Any:
    """Weights as constants of the program that is being traced; codes stay as narrow as they are.

    Args:
      params: Arrays and codes; of codes of 4 bits, which are JAX's own type, the program holds two a byte.

    Returns:
      What the model is applied with. A barrier keeps compilers from widening codes ahead of time, which would cost
      memory, and from computing with other roundings than the checkpoint's own program, which is given its weights.
    """

    def constant(x: Any) -> Any:
        if not is_codes(x):
            return jnp.asarray(x)
        if x.values.dtype == jnp.float32:
            return jax.tree.map(jnp.asarray, x)
        if x.values.dtype != jnp.int4:
            return jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, x))
        packed = x._replace(values=jnp.asarray(pack_int4(np.asarray(x.values))))
        held = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, packed))
        halves = jnp.stack([held.values & 0xF, held.values >> 4], axis=-1).reshape(-1)[: x.values.size]
        return held._replace(values=((halves ^ 8).astype(jnp.int8) - 8).reshape(x.values.shape))

    return jax.tree.map(constant, params, is_leaf=is_codes)


def text_ports(tokens: int) -> dict[str, Port]:
    """Ports of a text that the model reads in so many tokens, of which the first marks the beginning."""
    length = tokens - 1
    return {
        "text": Port((length,), "int32", "1", f"first {length} UTF-8 bytes of the text, then zeros"),
        "text_bytes": Port((), "int32", "bytes", "length of the whole text, 0 where it is missing"),
    }


def text_inputs(texts: Sequence[str], port: Port) -> dict[str, np.ndarray]:
    """The host's part of reading texts.

    Args:
      texts: One a case, empty where it is missing.
      port: Of `text_ports`.

    Returns:
      "text" and "text_bytes".
    """
    (length,) = port.shape
    encoded = [text.encode("utf-8") for text in texts]
    rows = [list(text[:length].ljust(length, b"\0")) for text in encoded]
    return {
        "text": np.array(rows, np.int32).reshape(len(encoded), length),
        "text_bytes": np.array([len(text) for text in encoded], np.int32),
    }


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
