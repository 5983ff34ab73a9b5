import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.language import DEEPSEEK_V3
from r1jax.config import (
    Config,
    DecoderConfig,
    FinanceConfig,
    ModelConfig,
    SeriesConfig,
    TableConfig,
    TaskConfig,
    VisionConfig,
)
from r1jax.data.transaction_history import FEATURES
from r1jax.models.lora import join_trees, split_adapters
from r1jax.models.r1 import R1
from r1jax.tasks.catalog import TASKS
from r1jax.tasks.medical.schema import RECORD_FIELDS
from r1jax.train.flops import work_of
from r1jax.train.peak import peak_flops
from r1jax.train.plan import example_batch

DECODER = DecoderConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=20,
    intermediate_size=160,
    moe_intermediate_size=96,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=2,
    topk_group=2,
    first_k_dense_replace=1,
)
DENSE = replace(DECODER, first_k_dense_replace=3, num_nextn_predict_layers=0)


def language(decoder, **model):
    model = ModelConfig(modalities=("text",), decoder=decoder, text_tokens=40, dropout=0.0, **model)
    return Config(model=model, task=TaskConfig(name="language", label_smoothing=0.0, balance_weight=0.0))


def medical(**model):
    kinds = ("volume", "image", "table", "text")
    volume = VisionConfig(size=(16, 16, 32), stem_stride=2, widths=(16, 32), blocks=(1, 2), layers=2, merge=2)
    image = VisionConfig(size=(32, 16), stem_stride=4, widths=(24, 48), blocks=(2, 0), layers=1)
    table = TableConfig(layers=2, frequencies=3)
    return Config(
        model=ModelConfig(kinds, DECODER, volume, image, table, text_tokens=40, dropout=0.0, **model),
        task=TaskConfig(fields=("nodule_present", "malignancy"), augment="none"),
    )


def finance(**model):
    kinds, series = ("series", "table", "text"), SeriesConfig(layers=2, bins=12, tokens=3)
    few = FinanceConfig(events=24, simulated_customers=60, simulated_days=60)
    return Config(
        model=ModelConfig(kinds, DECODER, series=series, text_tokens=40, text_ngrams=64, dropout=0.0, **model),
        task=TaskConfig(name="finance", finance=few),
    )


def built(config):
    """Model, task and a batch of four cases; only shapes matter."""
    task = TASKS[config.task.name](config)
    small = replace(config, data=replace(config.data, train_cases=8))
    batch = example_batch(TASKS[config.task.name](small).source("train"), task, 4)
    return R1(config.model, task.heads), task, batch


def programs(config):
    """Jaxprs of the loss and of its gradient with respect to what is trained."""
    model, task, batch = built(config)

    def inputs():
        return task.prepare(batch)

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs()[0], language=task.language))["params"]
    trained, frozen = split_adapters(params) if config.model.lora_rank else (params, {})

    def loss(trained, frozen):
        found = model.apply({"params": join_trees(trained, frozen)}, inputs()[0], language=task.language)
        return task.loss(found, *inputs(), jnp.float32(0))[0]

    return [jax.make_jaxpr(f)(trained, frozen).jaxpr for f in (loss, jax.grad(loss))]


