"""Losses of text: the next token, and with MTP the one after it (DeepSeek-V3, section 2.2)."""

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
) -> list[Float[Array, ""]]:
    """Mean loss of the next token and, if MTP ran, of the token after it (equation 24).

    Args:
      output: With the states of the text.
      text: Tokens.
      valid: Which of them exist.
      end: Token that ends a document; what follows it is not to be predicted from before it.
      smoothing: Label smoothing.
      z_loss: Factor of the squared log normaliser.

    Returns:
      One or two losses in nats a token.
    """
    one, two = counted(text, valid, end)
    losses = [linear_cross_entropy(output.text_states[:, :-1], output.lm_head, text[:, 1:], one, smoothing, z_loss)]
    if output.mtp_states is not None:
        states = output.mtp_states[:, :-1]
        losses.append(linear_cross_entropy(states, output.lm_head, text[:, 2:], two, smoothing, z_loss))
    return losses


def mtp_weight(config: TaskConfig, share: Float[Array, ""] | float) -> Float[Array, ""] | float:
    """Weight of the MTP loss: one value first, a smaller one later (DeepSeek-V3, section 4.2).

    Args:
      config: Both weights, and when the second takes over.
      share: Of the run that is done, from 0 to 1.

    Returns:
      The weight.
    """
    return jnp.where(share < config.mtp_until, config.mtp_weight, config.mtp_final_weight)
