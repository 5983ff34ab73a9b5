"""How many floating-point operations the model needs for a training step, term by term.

Only products count, at two operations a multiply-add: of linear layers, attention and convolutions. Causal attention
counts at half, since half of its scores are masked. A backward pass takes two products for each of the forward pass.
What an implementation does beyond that (recomputed activations, padded blocks of experts, masked scores) does not
count, so that a faster implementation of the same model shows a higher utilisation.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from r1jax.config import DecoderConfig, ModelConfig
from r1jax.models.r1 import Inputs
from r1jax.models.series import STATES
from r1jax.tasks.task import Task

Product = dict[str, int | float]
"""Factors by name; their product is a number of multiply-adds."""

TRAINED, FROZEN, UNREACHED = 3, 2, 1
"""Passes of a product: forward, and backward to its input and weight; without the weight's; forward alone."""


class Term(NamedTuple):
    """One kind of product of the model."""

    name: str
    products: tuple[Product, ...]
    """Their sum is the multiply-adds of the forward pass of a whole batch."""
    passes: int = TRAINED
    """How often the training step makes them."""

    @property
    def forward(self) -> int | float:
        """FLOPs of the forward pass."""
        return 2 * sum(math.prod(product.values()) for product in self.products)

    @property
    def formula(self) -> str:
        """The factors with their numbers, such as `2 (tokens 96 x D 16 x F 64)`."""
        parts = (" x ".join(f"{name} {_digits(value)}" for name, value in p.items()) for p in self.products)
        return f"2 ({' + '.join(parts)})"


def _digits(value: int | float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,}"


class Work(NamedTuple):
    """What the model asks of one training step."""

    terms: tuple[Term, ...]
    tokens: int
    """Places of the decoder's sequences, padding and queries included, of the whole batch."""

    @property
    def flops(self) -> int | float:
        """FLOPs of forward and backward pass."""
        return sum(term.passes * term.forward for term in self.terms)


def work_of(config: ModelConfig, task: Task, batch: dict[str, Any]) -> Work:
    """Counts a training step.

    Args:
      config: The model.
      task: Its heads, and whether the text is learned.
      batch: Any collated batch of the step's shapes.

    Returns:
      The terms of the whole batch, on all devices together.
    """
    inputs = jax.eval_shape(lambda x: task.prepare(x)[0], batch)
    cases = len(jax.tree.leaves(inputs)[0])
    text = 0 if inputs.text is None else inputs.text.shape[1]
    heads, width = task.heads, config.decoder.hidden_size
    adapted = config.lora_rank > 0
    encoders = [*_vision(config, inputs, cases), *_series(config, inputs), *_table(config, inputs)]
    encoders += _text(config, inputs, bool(heads))
    if adapted:  # gradients end at the decoder's first adapter
        encoders = [term._replace(passes=UNREACHED) for term in encoders]
    length = text // config.text_merge + len(heads) + _modality_tokens(config, inputs)
    decoder = list(_decoder(config.decoder, cases, length, "", config.decoder.num_hidden_layers))
    if heads:
        outputs = {"cases": cases, "D": width, "outputs": sum(size for _, size in heads)}
        decoder.append(Term("task heads", (outputs,)))
    if task.language and text:
        decoder += _language(config.decoder, cases, text)
    if adapted:
        decoder = [t if "attention scores" in t.name else t._replace(passes=FROZEN) for t in decoder]
        decoder += _adapters(config, cases, length, text - 1 if task.language and text else 0)
    return Work((*encoders, *decoder), cases * length)


def _attention(d: DecoderConfig) -> tuple[Product, ...]:
    """Projections of multi-head latent attention for one token."""
    key, n = d.qk_nope_head_dim + d.qk_rope_head_dim, {"N": d.num_attention_heads}
    queries: tuple[Product, ...] = ({"D": d.hidden_size, **n, "Hqk": key},)
    if d.q_lora_rank:
        queries = ({"D": d.hidden_size, "Rq": d.q_lora_rank}, {"Rq": d.q_lora_rank, **n, "Hqk": key})
    return (
        *queries,
        {"D": d.hidden_size, "Rkv+Hrope": d.kv_lora_rank + d.qk_rope_head_dim},
        {"Rkv": d.kv_lora_rank, **n, "Hnope+Hv": d.qk_nope_head_dim + d.v_head_dim},
        {**n, "Hv": d.v_head_dim, "D": d.hidden_size},
    )


