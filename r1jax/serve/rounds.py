"""Rounds of generation: prompt and answer over a paged cache of latents, with or without speculation.

A row lives through rounds. In a round the decoder reads the row's last token, which gives one new token. With
speculation (Leviathan et al. 2023; DeepSeek-V3, section 5.4.3) it reads MTP's guess of the next token too, which gives
a second one where the guess was right. Rows advance at their own pace and end at their own time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax.arguments import GenerationSettings
from r1jax.models.decoder import Decoder, LatentCache
from r1jax.models.decoding import decode, decode_second, layers_together, next_logits
from r1jax.models.served import Served, unfused
from r1jax.ops.latent_attention import empty_pages
from r1jax.ops.quantize import Quantized
from r1jax.serve.prompts import Batch
from r1jax.serve.sampling import draw, process_logits

Params = Any

STRIDE = 8
"""Rounds between two looks at whether to go on, where a round that nobody needs is cheap: it reads the head alone."""


class State(NamedTuple):
    """Everything that passes from one round to the next."""

    cache: LatentCache
    length: Int[Array, " B"]
    """Tokens of each row in the cache; the last token that it got is not in it yet."""
    feed: Int[Array, "B W"]
    """What the next round reads: the last token and, with speculation, MTP's guess of the one after it."""
    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    count: Int[Array, " B"]
    """Tokens that each row has got."""
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None
    """Tokens that the row holds, for the repetition penalty."""
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]
    key: Key[Array, ""]
    rows: Int[Array, " B"]


def run_rounds(
    model: Decoder, settings: GenerationSettings, params: Params, state: State, most: int | Int[Array, ""]
) -> State:
    """Runs rounds until every row has ended, or so many.

    Whether to go on is known on the device: a GPU tells the host and idles until the host has answered. A loop whose
    length is known when it is compiled runs without that. So rounds come in strides of a fixed length where those
    beyond the end, which change nothing, are cheap.

    Args:
      model: The decoder.
      settings: How tokens are chosen, and when a row ends.
      params: Weights of the decoder, fused or as in the checkpoint.
      state: From `read_prompt`, or from here.
      most: Rounds at most; each gives every living row one token or two.

    Returns:
      The state after them.
    """
    stride = stride_of(model, params, state, most)

    def goes_on(carry: tuple[Int[Array, ""], State]) -> Bool[Array, ""]:
        return (carry[0] < most) & ~jnp.all(carry[1].done)

    def one(_: int | Int[Array, ""], carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
        now, state = carry
        return now + 1, _round(model, settings, narrow_until(now, params), state, ~state.done & (now < most))

    def body(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
        return one(0, carry) if stride == 1 else jax.lax.fori_loop(0, stride, one, carry)

    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), state))[1]


def stride_of(model: Decoder, params: Params, state: State, most: int | Int[Array, ""]) -> int:
    """Rounds of a stride: several where a pass without a token is cheap, never more than are asked for.

    Args:
      model: The decoder.
      params: Its weights.
      state: Whose cache and rows will be read.
      most: Rounds at most; a number that is not known when this is compiled does not shorten a stride.

    Returns:
      1 where every pass reads all weights.
    """
    if not isinstance(params, Served):
        return 1
    x = model.apply({"params": params.rest}, state.feed, method="embed")  # its shape is asked for, not its numbers
    if layers_together(model.config, params, x, state.cache) is None:
        return 1
    return STRIDE if isinstance(most, jax.Array) else min(STRIDE, int(most))


