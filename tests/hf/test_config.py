import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.config import DecoderConfig, YarnConfig
from r1jax.errors import UserError
from r1jax.hf.config import decoder_config, published_config, read_json
from r1jax.ops.rope import inverse_frequencies, softmax_scale, yarn_magnitude
from r1jax.validation import decoder_relations

SHAPES = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
R1 = SHAPES | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": FP8,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
}
LITE = SHAPES | {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
MOONLIGHT = R1 | {"n_group": 1, "topk_group": 1, "n_routed_experts": 64, "num_experts_per_tok": 6, "rope_scaling": None}
MOONLIGHT |= {"q_lora_rank": None, "rope_theta": 50000.0, "num_nextn_predict_layers": 0, "quantization_config": None}


def test_deepseek_r1():
    config = decoder_config(R1, "config.json")
    assert config == DecoderConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        first_k_dense_replace=3,
        num_nextn_predict_layers=1,
        rope_scaling=YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0),
    )
    scale = softmax_scale(192, config.rope_scaling)
    np.testing.assert_allclose(scale, 192**-0.5 * 1.3689**2, rtol=1e-4)


def test_deepseek_v2_lite_and_moonlight():
    lite = decoder_config(LITE, "config.json")
    assert (lite.scoring_func, lite.q_lora_rank, lite.n_group, lite.num_nextn_predict_layers) == ("softmax", None, 1, 0)
    assert lite.rope_scaling.mscale_all_dim == 0.707
    assert decoder_config(LITE | {"q_lora_rank": 0}, "config.json") == lite
    moonlight = decoder_config(MOONLIGHT, "config.json")
    assert (moonlight.n_group, moonlight.rope_scaling, moonlight.rope_theta) == (1, YarnConfig(), 50000.0)


def test_old_and_new_spelling_of_rope_are_one():
    new = {k: v for k, v in R1.items() if k not in ("rope_scaling", "rope_theta")}
    group = {k: v for k, v in R1["rope_scaling"].items() if k != "type"}
    new["rope_parameters"] = group | {"rope_type": "yarn", "rope_theta": 10000.0}
    assert decoder_config(new, "new") == decoder_config(R1, "old")
    assert decoder_config(new | {"rope_scaling": R1["rope_scaling"], "rope_theta": 10000}, "both")
    with pytest.raises(UserError, match="rope_scaling and rope_parameters differ"):
        decoder_config(new | {"rope_scaling": YARN, "rope_theta": 10000}, "both")


@pytest.mark.parametrize("told", [{}, {"mscale": 0.5}, {"mscale_all_dim": 0}])
def test_yarn_without_mscale_all_dim_grows_cosine_and_sine(told):
    yarn = decoder_config(R1 | {"rope_scaling": YARN | told}, "config.json").rope_scaling
    assert softmax_scale(192, yarn) == 192**-0.5
    magnitude = yarn_magnitude(yarn.factor, yarn.mscale) / yarn_magnitude(yarn.factor, yarn.mscale_all_dim)
    np.testing.assert_allclose(magnitude, 0.1 * np.log(40) + 1)  # `_compute_yarn_parameters` of transformers
    assert inverse_frequencies(64, 10000.0, yarn)[-1] < inverse_frequencies(64, 10000.0, YarnConfig())[-1]