def products(jaxpr, times=1):
    """(shapes of operands and result, FLOPs) of every product in a program; loops count as often as they run."""
    for equation in jaxpr.eqns:
        operands = [v.aval for v in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            result = equation.outvars[0].aval
            inner = math.prod(operands[0].shape[i] for i in contracted)
            yield (*(x.shape for x in operands), result.shape), times * 2 * math.prod(result.shape) * inner
        elif equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel, result = operands[1].shape, equation.outvars[0].aval.shape
            each = 2 * math.prod(result) * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            yield (operands[0].shape, kernel, result), times * each
        count = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                yield from products(inside, count)


def counted(jaxpr, config, lengths, cases=4):
    """FLOPs of a program by the conventions of the count: causal at half, experts without the padding of blocks."""
    d, total = config.model.decoder, 0.0
    for shapes, flops in products(jaxpr):
        square = any(s[-2:] == (n, n) for n in lengths for s in shapes if len(s) == 4)
        if square:
            flops /= 2
        for rows in (cases * n * d.num_experts_per_tok for n in lengths):
            blocks = -(-rows // 128) + d.n_routed_experts
            if any(s[:2] == (blocks, 128) for s in shapes) and all(s[0] == blocks for s in shapes):
                flops *= rows / (blocks * 128)
                break
        total += flops
    return total


CASES = {
    "dense": (language(DENSE), (40,)),
    "direct queries": (language(replace(DENSE, q_lora_rank=None)), (40,)),
    "experts": (language(replace(DECODER, num_nextn_predict_layers=0)), (40,)),
    "experts and MTP": (language(DECODER), (40, 39)),
    "adapters": (language(DECODER, lora_rank=4), (40, 39)),
    "streams of payments": (finance(), (2 * 4 + len(FEATURES) + 40 + 1,)),
    "text in fours": (finance(text_merge=4), (2 * 4 + len(FEATURES) + 10 + 1,)),
    "every modality": (medical(), (16 + 8 + len(RECORD_FIELDS) + 40 + 2, 39)),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_programs(name):
    config, lengths = CASES[name]
    _, task, batch = built(config)
    work = work_of(config.model, task, batch)
    forward, both = programs(config)
    assert work.tokens == 4 * lengths[0]
    assert sum(t.forward for t in work.terms) == pytest.approx(counted(forward, config, lengths), rel=0.01)
    expected = counted(both, config, lengths)
    if config.model.lora_rank:  # the loss forms the gradient of the frozen language head all the same
        expected -= sum(term.forward for term in work.terms if "language head" in term.name)
    assert work.flops == pytest.approx(expected, rel=0.02)


def test_dense_count_is_that_of_xla():
    config = language(replace(DENSE, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, vocab_size=1024))
    model, task, batch = built(replace(config, model=replace(config.model, decoder=wide(config.model.decoder))))
    work = work_of(model.config, task, batch)

    def logits(params):
        output = model.apply({"params": params}, task.prepare(batch)[0], language=True)
        return output.text_states[:, :-1] @ output.lm_head.T

    params = jax.eval_shape(lambda: model.init(jax.random.key(0), task.prepare(batch)[0], language=True))["params"]
    counted = jax.jit(logits).lower(params).compile().cost_analysis()["flops"]
    # XLA counts masked scores too, and what is no product.
    masked = next(term.forward for term in work.terms if "scores" in term.name)
    assert sum(term.forward for term in work.terms) + masked == pytest.approx(counted, rel=0.02)


def wide(decoder):
    return replace(decoder, first_k_dense_replace=2, num_attention_heads=2, qk_nope_head_dim=48, v_head_dim=64)


def test_terms_are_shown_with_their_numbers():
    _, task, batch = built(language(DENSE))
    head = next(t for t in work_of(language(DENSE).model, task, batch).terms if t.name == "language head")
    assert head.formula == "2 (tokens 156 x D 64 x V 512)" and head.forward == 2 * 156 * 64 * 512


def test_a_step_of_deepseek_v3_is_near_what_its_parameters_say():
    """37 G active parameters, less the embedding, at 6 FLOPs each a token, and 61 layers of causal attention."""
    decoder = replace(DEEPSEEK_V3, num_nextn_predict_layers=0)
    config = language(decoder)
    shapes = {"text": (1, 4096), "text_valid": (1, 4096)}
    batch = {k: jax.ShapeDtypeStruct(v, bool if "valid" in k else np.int32) for k, v in shapes.items()}
    work = work_of(config.model, TASKS["language"](config), batch)
    attention = 3 * 61 * 4096 * 128 * (192 + 128)
    assert work.flops / 4096 == pytest.approx(6 * (37e9 - 129280 * 7168) + attention, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "dtype", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7e12),
        ("NVIDIA H100 80GB HBM3", "float8", 1978.9e12),
        ("NVIDIA H100 PCIe", "float16", 756e12),
        ("NVIDIA H200", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float8", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("cpu", "float32", None),
        ("NVIDIA L40", "bfloat16", None),
    ],
)
def test_peaks(kind, dtype, rate):
    assert peak_flops(kind, dtype) == rate
