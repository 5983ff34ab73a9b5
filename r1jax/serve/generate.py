"""Generation with the decoder: one compiled program for prompt and answer, or one a piece for streaming."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from r1jax.arguments import GenerationSettings
from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.models.decoder import Decoder
from r1jax.models.lora import Lora, split_adapters
from r1jax.models.quantized import check_fp8, rounding_by
from r1jax.models.served import Served, can_be_fused, fused, unfused
from r1jax.ops.latent_attention import bytes_a_token, empty_pages
from r1jax.ops.precision import exact_products
from r1jax.ops.quantize import Quantized
from r1jax.serve.prompts import Batch, lay_out
from r1jax.serve.rounds import Params, State, read_prompt, run_rounds
from r1jax.train.quantized import is_codes
from r1jax.validation import quant_rules

NO_ADAPTERS = Lora()
Prompts = Sequence[Sequence[int]] | Int[np.ndarray, "B T"]


class Generated(NamedTuple):
    """Answers of a batch; what stands beyond a row's length is 0."""

    tokens: Int[np.ndarray, "B n"]
    lengths: Int[np.ndarray, " B"]
    """Tokens of each answer, its stop token included."""
    logprobs: Float[np.ndarray, "B n"]
    """ln of each token's probability under the model itself: temperature, filters and penalty are not in it."""
    drafted: Int[np.ndarray, " B"]
    """Guesses of MTP that the decoder has checked."""
    accepted: Int[np.ndarray, " B"]
    """Those that were right."""

    @property
    def acceptance(self) -> float:
        """Share of MTP's guesses that were right; NaN where none was made."""
        drafted = int(self.drafted.sum())
        return int(self.accepted.sum()) / drafted if drafted else float("nan")


class Piece(NamedTuple):
    """What a stream brings at a time."""

    tokens: list[list[int]]
    """New tokens of each row."""
    logprobs: list[list[float]]
    drafted: Int[np.ndarray, " B"]
    """Guesses of MTP that were checked so far."""
    accepted: Int[np.ndarray, " B"]