def narrow_until(now: Int[Array, ""], params: Params) -> Params:
    """The weights as a round has them: codes seem to change with it, or a compiler would widen them before the loop.

    Args:
      now: What does change from round to round.
      params: Floats and codes.

    Returns:
      The same tree.
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, Quantized))
    codes = [x for x in leaves if isinstance(x, Quantized)]
    held = iter(jax.lax.optimization_barrier((codes, now))[0])
    return tree.unflatten([next(held) if isinstance(x, Quantized) else x for x in leaves])


def read_prompt(
    model: Decoder, settings: GenerationSettings, pages: int, params: Params, batch: Batch, key: Key[Array, ""]
) -> State:
    """Reads the prompts into an empty cache and chooses each row's first token.

    Args:
      model: The decoder.
      settings: How tokens are chosen, and when a row ends.
      pages: P, pages in each layer's pool.
      params: Weights of the decoder, fused or as in the checkpoint.
      batch: Prompts, and which pages are whose.
      key: Of the draws.

    Returns:
      The state that `run_rounds` goes on from.
    """
    params = unfused(params, model.config) if isinstance(params, Served) else params
    run = partial(model.apply, {"params": params})
    config, (size, length) = model.config, batch.tokens.shape
    layers = config.num_hidden_layers + settings.speculate
    pool = partial(empty_pages, settings.cache, pages, settings.page_size)
    pools = tuple(pool(config.kv_lora_rank, config.qk_rope_head_dim, model.dtype) for _ in range(layers))
    positions = jnp.broadcast_to(jnp.arange(length)[None], batch.tokens.shape)
    valid = positions < batch.lengths[:, None]
    every = jnp.arange(size)
    seen = None
    if settings.repetition_penalty != 1:
        held = jnp.where(valid, batch.tokens, config.vocab_size)
        seen = jnp.zeros((size, config.vocab_size), bool).at[every[:, None], held].set(True, mode="drop")

    embedded = run(batch.tokens, method="embed")
    cache = LatentCache(pools, batch.table)
    hidden, cache = run(embedded, positions, valid, cache, fresh=True, method="cached")
    nothing = jnp.zeros(size, jnp.int32)
    state = State(
        cache=cache,
        length=batch.lengths,
        feed=jnp.zeros((size, 1 + settings.speculate), jnp.int32),
        tokens=jnp.zeros((size, settings.max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((size, settings.max_new_tokens), jnp.float32),
        count=nothing,
        done=jnp.zeros(size, bool),
        seen=seen,
        drafted=nothing,
        accepted=nothing,
        key=key,
        rows=batch.rows,
    )
    last = batch.lengths - 1
    first, state = _choose(settings, run(hidden[every, last][:, None], method="logits")[:, 0], state, ~state.done)
    feed = [first]
    if settings.speculate:
        following = jnp.roll(batch.tokens, -1, axis=1).at[every, last].set(first)
        states, cache = run(hidden, following, positions, valid, cache, fresh=True, method="predict_second_cached")
        feed.append(_greedy(run(states[every, last][:, None], method="logits")[:, 0]))
    return state._replace(cache=cache, feed=jnp.stack(feed, axis=1))


def _round(
    model: Decoder, settings: GenerationSettings, params: Params, state: State, alive: Bool[Array, " B"]
) -> State:
    """One pass of the decoder over what each living row feeds: one token, or two with speculation.

    Nothing of the other rows changes.
    """
    read = _read_fused if isinstance(params, Served) else _read
    feed = state.feed
    positions = state.length[:, None] + jnp.arange(feed.shape[1])[None]
    # A guess beyond the last token that a row may get has no page, and nobody will ask for what follows it.
    valid = alive[:, None] & (state.count[:, None] + jnp.arange(feed.shape[1])[None] <= settings.max_new_tokens)
    logits, cache, guess = read(model, params, feed, positions, valid, state.cache)
    first, state = _choose(settings, logits[:, 0], state, alive)
    if not settings.speculate:
        feed = jnp.where(alive[:, None], first[:, None], feed)
        return state._replace(cache=cache, length=_add(state.length, alive), feed=feed)

    right = alive & (first == feed[:, 1])
    second, state = _choose(settings, logits[:, 1], state, right & ~state.done)
    following = jnp.stack([first, second], axis=1)
    last = right.astype(jnp.int32)  # the place that the next guess follows from; its logits are all that is needed
    guessed, cache = guess(following, valid & jnp.stack([alive, right], axis=1), last)
    new = jnp.stack([jnp.where(right, second, first), _greedy(guessed)], axis=1)
    return state._replace(
        cache=cache,
        length=_add(state.length, alive, right),
        feed=jnp.where(alive[:, None], new, feed),
        drafted=_add(state.drafted, alive),
        accepted=_add(state.accepted, right),
    )


Guess = Callable[[Int[Array, "B 2"], Bool[Array, "B 2"], Int[Array, " B"]], tuple[Float[Array, "B V"], LatentCache]]
"""MTP's logits of the token after the one at a place of each row, given the tokens that follow those that were read."""


