"""How the next token is chosen from logits: Hugging Face's processors as pure functions, in its order."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax.arguments import GenerationSettings


def penalise_repetition(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Makes tokens that were there before less probable (Keskar et al. 2019).

    Args:
      logits: Scores.
      seen: Tokens of the prompt and of the answer so far.
      penalty: Divides positive scores and multiplies negative ones; 1 changes nothing.

    Returns:
      Scores.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Sets all but the k highest scores to -inf; scores equal to the k-th stay.

    Args:
      logits: Scores.
      k: How many stay; V or more changes nothing.

    Returns:
      Scores.
    """
    if k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps the fewest most probable tokens whose probabilities sum to p or more (Holtzman et al. 2020).

    Args:
      logits: Scores.
      p: Above 0 and at most 1; 1 changes nothing. The most probable token always stays.

    Returns:
      Scores, -inf where a token is dropped.
    """
    if p >= 1:
        return logits
    order = jnp.argsort(logits, axis=-1)  # least probable first, as Hugging Face sums them
    below = jnp.cumsum(jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1), axis=-1)
    dropped = (below <= 1 - p).at[:, -1].set(False)
    dropped = jnp.take_along_axis(dropped, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(dropped, -jnp.inf, logits)


def keep_min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Drops tokens less probable than p times the most probable one (Nguyen et al. 2024).

    Args:
      logits: Scores.
      p: From 0, which changes nothing, to below 1.

    Returns:
      Scores, -inf where a token is dropped.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probs < p * jnp.max(probs, axis=-1, keepdims=True), -jnp.inf, logits)


def process_logits(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, settings: GenerationSettings
) -> Float[Array, "B V"]:
    """Applies the settings in Hugging Face's order: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
      logits: Scores of the next token, fp32.
      seen: Tokens of the prompt and of the answer so far; needed for a penalty other than 1.
      settings: What to apply; at temperature 0 only the penalty is.

    Returns:
      Scores whose softmax is drawn from.
    """
    if settings.repetition_penalty != 1:
        assert seen is not None
        logits = penalise_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits
    logits = logits / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    logits = keep_top_p(logits, settings.top_p)
    return keep_min_p(logits, settings.min_p) if settings.min_p else logits


def draw(
    logits: Float[Array, "B V"], key: Key[Array, ""], rows: Int[Array, " B"], steps: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Draws one token a row; the draw depends on key, row number and step, never on the rest of the batch.

    Args:
      logits: Processed scores.
      key: One key for all rows and steps.
      rows: Number of each row, by which it keeps its draws in another batch.
      steps: How many tokens the row has got already.

    Returns:
      int32 tokens.
    """

    def one(scores: Float[Array, " V"], row: Int[Array, ""], step: Int[Array, ""]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), step), scores)

    return jax.vmap(one)(logits, rows, steps).astype(jnp.int32)