BAD = {
    "attention_bias": (R1, {"attention_bias": True}),
    "mlp_bias": (LITE, {"mlp_bias": True}),
    "tie_word_embeddings": (R1, {"tie_word_embeddings": True}),
    "moe_layer_freq": (R1, {"moe_layer_freq": 2}),
    "hidden_act": (R1, {"hidden_act": "gelu"}),
    "rope_scaling.rope_type": (R1, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "rope_scaling.factor": (R1, {"rope_scaling": {"type": "yarn"}}),
    "rope_scaling.truncate": (R1, {"rope_scaling": R1["rope_scaling"] | {"truncate": False}}),
    "rope_scaling.attention_factor": (R1, {"rope_scaling": R1["rope_scaling"] | {"attention_factor": 2.0}}),
    "rope_scaling.long_factor": (R1, {"rope_scaling": R1["rope_scaling"] | {"long_factor": [1.0]}}),
    "rope_scaling.mscale": (R1, {"rope_scaling": YARN | {"mscale_all_dim": 1.0}}),
    "rope_scaling": (R1, {"rope_scaling": "yarn"}),
    "rope_theta": (R1, {"rope_theta": None}),
    "quantization_config.quant_method": (R1, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "quantization_config.fmt": (R1, {"quantization_config": FP8 | {"fmt": "e5m2"}}),
    "quantization_config.weight_block_size": (R1, {"quantization_config": FP8 | {"weight_block_size": [1, 128]}}),
    "scoring_func": (R1, {"scoring_func": "softmax"}),
    "topk_method": (R1, {"topk_method": "greedy"}),
    "num_nextn_predict_layers": (R1, {"num_nextn_predict_layers": 2}),
    "num_key_value_heads": (R1, {"num_key_value_heads": 8}),
    "n_shared_experts": (R1, {"n_shared_experts": None}),
    "n_group": (R1, {"n_group": None}),
    "topk_group": (R1, {"topk_group": 9}),
    "n_routed_experts": (R1, {"n_routed_experts": 255}),
    "num_experts_per_tok": (R1, {"num_experts_per_tok": 0}),
    "hidden_size": (R1, {"hidden_size": "big"}),
    "rms_norm_eps": (R1, {"rms_norm_eps": float("nan")}),
    "norm_topk_prob": (LITE, {"norm_topk_prob": True}),
    "rope_interleave": (LITE, {"rope_interleave": False}),
}


@pytest.mark.parametrize(("name", "base", "change"), [(n, *v) for n, v in BAD.items()], ids=BAD)
def test_what_cannot_be_honoured_is_refused_by_name(name, base, change):
    with pytest.raises(UserError) as caught:
        decoder_config(base | change, "folder/config.json")
    assert f" {name} " in str(caught.value) and str(caught.value).startswith("folder/config.json ")
    assert "\n" not in str(caught.value)


def test_everything_wrong_is_said_at_once():
    published = R1 | {"attention_bias": True, "hidden_act": "gelu", "rope_scaling": {"type": "longrope"}}
    del published["v_head_dim"], published["q_lora_rank"]
    with pytest.raises(UserError) as caught:
        decoder_config(published, "x")
    for told in ("attention_bias is True", "hidden_act is 'gelu'", "'longrope'", "v_head_dim is missing"):
        assert told in str(caught.value)
    assert "q_lora_rank is missing" in str(caught.value)


def test_other_models_are_refused():
    for kind in ("deepseek_v32", "llama", None):
        with pytest.raises(UserError, match=f"model_type is {kind!r}, but r1jax reads deepseek_v3 and deepseek_v2"):
            decoder_config(R1 | {"model_type": kind}, "x")


@pytest.mark.parametrize("published", [R1, LITE, MOONLIGHT], ids=["r1", "v2-lite", "moonlight"])
def test_what_was_imported_is_exported(published):
    again = published_config(decoder_config(published, "x"), "bfloat16", published)
    kept = {k: v for k, v in published.items() if k not in ("auto_map", "quantization_config")}
    assert again.items() >= kept.items()
    assert "auto_map" not in again and "quantization_config" not in again


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scoring_func": "softmax", "norm_topk_prob": True}, "norm_topk_prob"),
        ({"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 1}, "num_nextn_predict"),
        ({"rope_scaling": YarnConfig(factor=2.0, mscale=0.5, mscale_all_dim=0.0)}, "rope_scaling"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
    ],
)
def test_decoders_that_hugging_face_lacks_are_not_exported(change, told):
    with pytest.raises(UserError, match=told):
        published_config(replace(DecoderConfig(), **change), "float32")


@st.composite
def decoders(draw):
    """Valid decoders of any kind that Hugging Face has."""
    softmax = draw(st.booleans())
    groups = draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1 if groups == 1 or softmax else 2, 4))
    kept = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 3))
    wide = draw(st.floats(1, 64))
    yarn = draw(st.sampled_from([YarnConfig(), YarnConfig(wide, 16), YarnConfig(wide, 16, 8.0, 2.0, 0.7, 0.9)]))
    return DecoderConfig(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 12)),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.integers(1, 3)),
        q_lora_rank=draw(st.none() | st.integers(1, 9)),
        kv_lora_rank=draw(st.integers(1, 9)),
        qk_nope_head_dim=draw(st.integers(1, 9)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 12)),
        moe_intermediate_size=draw(st.integers(1, 9)),
        n_routed_experts=experts,
        n_shared_experts=draw(st.integers(1, 2)),
        num_experts_per_tok=draw(st.integers(1, kept * (experts // groups))),
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=not softmax and draw(st.booleans()),
        routed_scaling_factor=draw(st.floats(0.5, 16)),
        scoring_func="softmax" if softmax else "sigmoid",
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_nextn_predict_layers=0 if softmax else draw(st.integers(0, 1)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        rope_theta=draw(st.floats(10, 1e6)),
        rope_interleave=softmax or draw(st.booleans()),
        rope_scaling=yarn,
        initializer_range=draw(st.floats(0.1, 1)),
    )


@settings(max_examples=200)
@given(decoders(), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_every_decoder_comes_back(config, dtype):
    assert all(holds for holds, _, _ in decoder_relations(config))
    published = json.loads(json.dumps(published_config(config, dtype)))
    back = decoder_config(published, "x")
    assert replace(back, rope_scaling=config.rope_scaling) == config
    if config.rope_scaling.factor > 1:
        assert back == config
    assert published_config(back, dtype, published) == published


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=5
)


@settings(max_examples=300)
@given(st.sampled_from([R1, LITE]), st.data())
def test_any_value_is_taken_or_refused(base, data):
    key = data.draw(st.sampled_from(sorted(base)))
    value = data.draw(JSON | st.dictionaries(st.sampled_from(sorted(YARN | FP8 | {"rope_type": 0})), JSON))
    try:
        decoder_config(base | {key: value}, "x")
    except UserError as error:
        assert str(error).startswith("x")


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "does not exist"), (b"{", "is no JSON"), (b"[" * 99999, "no JSON"), (b"[]", "holds \\[")],
)
def test_files_that_are_no_config(tmp_path, content, told):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_json(path)