def _read(
    model: Decoder,
    params: Params,
    feed: Int[Array, "B W"],
    positions: Int[Array, "B W"],
    valid: Bool[Array, "B W"],
    cache: LatentCache,
) -> tuple[Float[Array, "B W V"], LatentCache, Guess]:
    """Logits of what follows each token, the cache with the tokens in it, and what MTP would go on with."""
    run = partial(model.apply, {"params": params})
    hidden, held = run(run(feed, method="embed"), positions, valid, cache, fresh=False, method="cached")

    def guess(
        following: Int[Array, "B 2"], valid: Bool[Array, "B 2"], last: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], LatentCache]:
        states, cache = run(hidden, following, positions, valid, held, fresh=False, method="predict_second_cached")
        return run(_at(states, last), method="logits")[:, 0], cache

    return run(hidden, method="logits"), held, guess


def _read_fused(
    model: Decoder,
    served: Served,
    feed: Int[Array, "B W"],
    positions: Int[Array, "B W"],
    valid: Bool[Array, "B W"],
    cache: LatentCache,
) -> tuple[Float[Array, "B W V"], LatentCache, Guess]:
    """`_read` over fused weights."""
    embed = partial(model.apply, {"params": served.rest}, method="embed")
    states, held = decode(model.config, served, embed(feed), positions, valid, cache)

    def guess(
        following: Int[Array, "B 2"], valid: Bool[Array, "B 2"], last: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], LatentCache]:
        second, cache = decode_second(model.config, served, states, embed(following), positions, valid, held)
        gain = served.rest["mtp"]["shared_head_norm"]["weight"]
        return next_logits(model, served, _at(second, last), gain)[:, 0], cache

    return next_logits(model, served, states, served.rest["norm"]["weight"]), held, guess


def _at(states: Float[Array, "B W D"], place: Int[Array, " B"]) -> Float[Array, "B 1 D"]:
    """The state at a place of each row."""
    return jnp.take_along_axis(states, place[:, None, None], axis=1)


def _choose(
    settings: GenerationSettings, logits: Float[Array, "B V"], state: State, who: Bool[Array, " B"]
) -> tuple[Int[Array, " B"], State]:
    """Chooses a token a row, and notes it for the rows in `who`."""
    processed = process_logits(logits, state.seen, settings)
    greedy = settings.temperature == 0
    token = _greedy(processed) if greedy else draw(processed, state.key, state.rows, state.count)
    every = jnp.arange(token.shape[0])
    place = jnp.where(who, state.count, settings.max_new_tokens)  # outside: dropped
    logprob = jax.nn.log_softmax(logits, axis=-1)[every, token]
    count = _add(state.count, who)
    stop = jnp.any(token[:, None] == jnp.asarray(settings.stop_tokens, jnp.int32)[None], axis=1)
    seen = state.seen
    if seen is not None:
        seen = seen.at[every, jnp.where(who, token, seen.shape[1])].set(True, mode="drop")
    return token, state._replace(
        tokens=state.tokens.at[every, place].set(token, mode="drop"),
        logprobs=state.logprobs.at[every, place].set(logprob, mode="drop"),
        count=count,
        done=state.done | (who & (stop | (count >= settings.max_new_tokens))),
        seen=seen,
    )


def _greedy(logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The most probable token."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _add(count: Int[Array, " B"], *who: Bool[Array, " B"]) -> Int[Array, " B"]:
    """One more for each row in `who`."""
    return count + sum(rows.astype(jnp.int32) for rows in who)
