"""The whole model of rounded numbers: what is ruled, what is multiplied, and that stored codes serve as trained."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig, ModelConfig, TableConfig, VisionConfig
from r1jax.errors import UserError
from r1jax.models.lora import join_trees
from r1jax.models.quantized import RANGE, check_ranges, check_rules, rounding_by, scheme_for, uses
from r1jax.models.r1 import R1, Inputs
from r1jax.models.table import TableEncoder
from r1jax.ops.quantized_dot import Scheme
from r1jax.train.quantized import nearest_codes, with_codes
from r1jax.train.ranges import split_ranges, with_ranges

HEADS = (("nodule_present", 1), ("center_mm", 3))
CONFIG = ModelConfig(
    modalities=("volume", "table", "text"),
    decoder=DecoderConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        initializer_range=0.3,
    ),
    volume=VisionConfig(size=(8, 8, 8), stem_stride=4, widths=(8,), blocks=(1,), layers=0),
    table=TableConfig(layers=0, frequencies=2),
    text_tokens=6,
)
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


def draw_inputs(batch: int) -> Inputs:
    rng = np.random.default_rng(0)
    return Inputs(
        volume=jnp.asarray(rng.standard_normal((batch, 8, 8, 8)), jnp.float32),
        volume_spacing=jnp.ones((batch, 3)),
        has_volume=jnp.ones(batch, bool),
        table=jnp.asarray(rng.standard_normal((batch, 3)), jnp.float32),
        has_table=jnp.ones(batch, bool),
        text=jnp.asarray(rng.integers(0, 16, (batch, 6)), jnp.int32),
        text_valid=jnp.ones((batch, 6), bool),
    )


def model_of(*quant: str) -> R1:
    return R1(replace(CONFIG, quant=quant), HEADS)


@pytest.fixture(scope="module")
def inputs():
    return draw_inputs(2)


@pytest.fixture(scope="module")
def found(inputs):
    """Every product with a weight."""
    return uses(model_of().init, jax.random.key(0), inputs, language=True)


@pytest.fixture(scope="module")
def params(inputs):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model_of().init(jax.random.key(0), inputs, language=True))["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) / s.shape[-1] ** 0.5, jnp.float32), shapes)


def run(model, params, inputs):
    out = model.apply({"params": params}, inputs, language=True)
    return out.heads, out.text_logits


def products(model, params, inputs) -> list[str]:
    """Types of all products of the traced program, and of its convolutions."""
    text = str(jax.make_jaxpr(lambda p, x: run(model, p, x))(params, inputs))
    return re.findall(r":(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)\[", text)


def test_every_weight_is_found_by_its_path_and_role(found, params):
    shapes = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in jax.tree.leaves_with_path(params)
    }
    assert {use.name: use.shape for use in found}.items() <= shapes.items()
    left = {name.rpartition("/")[2] for name in shapes.keys() - {use.name for use in found}}
    assert left == {"weight", "bias", "frequency", "e_score_correction_bias"}
    assert all("norm" in n or "gate/" in n for n in shapes.keys() - {u.name for u in found} if n.endswith("weight"))
    roles = {use.name: use.role for use in found}
    assert roles["decoder/embed_tokens"] == roles["queries"] == roles["volume/position"] == "embedding"
    assert roles["volume/stage_0_block_0/first/weight"] == "convolution" and roles["table/weight"] == "fields"
    assert roles["decoder/layers_0/mlp/experts/down_proj"] == "experts" and roles["decoder/lm_head/weight"] == "head"


@pytest.mark.parametrize("batch", [2, 16])  # 16 is a width of the model: weights are not known by their shapes
def test_every_ruled_product_is_of_int8_and_all_others_stay_of_floats(batch, found, params):
    inputs = draw_inputs(batch)
    floats, narrow = (products(model_of(*quant), params, inputs) for quant in ((), ("int8",)))
    ruled = sum(use.role != "embedding" for use in found)
    assert narrow.count("i32") == ruled and narrow.count("f32") == len(floats) - ruled
    assert len(narrow) == len(floats) and set(floats) == {"f32"}


def test_gradients_of_the_weights_of_fields_are_products_of_int8():
    model = TableEncoder(TableConfig(layers=0, frequencies=2), 16)
    table = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
    params = model.init(jax.random.key(0), table)["params"]

    def slope(weight):
        with rounding_by(("^weight=int8:int8:int8",)):
            rngs = {"rounding": jax.random.key(1)}
            return model.apply({"params": {**params, "weight": weight}}, table, rngs=rngs)[1].sum()

    text = str(jax.make_jaxpr(jax.grad(slope))(params["weight"]))
    assert re.findall(r":i32\[([\d,]*)\] = dot_general\[", text)[-1] == "3,16,6"  # fields, outputs, inputs


def test_blocks_and_4_bits_are_multiplied_as_int8_too(found, params, inputs):
    narrow = products(model_of(".=int4/8:int8"), params, inputs)
    assert narrow.count("i32") == sum(use.role != "embedding" for use in found)


def test_weights_alone_leave_products_of_floats(params, inputs):
    assert set(products(model_of("int4"), params, inputs)) == {"f32"}


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_stored_codes_serve_what_was_trained(quant, found, params, inputs):
    model = model_of(quant)
    with rounding_by(model.config.quant):
        codes = nearest_codes(params, found)
    assert codes.keys() == {use.name for use in found}
    forward = jax.jit(lambda p, x: run(model, p, x))
    trained, served = forward(params, inputs), forward(with_codes(params, codes), inputs)
    # Sums of integers have no order; those of floats, with weights alone rounded, are the compiler's.
    atol = 0 if quant == "int8" else 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), trained, served)


def test_codes_with_ranges_serve_what_was_trained_with_them(found, params, inputs):
    """Convolutions, encoders and heads too; half of the weights have met no input yet."""
    model = model_of("int8_running")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, language=True))["params"]
    ranges, _ = split_ranges(shapes)
    values = [jnp.float32(i % 2) for i in range(len(jax.tree.leaves(ranges)))]
    ranges = jax.tree.unflatten(jax.tree.structure(ranges), values)
    with rounding_by(model.config.quant):
        codes = with_ranges(nearest_codes(params, found), ranges)
    assert 0 < sum(q.span is not None for q in codes.values()) < len(values)
    forward = jax.jit(lambda p, x: run(model, p, x))
    trained, served = forward(join_trees(params, ranges), inputs), forward(with_codes(params, codes), inputs)
    jax.tree.map(np.testing.assert_array_equal, trained, served)
    free = forward(join_trees(params, jax.tree.map(jnp.zeros_like, ranges)), inputs)
    assert not np.array_equal(free[1], trained[1])


def test_modules_divide_inputs_by_the_balance_of_a_weight(found, params, inputs):
    """Weights that are all multiplied by a power of two, and their inputs divided by it, serve the same numbers."""
    rng, model = np.random.default_rng(2), model_of("int8")
    with rounding_by(model.config.quant):
        plain = nearest_codes(params, found)
    balanced = dict(plain)
    for use in found:
        if use.role in ("linear", "convolution"):
            codes, power = plain[use.name], 2.0 ** rng.choice([-3, -1, 2, 4])
            balance = jnp.full((1, codes.shape[-1]), power, jnp.bfloat16)
            balanced[use.name] = codes._replace(scale=codes.scale * jnp.bfloat16(power), balance=balance)
    forward = jax.jit(lambda p, x: run(model, p, x))
    before, after = (forward(with_codes(params, codes), inputs) for codes in (plain, balanced))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_running_range_stands_beside_each_weight_that_can_have_one(found, inputs):
    init = model_of("head_=int8:int8", "int8_running").init
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), inputs, language=True))["params"]
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(shapes)}
    able = {use.name for use in found if use.role in ("linear", "convolution")}
    able = {name for name in able if not name.startswith("head_") and "down_proj" not in name}
    kept = {name.removesuffix(RANGE) + "weight" for name in names if name.endswith(RANGE)}
    assert kept == able and "volume/stage_0_block_0/first/weight" in kept
    assert {(x.shape, x.dtype.name) for name, x in names.items() if name.endswith(RANGE)} == {((), "float32")}


def test_a_running_range_that_no_weight_can_have_is_refused(found):
    check_ranges(("experts=int8:int8", "int8_running"), found)
    with pytest.raises(UserError, match=r"'mlp/experts' can have a running range .*leave out /running"):
        check_ranges(("mlp/experts=int8:int8/running", "int8_running"), found)


def test_the_first_rule_that_matches_counts():
    path = ("decoder", "layers_0", "self_attn", "o_proj", "weight")
    with rounding_by(("o_proj=int4/32:int8", "embed=fp8:fp8", "int8")):
        assert scheme_for(path, "linear", (4, 4)) == Scheme("int4", "int8", None, 32)
        assert scheme_for(("decoder", "embed_tokens"), "embedding", (4, 4)) == Scheme("fp8")
        assert scheme_for(("head_a", "weight"), "linear", (4, 4)) == Scheme("int8", "int8")
    with rounding_by(("self_attn=float", "int8")):
        assert scheme_for(path, "linear", (4, 4)) is None
    assert scheme_for(path, "linear", (4, 4)) is None


def test_a_rule_that_no_weight_follows_is_refused_with_the_nearest_name(found):
    names = [use.name for use in found]
    check_rules(("experts=float", "int8"), names, CPU)
    with pytest.raises(UserError, match=r"'o_prj'.*did you mean 'o_proj'"):
        check_rules(("o_prj=int8", "int8"), names, CPU)
    with pytest.raises(UserError, match="earlier rules"):
        check_rules(("int8", "experts=float"), names, CPU)
    with pytest.raises(UserError, match="gate/weight"):  # the router is not ruled
        check_rules(("gate/weight=int8",), names, CPU)


def test_a_gpu_without_fp8_is_refused(found):
    names = [use.name for use in found]
    old, new = (
        SimpleNamespace(platform="gpu", device_kind=k, compute_capability=c)
        for k, c in (("A100", "8.0"), ("H100", "9.0"))
    )
    check_rules(("fp8",), names, new)
    check_rules(("int8",), names, old)
    with pytest.raises(UserError, match=r"A100 has none .*8\.0.*use int8"):
        check_rules(("fp8",), names, old)
