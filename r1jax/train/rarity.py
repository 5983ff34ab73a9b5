"""How rare each n-gram is in the training part, which a fresh run measures before its first step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

from r1jax.config import Config
from r1jax.data.source import Source
from r1jax.models.ngrams import RARITY, different
from r1jax.ops.ngrams import hashed_ngrams
from r1jax.tasks.task import Task
from r1jax.train.step import TrainState

MOST = 2**13
"""Cases that are read, evenly spaced where there are more."""
CHUNK = 64
"""Cases that are read at once; some have pictures beside their texts."""


def with_rarity(
    state: TrainState, config: Config, task: Task, source: Source, seen: Callable[[], None] = lambda: None
) -> TrainState:
    """Puts the inverse document frequencies of the training texts into a fresh state.

    Args:
      state: Fresh, on its devices.
      config: How many buckets.
      task: Turns cases into what the model reads.
      source: Training cases.
      seen: Is called after each part of the texts.

    Returns:
      The state; as it is, where the model reads no n-grams, or learns nothing of them beside adapters.
    """
    if "ngrams" not in state.params or (config.train.init and config.model.lora_rank):
        return state
    measured = rarity(task, source, config.model.text_ngrams, seen)
    return _put(state, lambda old: jax.device_put(measured.astype(old.dtype), old.sharding))


def with_known(state: TrainState, measured: Float32[Array, " buckets"]) -> TrainState:
    """Gives n-grams that the run whose weights were taken never saw the weights that were measured for this one.

    They would stay 0, so that nothing could be learned of what only the new training part says.

    Args:
      state: With the weights of another run, which stay where they are not 0.
      measured: Those that `with_rarity` put into the fresh state.

    Returns:
      The state.
    """
    return _put(state, lambda old: jax.device_put(jnp.where(old > 0, old, measured), old.sharding))


def _put(state: TrainState, change: Callable[[jax.Array], jax.Array]) -> TrainState:
    """The state with other weights of n-grams, also in its average."""

    def put(tree: dict) -> dict:
        return tree | {"ngrams": tree["ngrams"] | {RARITY: change(tree["ngrams"][RARITY])}}

    return state._replace(params=put(state.params), ema=put(state.ema) if state.ema else {})


def rarity(
    task: Task, source: Source, buckets: int, seen: Callable[[], None] = lambda: None
) -> Float32[np.ndarray, " buckets"]:
    """ln((1 + N) / (1 + n)) + 1 of each bucket that is in n of the N texts, as scikit-learn's TF-IDF has it.

    Where every text was read, a bucket that is in none has 0: it says nothing. Else other texts may have it.

    Args:
      task: Turns cases into what the model reads.
      source: Training cases.
      buckets: How many numbers n-grams have.
      seen: Is called after each part of the texts.

    Returns:
      The weight of each number.
    """

    @jax.jit
    def count(text: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Int[Array, " buckets"]:
        ids, once = different(*hashed_ngrams(text, valid, buckets), buckets)
        return jnp.zeros(buckets, jnp.int32).at[ids.reshape(-1)].add(once.reshape(-1).astype(jnp.int32))

    rows = np.linspace(0, len(source) - 1, min(len(source), MOST)).astype(np.int64)
    found, texts = np.zeros(buckets, np.int64), 0
    for first in range(0, len(rows), CHUNK):
        batch = task.collate(source.read_batch(rows[first : first + CHUNK]))
        text, valid = batch["text"], batch["text_valid"]
        texts += int(valid.any(axis=1).sum())
        short = ((0, CHUNK - len(text)), (0, 0))  # one shape, one program
        found += np.asarray(count(np.pad(text, short), np.pad(valid, short)))
        seen()
    known = (found > 0) | (len(rows) < len(source))
    return np.where(known, np.log((1 + texts) / (1 + found)) + 1, 0).astype(np.float32)