def _times(factors: Product, products: tuple[Product, ...]) -> tuple[Product, ...]:
    return tuple({**factors, **product} for product in products)


def _decoder(d: DecoderConfig, cases: int, length: int, prefix: str, layers: int) -> Iterator[Term]:
    """Layers of the decoder, or of MTP, whose one layer has experts."""
    dense = 0 if prefix else min(d.first_k_dense_replace, layers)
    tokens = {"tokens": cases * length}
    scores = {"layers": layers, "cases": cases, "T^2/2": length**2 / 2, "N": d.num_attention_heads}
    wide = d.qk_nope_head_dim + d.qk_rope_head_dim + d.v_head_dim
    yield Term(f"{prefix}attention projections", _times({"layers": layers, **tokens}, _attention(d)))
    yield Term(f"{prefix}attention scores and values", ({**scores, "Hqk+Hv": wide},))
    if dense:
        shape = {"3 D": 3 * d.hidden_size, "F": d.intermediate_size}
        yield Term(f"{prefix}dense feed-forward", ({"layers": dense, **tokens, **shape},))
    if layers > dense:
        mixture = {"layers": layers - dense, **tokens}
        shape = {"3 D": 3 * d.hidden_size, "F": d.moe_intermediate_size}
        yield Term(f"{prefix}router", ({**mixture, "D": d.hidden_size, "E": d.n_routed_experts},))
        yield Term(f"{prefix}routed experts", ({**mixture, "K": d.num_experts_per_tok, **shape},))
        if d.n_shared_experts:
            yield Term(f"{prefix}shared experts", ({**mixture, "shared": d.n_shared_experts, **shape},))


def _language(d: DecoderConfig, cases: int, text: int) -> Iterator[Term]:
    """Language head, and with MTP its layer and the same head again."""
    shape = {"D": d.hidden_size, "V": d.vocab_size}
    yield Term("language head", ({"tokens": cases * (text - 1), **shape},))
    if d.num_nextn_predict_layers:
        pair = {"tokens": cases * (text - 1), "2 D": 2 * d.hidden_size, "D": d.hidden_size}
        yield Term("MTP projection", (pair,))
        yield from _decoder(d, cases, text - 1, "MTP ", 1)
        yield Term("MTP language head", ({"tokens": cases * (text - 2), **shape},))


def _adapters(config: ModelConfig, cases: int, length: int, second: int) -> Iterator[Term]:
    """Low-rank adapters: of each adapted layer, rank x (inputs + outputs) a token."""
    d, rank = config.decoder, {"rank": config.lora_rank}
    width, heads, key = d.hidden_size, d.num_attention_heads, d.qk_nope_head_dim + d.qk_rope_head_dim
    queries = width + heads * key + (2 * d.q_lora_rank if d.q_lora_rank else 0)
    latent = width + 2 * d.kv_lora_rank + d.qk_rope_head_dim + heads * (d.qk_nope_head_dim + d.v_head_dim)
    attention = queries + latent + heads * d.v_head_dim + width
    dense = min(d.first_k_dense_replace, d.num_hidden_layers)
    shared = d.n_shared_experts * d.moe_intermediate_size
    feed_forward = lambda hidden: 3 * (width + hidden) if hidden else 0  # noqa: E731

    def term(prefix: str, tokens: int, layers: int, sizes: int) -> Term:
        return Term(f"{prefix}adapters", ({"layers": layers, "tokens": tokens, **rank, "inputs+outputs": sizes},))

    tokens, mixture = cases * length, d.num_hidden_layers - dense
    yield term("dense layers' ", tokens, dense, attention + feed_forward(d.intermediate_size))
    yield term("mixture layers' ", tokens, mixture, attention + feed_forward(shared))
    if second and d.num_nextn_predict_layers:
        yield term("MTP ", cases * second, 1, attention + feed_forward(shared) + 3 * width)


def _encoder_layers(name: str, layers: int, cases: int, tokens: int, width: int) -> Iterator[Term]:
    """Bidirectional layers: q, k, v and o of the width, a feed-forward of twice the width, every score."""
    if layers:
        each = {"layers": layers, "tokens": cases * tokens, "(4 + 6) C": 10 * width, "C": width}
        scores = {"layers": layers, "cases": cases, "M^2": tokens**2, "2 C": 2 * width}
        yield Term(f"{name}: bidirectional layers", (each, scores))


