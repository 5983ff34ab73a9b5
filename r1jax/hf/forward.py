"""What the decoder says to tokens: logits, and everything on the way that a reference may hold."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import DecoderConfig
from r1jax.models.decoder import Decoder, DecoderLayer
from r1jax.models.moe import Router, select_experts
from r1jax.ops.losses import cross_entropy
from r1jax.ops.precision import exact_products

Params = dict[str, Any]


class Traced(NamedTuple):
    """Outputs of one forward pass."""

    logits: Float[Array, "B T V"]
    loss: Float[Array, ""]
    """Mean cross-entropy of tokens 1, 2, ..., in nats."""
    hidden: tuple[Float[Array, "B T D"], ...]
    """The embeddings, the output of every layer but the last, and the last one's after the final norm."""
    experts: tuple[Int[Array, "T K"], ...]
    """Chosen experts of each mixture layer, sorted."""
    weights: tuple[Float[Array, "T K"], ...]
    """Their weights."""
    mtp_hidden: Float[Array, "B T D"] | None
    """States for the token after next, at all places but the last; None without MTP."""
    mtp_logits: Float[Array, "B T V"] | None


def token_logits(
    config: DecoderConfig, params: Params, tokens: Int[np.ndarray, "B T"], batch_size: int, dtype: DTypeLike
) -> Iterator[Float[np.ndarray, "B T V"]]:
    """Next-token logits of sequences, a batch at a time.

    Args:
      config: The decoder.
      params: Its parameters.
      tokens: Token ids below the vocabulary's size.
      batch_size: Sequences a forward pass; the last batch is filled up and cut.
      dtype: Of the computation.

    Yields:
      float32 logits of the next sequences.
    """

    @jax.jit
    def run(params: Params, batch: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        return Decoder(config, dtype).apply({"params": params}, batch, *whole(batch), method=_logits)

    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size].astype(np.int32)
        filled = np.concatenate([batch, np.zeros((batch_size - len(batch), batch.shape[1]), np.int32)])
        with exact_products(dtype):
            yield np.asarray(run(params, jnp.asarray(filled)))[: len(batch)]


def whole(tokens: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Positions and validity of sequences without padding.

    Args:
      tokens: Token ids; only their shape matters.

    Returns:
      0, 1, 2, ... and True everywhere.
    """
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), jnp.ones(tokens.shape, bool)


def logits_of(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Float[Array, "B T V"]:
    """Next-token logits in fp32 of sequences that may be padded.

    Args:
      config: The decoder.
      params: Its parameters.
      tokens: Token ids.
      positions: Position of each token.
      valid: Tokens that exist.

    Returns:
      Logits; those of padding mean nothing.
    """
    return Decoder(config).apply({"params": params}, tokens, positions, valid, method=_logits)


def trace(config: DecoderConfig, params: Params, tokens: Int[Array, "B T"]) -> Traced:
    """Runs the decoder in fp32 and keeps what is on the way.

    Args:
      config: The decoder.
      params: Its parameters.
      tokens: Token ids, without padding.

    Returns:
      All outputs.
    """
    decoder = Decoder(config)
    positions, valid = whole(tokens)
    (logits, embedded, hidden, states), kept = decoder.apply(
        {"params": params},
        tokens,
        positions,
        valid,
        method=_all,
        capture_intermediates=lambda module, _: isinstance(module, DecoderLayer | Router),
        mutable=["intermediates"],
    )
    seen = kept["intermediates"]
    layers = [seen[f"layers_{i}"] for i in range(config.num_hidden_layers)]
    between = [layer["__call__"][0][0] for layer in layers[:-1]]
    chosen = [_chosen(*layer["mlp"]["gate"]["__call__"][0], config) for layer in layers if "mlp" in layer]
    experts, weights = (tuple(pair[i] for pair in chosen) for i in (0, 1))
    mtp_logits = None if states is None else decoder.apply({"params": params}, states, method=Decoder.logits)
    loss = jnp.mean(cross_entropy(logits[:, :-1], tokens[:, 1:]))
    return Traced(logits, loss, (embedded, *between, hidden), experts, weights, states, mtp_logits)


def trace_gradients(config: DecoderConfig, params: Params, tokens: Int[Array, "B T"]) -> tuple[Traced, Params]:
    """Runs the decoder in fp32, forwards and backwards.

    Args:
      config: The decoder.
      params: Its parameters.
      tokens: Token ids, without padding.

    Returns:
      All outputs, and the gradient of the loss.
    """

    def loss(params: Params) -> tuple[Float[Array, ""], Traced]:
        traced = trace(config, params, tokens)
        return traced.loss, traced

    gradients, traced = jax.grad(loss, has_aux=True)(params)
    return traced, gradients


def _logits(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> Float[Array, "B T V"]:
    hidden, _ = decoder(decoder.embed(tokens), positions, valid)
    return decoder.logits(hidden)


def _all(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T V"], Float[Array, "B T D"], Float[Array, "B T D"], Float[Array, "B S D"] | None]:
    """Logits, embeddings, hidden states and, where there is MTP, its states."""
    embedded = decoder.embed(tokens)
    hidden, _ = decoder(embedded, positions, valid)
    states = None
    if decoder.config.num_nextn_predict_layers:
        cut = (hidden[:, :-1], tokens[:, 1:], positions[:, :-1], valid[:, :-1])
        states, _ = decoder.predict_second(*cut)
    return decoder.logits(hidden), embedded, hidden, states


def _chosen(
    scores: Float[Array, "T E"], bias: Float[Array, " E"], config: DecoderConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Experts of each token by their number, and their weights."""
    experts, weights = select_experts(scores, bias, config)
    order = jnp.argsort(experts, axis=-1)
    return jnp.take_along_axis(experts, order, axis=-1), jnp.take_along_axis(weights, order, axis=-1)
