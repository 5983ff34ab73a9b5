"""The DeepSeek-V3 decoder: causal, blind to modality, with multi-token prediction (DeepSeek-V3, section 2)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from r1jax.config import DecoderConfig
from r1jax.models.attention import MLA
from r1jax.models.initial import normal
from r1jax.models.layers import MLP, Dropout, Linear, RMSNorm
from r1jax.models.lora import Lora
from r1jax.models.moe import MoE, RouterStats
from r1jax.models.quantized import parameter, scheme_for
from r1jax.models.remat import Remat, block
from r1jax.ops.axes import constrain, placement
from r1jax.ops.embedding import embed
from r1jax.ops.latent_attention import PagedLatents, Pages
from r1jax.ops.pipeline import STACKED, Stage, Stages, join, pipeline, stages_of
from r1jax.ops.quantized_dot import Ruled, quantized_dot


class DecoderLayer(nn.Module):
    """Pre-norm MLA and feed-forward, dense or mixture of experts."""

    config: DecoderConfig
    dtype: DTypeLike
    dropout: float
    dense: bool
    lora: Lora = Lora()
    remat: Remat = "none"
    prefix: bool = False
    """As in `MLA`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        *,
        cases: Int[Array, " B"] | None = None,
        cache: PagedLatents | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, PagedLatents | None]:
        c = self.config
        drop = Dropout(self.dropout)
        normed = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        attention = MLA(c, self.dtype, self.lora, self.remat, self.prefix, name="self_attn")
        if cache is None:
            mixed = attention(normed, positions, valid)
        else:
            mixed, cache = attention.cached(normed, positions, valid, cache, fresh=fresh)
        x = constrain(x + drop(mixed, cases), "batch", "length", None)
        normed = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        if self.dense:
            mlp = MLP(c.intermediate_size, self.dtype, c.initializer_range, self.lora, name="mlp")
            y, stats = mlp(normed), None
        else:
            few = cache is not None and not fresh  # decoding: blocks of 128 rows would be nearly empty
            y, stats = MoE(c, self.dtype, self.lora, name="mlp")(normed, valid, few=few)
        return constrain(x + drop(y, cases), "batch", "length", None), stats, cache


def _uncached(
    layer: DecoderLayer,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cases: Int[Array, " B"] | None,
) -> tuple[Float[Array, "B T D"], RouterStats | None]:
    """A layer in training or evaluation, as a function of arrays alone."""
    return layer(x, positions, valid, cases=cases)[:2]


class MTP(nn.Module):
    """One depth of multi-token prediction: from h_i and token i+1 to a state that predicts token i+2 (equation 21)."""

    config: DecoderConfig
    dtype: DTypeLike
    dropout: float
    lora: Lora = Lora()
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        next_embedding: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        *,
        cases: Int[Array, " B"] | None = None,
        cache: PagedLatents | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats, PagedLatents | None]:
        c = self.config
        # The paper writes [h; emb]; the published weights are for [emb; h].
        pair = [RMSNorm(c.rms_norm_eps, name="enorm")(next_embedding), RMSNorm(c.rms_norm_eps, name="hnorm")(hidden)]
        eh_proj = Linear(c.hidden_size, self.dtype, init_std=c.initializer_range, lora=self.lora, name="eh_proj")
        # It reads text alone, which has no gaps.
        layer = DecoderLayer(c, self.dtype, self.dropout, False, self.lora, self.remat, prefix=True, name="layer")
        x = eh_proj(jnp.concatenate(pair, axis=-1))
        if cache is None:
            x, stats = block(_uncached, self.remat)(layer, x, positions, valid, cases)
        else:
            x, stats, cache = layer(x, positions, valid, cache=cache, fresh=fresh)
        assert stats is not None
        return RMSNorm(c.rms_norm_eps, name="shared_head_norm")(x), stats, cache


class LatentCache(NamedTuple):
    """What decoding remembers of each row, kv_lora_rank + qk_rope_head_dim numbers a token and layer."""

    pages: tuple[Pages, ...]
    """Pool of each layer; the last one is MTP's where it decodes too."""
    table: Int[Array, "B n"]
    """Pages of each row, the same in every layer."""


