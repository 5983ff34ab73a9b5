"""Losses of text: the next token, and with MTP the one after it (DeepSeek-V3, section 2.2)."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import TaskConfig
from r1jax.models.r1 import Output
from r1jax.ops.linear_cross_entropy import linear_cross_entropy


def counted(
    text: Int[Array, "B T"], valid: Bool[Array, "B T"], end: int | None = None
) -> tuple[Float[Array, "B S"], Float[Array, "B U"]]:
    """Which tokens are to be predicted: those that exist, from no further back than their own document.

    Args:
      text: Tokens.
      valid: Which of them exist.
      end: Token that ends a document; None where a row is one text.

    Returns:
      1 or 0 for the tokens 1 to T - 1, predicted from the one before, and for 2 to T - 1, from the two before.
    """
    # A token counts unless the one before it ends a document; nothing before the first document is known.
    inside = valid if end is None else valid & jnp.pad(text[:, :-1] != end, ((0, 0), (1, 0)))
    inside = inside.astype(jnp.float32)
    return inside[:, 1:], inside[:, 2:] * inside[:, 1:-1]


def text_losses(
    output: Output,
    text: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    end: int | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    totals: Sequence[Float[Array, ""]] | None = None,
) -> list[Float[Array, ""]]:
    """Mean loss of the next token and, if MTP ran, of the token after it (equation 24).

    Args:
      output: With the states of the text.
      text: Tokens.
      valid: Which of them exist.
      end: Token that ends a document; what follows it is not to be predicted from before it.
      smoothing: Label smoothing.
      z_loss: Factor of the squared log normaliser.
      totals: How many tokens the whole batch counts for each loss, where this is a part of it (`token_counts`).

    Returns:
      One or two losses in nats a token.
    """
    weights = counted(text, valid, end)
    losses = []
    for ahead, states in enumerate((output.text_states, output.mtp_states)):
        if states is not None:
            total = jnp.sum(weights[ahead]) if totals is None else totals[ahead]
            labels = text[:, 1 + ahead :]
            loss = linear_cross_entropy(states[:, :-1], output.lm_head, labels, weights[ahead], smoothing, z_loss)
            losses.append(loss / jnp.maximum(total, 1.0))
    return losses


def token_counts(
    text: Int[Array, "B T"], valid: Bool[Array, "B T"], end: int | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many tokens count for each loss of `text_losses`; arguments as there."""
    one, two = counted(text, valid, end)
    return jnp.sum(one), jnp.sum(two)


def mtp_weight(config: TaskConfig, share: Float[Array, ""] | float) -> Float[Array, ""] | float:
    """Weight of the MTP loss: one value first, a smaller one later (DeepSeek-V3, section 4.2).

    Args:
      config: Both weights, and when the second takes over.
      share: Of the run that is done, from 0 to 1.

    Returns:
      The weight.
    """
    return jnp.where(share < config.mtp_until, config.mtp_weight, config.mtp_final_weight)
