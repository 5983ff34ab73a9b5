"""How rare each n-gram is in the training part, which a fresh run measures before its first step."""

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
CHUNK = 256


def with_rarity(state: TrainState, config: Config, task: Task, source: Source) -> TrainState:
    """Puts the inverse document frequencies of the training texts into a fresh state.

    Args:
      state: Fresh, on its devices.
      config: How many buckets.
      task: Turns cases into what the model reads.
      source: Training cases.

    Returns:
      The state; as it is, where the model reads no n-grams.
    """
    if "ngrams" not in state.params:
        return state
    measured = rarity(task, source, config.model.text_ngrams)

    def put(tree: dict) -> dict:
        old = tree["ngrams"][RARITY]
        new = jax.device_put(measured.astype(old.dtype), old.sharding)
        return tree | {"ngrams": tree["ngrams"] | {RARITY: new}}

    return state._replace(params=put(state.params), ema=put(state.ema) if state.ema else {})


def rarity(task: Task, source: Source, buckets: int) -> Float32[np.ndarray, " buckets"]:
    """ln((1 + N) / (1 + n)) + 1 of each bucket with n > 0 of the N texts, as scikit-learn's TF-IDF has it, and else 0.

    Args:
      task: Turns cases into what the model reads.
      source: Training cases.
      buckets: How many numbers n-grams have.

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
    return np.where(found > 0, np.log((1 + texts) / (1 + found)) + 1, 0).astype(np.float32)