class LanguageHead(nn.Module):
    """Next-token logits; the weight can also be had by itself, for a loss that never holds all logits."""

    vocab_size: int
    width: int
    dtype: DTypeLike
    init_std: float

    def setup(self) -> None:
        init = normal(self.init_std)
        self.weight = parameter(self, "weight", init, (self.vocab_size, self.width))

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return language_logits(hidden.astype(self.dtype), self.matrix(hidden))

    def matrix(self, hidden: Float[Array, "B T D"]) -> Float[Array, "V D"] | Ruled:
        """The weight, with its scheme where its products are rounded; `hidden` is what it will be multiplied with."""
        scheme = scheme_for((*self.path, "weight"), "head", self.weight.shape, hidden)
        return self.weight if scheme is None else Ruled(self.weight, scheme)


def language_logits(hidden: Float[Array, "B T D"], weight: Float[Array, "V D"] | Ruled) -> Float[Array, "B T V"]:
    """Logits in fp32 of products in the states' dtype, or of rounded ones."""
    if isinstance(weight, Ruled):
        return quantized_dot(hidden, weight.weight, weight.scheme).astype(jnp.float32)
    return jnp.einsum("...I,OI->...O", hidden, weight.astype(hidden.dtype)).astype(jnp.float32)


class Decoder(nn.Module):
    """Token embedding, layers, final norm, language head and MTP; the caller places the embeddings."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    lora: Lora = Lora()
    remat: Remat = "none"
    scan_layers: bool = False
    prefix: bool = False
    """As in `MLA`; rows of text alone have no gaps, those with modalities may."""

    def setup(self) -> None:
        c = self.config
        init = normal(c.initializer_range)
        self.embed_tokens = parameter(self, "embed_tokens", init, (c.vocab_size, c.hidden_size))
        self.layers = [
            DecoderLayer(c, self.dtype, self.dropout, i < c.first_k_dense_replace, self.lora, self.remat, self.prefix)
            for i in range(c.num_hidden_layers)
        ]
        self.norm = RMSNorm(c.rms_norm_eps)
        self.lm_head = LanguageHead(c.vocab_size, c.hidden_size, self.dtype, c.initializer_range)
        if c.num_nextn_predict_layers:
            self.mtp = MTP(c, self.dtype, self.dropout, self.lora, self.remat)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds tokens in the compute dtype."""
        path = (*self.path, "embed_tokens")
        return embed(
            self.embed_tokens, tokens, self.dtype, path, scheme_for(path, "embedding", self.embed_tokens.shape)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        *,
        cases: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[RouterStats, ...]]:
        """Runs the layers.

        Args:
          x: Embeddings of modality tokens, text and queries, in one sequence.
          positions: Position of each token for RoPE.
          valid: Tokens that exist; others are neither seen nor counted.
          cases: Index of each row in the batch, for dropout; None leaves it out.

        Returns:
          Hidden states after the final norm, and the statistics of each mixture layer.
        """
        c = self.config
        stats: list[RouterStats] = []
        first, divided = min(c.first_k_dense_replace, c.num_hidden_layers), self._divided()
        for numbers in (range(first), range(first, c.num_hidden_layers)):
            stages = divided if divided is not None and divided.layers[0] in numbers else None
            if (self.scan_layers or stages) and len(numbers) > 1 and not self.is_initializing():
                key = self.make_rng("dropout") if cases is not None and self.dropout else None
                apart = numbers if stages is None else range(numbers.start, stages.layers.start)
                if apart:
                    x, found = self._scanned(x, positions, valid, cases, key, apart)
                    stats += found
                if stages is not None:
                    x, found = self._pipelined(x, positions, valid, cases, key, stages)
                    stats += found
                continue
            for i in numbers:
                x, layer_stats = block(_uncached, self.remat)(self.layers[i], x, positions, valid, cases)
                stats += [] if layer_stats is None else [layer_stats]
        return self.norm(x), tuple(stats)

    def _divided(self) -> Stages | None:
        """The layers that lie on different devices, where the parameters have them stacked."""
        where = placement()
        if where is None or where.ring is None or STACKED not in self.variables["params"]:
            return None
        return stages_of(self.config, where.ring.devices, where.ring.rounds)

    def _scanned(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cases: Int[Array, " B"] | None,
        key: PRNGKeyArray | None,
        numbers: range,
    ) -> tuple[Float[Array, "B T D"], list[RouterStats]]:
        """Layers of one kind as one loop of the compiled program, whose size then does not grow with the depth.

        The weights keep their places in the tree and are stacked on the way in.
        """
        params = self.variables["params"]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(params[f"layers_{i}"] for i in numbers))
        layers = self._loop(numbers[0] < self.config.first_k_dense_replace)
        x, stats = layers(stacked, jnp.asarray(numbers), x, (positions, valid, cases), key)
        return x, [] if stats is None else [jax.tree.map(lambda s, i=i: s[i], stats) for i in range(len(numbers))]

    def _loop(self, dense: bool) -> Stage:
        """Layers of one kind one after another, as a function of their stacked weights."""
        c = self.config
        layer = DecoderLayer(c, self.dtype, self.dropout, dense, self.lora, self.remat, self.prefix, parent=None)

        def layers(weights: Any, numbers: Array, x: Array, rows: Any, key: PRNGKeyArray | None) -> tuple[Array, Any]:
            def turn(x: Array, item: tuple[Any, Array]) -> tuple[Array, RouterStats | None]:
                rngs = {} if key is None else {"dropout": jax.random.fold_in(key, item[1])}
                return layer.apply({"params": item[0]}, x, *rows, rngs=rngs, method=block(_uncached, self.remat))

            return jax.lax.scan(turn, x, (weights, numbers))

        return layers

    def _pipelined(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cases: Int[Array, " B"] | None,
        key: PRNGKeyArray | None,
        stages: Stages,
    ) -> tuple[Float[Array, "B T D"], list[RouterStats]]:
        """Layers that lie on different devices; the numbers are those of `_scanned`."""
        layers, weights = self._loop(stages.layers[0] < self.config.first_k_dense_replace), self.variables["params"]
        x, stats = pipeline(stages, layers, weights[STACKED], x, (positions, valid, cases), key)
        if stats is None:
            return x, []
        # Of each layer, share of the batch and microbatch; the microbatches are equally large.
        by_case = jax.vmap(jax.vmap(join))(stats.sequence_load)
        whole = RouterStats(
            jnp.sum(stats.load, axis=(1, 2)),
            jnp.mean(stats.balance_loss, axis=(1, 2)),
            by_case.reshape(len(stages.layers), -1, by_case.shape[-1]),
            None if stats.waited is None else jnp.sum(stats.waited, axis=(1, 2)),
        )
        whole = jax.tree.map(lambda s: constrain(s, *[None] * s.ndim), whole)  # once, not layer by layer
        return x, [jax.tree.map(lambda s, i=i: s[stages.order.index(i)], whole) for i in stages.layers]

    def cached(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: LatentCache,
        *,
        fresh: bool,
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """Runs the layers on the next tokens of each row: all of a prompt, or one or two while decoding.

        Args:
          x: Embeddings.
          positions: Place of each token in its row, from 0 without gaps; what stood there before is overwritten.
          valid: Tokens that exist.
          cache: What came before.
          fresh: Nothing came before.

        Returns:
          Hidden states after the final norm, equal to those of `__call__` on the whole row, and the cache with x in it.
        """
        pools = list(cache.pages)
        for i, layer in enumerate(self.layers):
            paged = PagedLatents(pools[i], cache.table)
            x, _, paged = layer(x, positions, valid, cache=paged, fresh=fresh)
            pools[i] = paged.pages
        return self.norm(x), cache._replace(pages=tuple(pools))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in fp32; main model and MTP share this head."""
        return self.lm_head(hidden)

    def predict_second(
        self,
        hidden: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        *,
        cases: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """MTP states that, through `logits`, predict the token after next.

        Args:
          hidden: Output of `__call__`, after the final norm.
          next_tokens: Token i+1 at place i.
          positions: Positions of the tokens i.
          valid: Places that exist.
          cases: Index of each row in the batch, for dropout; None leaves it out.

        Returns:
          MTP states and the statistics of its mixture layer.
        """
        return self.mtp(hidden, self.embed(next_tokens), positions, valid, cases=cases)[:2]

    def predict_second_cached(
        self,
        hidden: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: LatentCache,
        *,
        fresh: bool,
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """`predict_second` with the last pool of the cache as its own; arguments as there and in `cached`."""
        paged = PagedLatents(cache.pages[-1], cache.table)
        embedded = self.embed(next_tokens)
        states, _, paged = self.mtp(hidden, embedded, positions, valid, cache=paged, fresh=fresh)
        return states, cache._replace(pages=(*cache.pages[:-1], paged.pages))