def _vision(config: ModelConfig, inputs: Inputs, cases: int) -> Iterator[Term]:
    """Stages of convolutions, bidirectional layers, and the ends of each picture encoder."""
    for name, shape in (("volume", inputs.volume), ("image", inputs.image)):
        if shape is None:
            continue
        vision = getattr(config, name)
        rank, channels, stride = len(vision.size), 1, vision.stem_stride
        cells, taps = math.prod(vision.size), 9 + (3 if len(vision.size) == 3 else 9)
        products: list[Product] = []
        for width, blocks in zip(vision.widths, vision.blocks, strict=True):
            cells, channels = cells // stride**rank, channels * stride**rank
            products.append({"cells": cases * cells, "I": channels, "C": width})
            if blocks:
                products.append({"blocks": blocks, "cells": cases * cells, "taps": taps, "C": width, "C'": width})
            channels, stride = width, 2
        yield Term(f"{name}: stages", tuple(products))
        yield from _encoder_layers(name, vision.layers, cases, cells, channels)
        hidden = config.decoder.hidden_size
        ends: tuple[Product, ...] = (
            {"cells": cases * cells, "C": channels, "D": hidden},  # `merge` trades cells for channels
            {"cases": cases, "3 C": 3 * channels, "D": hidden},
            {"cells": cases * cells, "2 C": 2 * channels},
        )
        yield Term(f"{name}: projection, summary, place", ends)


def _series(config: ModelConfig, inputs: Inputs) -> Iterator[Term]:
    """Numbers of the events, bidirectional layers over each stream, pooling, projection and summary."""
    if inputs.series is not None:
        cases, streams, events, channels = inputs.series.shape
        width, tokens = config.decoder.hidden_size, config.series.tokens
        features = channels * (config.series.bins + 1) + STATES
        yield Term("series: events", ({"events": cases * streams * events, "I": features, "D": width},))
        yield from _encoder_layers("series", config.series.layers, cases * streams, events, width)
        pooled = {"events": cases * streams * events, "M": tokens, "2 D": 2 * width}
        joined = {"streams": cases * streams, "2 (M + 1)": 2 * (tokens + 1), "D": width, "D'": width}
        yield Term("series: pooling, projection, summary", (pooled, joined))


def _table(config: ModelConfig, inputs: Inputs) -> Iterator[Term]:
    """Field embeddings, bidirectional layers, projection and summary of the record."""
    if inputs.table is not None:
        cases, fields = inputs.table.shape
        width, features = config.decoder.hidden_size, 2 * config.table.frequencies + 2
        each: Product = {"fields": cases * fields, "I": features, "D": width}
        yield Term("table: fields", (each,))
        yield from _encoder_layers("table", config.table.layers, cases, fields, width)
        ends = ({"fields": cases * fields, "D": width, "D'": width}, {"cases": cases, "2 D": 2 * width, "D": width})
        yield Term("table: projection, summary", ends)


def _text(config: ModelConfig, inputs: Inputs, summarised: bool) -> Iterator[Term]:
    """Two convolutions of eight bytes over the text, and its summary, where there are task heads."""
    if inputs.text is not None and summarised:
        (cases, length), width = inputs.text.shape, config.decoder.hidden_size
        convolutions = {"tokens": cases * length, "2 x 8 taps": 16, "D": width, "D'": width}
        ends = [{"cases": cases, "2 D": 2 * width, "D": width}]
        if config.text_merge > 1:
            ends.append({"groups": cases * length // config.text_merge, "2 D": 2 * width, "D": width})
        yield Term("text: summary", (convolutions, *ends))


def _modality_tokens(config: ModelConfig, inputs: Inputs) -> int:
    """Places that the encoders take in the decoder's sequence."""
    count = 0 if inputs.table is None else inputs.table.shape[1]
    count += 0 if inputs.series is None else inputs.series.shape[1] * (config.series.tokens + 1)
    for name, shape in (("volume", inputs.volume), ("image", inputs.image)):
        if shape is not None:
            vision = getattr(config, name)
            cell = vision.stem_stride * 2 ** (len(vision.widths) - 1) * vision.merge
            count += math.prod(n // cell for n in vision.size)
    return count