class Generator:
    """A decoder with its weights, ready to answer; answers depend on nothing but the arguments."""

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        *,
        dtype: DTypeLike = jnp.float32,
        quant: tuple[str, ...] = (),
        lora: Lora = NO_ADAPTERS,
    ) -> None:
        """Takes the weights as they are placed; matrices are kept in `dtype`, and codes as codes.

        What a step of decoding reads together is fused once, here; the tree that is given keeps its own arrays.

        Args:
          config: The decoder.
          params: Its parameter tree.
          dtype: Of products and cache; fp32 means 24 bits, also on a GPU.
          quant: Rules by which codes in the tree were made and are multiplied, those of `model.quant`.
          lora: Of adapters that cannot be merged, because what they adapt is codes.

        Raises:
          UserError: The tree holds LoRA adapters, which the decoder would ignore, or the device cannot multiply as the
            rules say.
        """
        if split_adapters(params)[0] and not lora.rank:
            raise UserError("params hold LoRA adapters: merge them first with r1jax.models.lora.merge_lora.")
        if any(rule.activations == "fp8" for rule in quant_rules(quant)):
            check_fp8("model.quant asks for products of fp8", jax.devices()[0])
        self.model = Decoder(config, dtype, lora=lora)
        self.quant = quant
        held = cast_matrices(params, dtype)
        # Adapters and weights that are rounded anew in every product stay with the modules.
        self.held = fused(held, config, dtype) if can_be_fused(held, quant) else held
        places = {place for x in jax.tree.leaves(held) if isinstance(x, jax.Array) for place in x.devices()}
        self.device = places.pop() if len(places) == 1 else None  # of several, there are no kernels to choose

    @property
    def params(self) -> Params:
        """The weights as in the checkpoint, in the dtypes that they are held in."""
        return unfused(self.held, self.model.config) if isinstance(self.held, Served) else self.held

    def cache_bytes(self, settings: GenerationSettings) -> int:
        """What a token takes in the cache of all layers."""
        config, layers = self.model.config, self.model.config.num_hidden_layers + settings.speculate
        width = (config.kv_lora_rank, config.qk_rope_head_dim)
        return layers * bytes_a_token(empty_pages(settings.cache, 1, 1, *width, self.model.dtype))

    def generate(
        self,
        prompts: Prompts,
        settings: GenerationSettings,
        *,
        attention_mask: np.ndarray | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Generated:
        """Answers a batch of prompts.

        Args:
          prompts: Tokens of each prompt, of any lengths; or an array, padded on either side.
          settings: How tokens are chosen, and when a row ends.
          attention_mask: Which tokens of an array exist, bool or 0 and 1 [B, T]; None takes all.
          seed: Of the draws.
          rows: Number of each row, by which it keeps its draws in another batch; None counts from 0.

        Returns:
          Tokens, lengths and log-probabilities.

        Raises:
          UserError: A prompt is empty or holds an unknown token, or the settings do not fit the model.
        """
        batch, pages = self._lay_out(prompts, attention_mask, rows, settings)
        with self._traced():
            answers = _generate(self.model, self.quant, settings, pages, self.held, batch, jax.random.key(seed))
        return Generated(*map(np.asarray, answers))

    def stream(
        self,
        prompts: Prompts,
        settings: GenerationSettings,
        *,
        attention_mask: np.ndarray | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        rounds: int = 1,
    ) -> Iterator[Piece]:
        """Answers a batch of prompts piece by piece; the pieces together are the tokens of `generate`.

        Args:
          prompts: As in `generate`.
          settings: As in `generate`.
          attention_mask: As in `generate`.
          seed: As in `generate`.
          rows: As in `generate`.
          rounds: Rounds between two pieces; each number of them is compiled anew.

        Yields:
          What each row got since the last piece; nothing for rows that have ended.

        Raises:
          UserError: As in `generate`.
        """
        batch, pages = self._lay_out(prompts, attention_mask, rows, settings)
        with self._traced():
            state = _start(self.model, self.quant, settings, pages, self.held, batch, jax.random.key(seed))
        told = np.zeros(len(batch.lengths), np.int32)
        while True:
            # Copies: the next rounds write into the state's own memory.
            parts = (state.tokens, state.logprobs, state.count, state.drafted, state.accepted, state.done)
            tokens, logprobs, count, drafted, accepted, done = map(np.array, parts)
            new = [(row, slice(told[row], count[row])) for row in range(len(told))]
            yield Piece([tokens[at].tolist() for at in new], [logprobs[at].tolist() for at in new], drafted, accepted)
            if done.all():
                return
            told = count
            with self._traced():
                state = _advance(self.model, self.quant, settings, self.held, state, rounds)

    @contextlib.contextmanager
    def _traced(self) -> Iterator[None]:
        """Has programs be traced for the device that holds the weights, whichever JAX would take, and be exact."""
        place = jax.config.jax_default_device if self.device is None else self.device
        with exact_products(self.model.dtype), jax.default_device(place):
            yield

    def _lay_out(
        self,
        prompts: Prompts,
        attention_mask: np.ndarray | None,
        rows: Sequence[int] | None,
        settings: GenerationSettings,
    ) -> tuple[Batch, int]:
        """`lay_out`, for a device that can hold the cache as the settings say."""
        if settings.cache == "fp8":
            check_fp8("cache is 'fp8'", jax.devices()[0])
        return lay_out(prompts, attention_mask, rows, self.model.config, settings)


def cast_matrices(params: Params, dtype: DTypeLike) -> Params:
    """Casts what `dtype` products read, once instead of in every round; router and norms stay fp32, codes are codes.

    Args:
      params: Parameter tree of the decoder.
      dtype: Of the products.

    Returns:
      The tree; leaves that keep their dtype are not copied.
    """

    def cast(path: tuple[Any, ...], leaf: Array | Quantized) -> Array | Quantized:
        router = any(getattr(part, "key", None) == "gate" for part in path)
        kept = router or isinstance(leaf, Quantized) or leaf.ndim < 2
        return leaf if kept else jnp.asarray(leaf, dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_codes)


WITHIN = ("decoder",)
"""Where in R1 the decoder lies: rules name weights by their paths in R1."""


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Decoder,
    quant: tuple[str, ...],
    settings: GenerationSettings,
    pages: int,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
) -> tuple[Array, ...]:
    """Prompt and all rounds, one program; the cache does not outlive it."""
    with rounding_by(quant, WITHIN):
        state = read_prompt(model, settings, pages, params, batch, key)
        state = run_rounds(model, settings, params, state, settings.max_new_tokens)
    return state.tokens, state.count, state.logprobs, state.drafted, state.accepted


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(
    model: Decoder,
    quant: tuple[str, ...],
    settings: GenerationSettings,
    pages: int,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
) -> State:
    """Prompt and first token."""
    with rounding_by(quant, WITHIN):
        return read_prompt(model, settings, pages, params, batch, key)


@partial(jax.jit, static_argnums=(0, 1, 2, 5), donate_argnums=4)
def _advance(
    model: Decoder,
    quant: tuple[str, ...],
    settings: GenerationSettings,
    params: Params,
    state: State,
    rounds: int,
) -> State:
    """A few rounds, in the state's own memory; a program is for their number, which a stride must not exceed."""
    with rounding_by(quant, WITHIN):
        return run_rounds(model, settings, params, state, rounds)
