"""Checkpoints of many shapes against `transformers`, both ways and both passes (needs torch and transformers)."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r1jax.__main__ import dispatch
from r1jax.config import DecoderConfig, YarnConfig
from r1jax.errors import UserError
from r1jax.hf.forward import logits_of, whole
from r1jax.hf.load import load_params, read_config
from r1jax.hf.names import ROUTER_BIAS
from r1jax.hf.save import save_params
from r1jax.hf.verify import memory_names, verify
from r1jax.models import moe
from r1jax.models.decoder import Decoder
from r1jax.models.lora import merge_lora
from r1jax.ops.losses import cross_entropy
from r1jax.serve.pretrained import open_pretrained
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import CheckpointFolder
from tests.hf import reference
from tests.hf.checkpoints import quantise, write_folder, write_tokenizer
from tests.hf.test_save import random_params
from tests.models.test_decoder import run_all

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
        reason="torch and transformers are not installed (r1jax[hf])",
    ),
    pytest.mark.filterwarnings("ignore"),  # theirs
]
ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}  # compiles faster
GREEDY = {"arch": "v2", "topk_method": "greedy", "n_group": None, "topk_group": None}
ODD = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "kv_lora_rank": 13, "q_lora_rank": 11, "v_head_dim": 7}
ODD["norm_topk_prob"] = False  # with top 1 the router would have no gradient
THREE = {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "num_attention_heads": 5, "num_key_value_heads": 5}
HF_TEST = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
HF_TEST |= {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32}
HF_TEST |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4, "rope_scaling": None}
"""The shapes of the tests of `transformers` itself, with a choice of experts that their groups allow."""
PLAIN_YARN = {key: value for key, value in reference.YARN.items() if not key.startswith("mscale")}
CASES = {
    "default": {"padding": 3, "n_shared_experts": 2},
    "dense only": {"num_hidden_layers": 1},
    "no query compression": {"q_lora_rank": None, **ONE_LAYER},
    "no yarn": {"rope_scaling": None, "norm_topk_prob": False, **ONE_LAYER},
    "yarn without mscale": {"rope_scaling": PLAIN_YARN, **ONE_LAYER},
    "rope in halves": {"rope_interleave": False, **ONE_LAYER},
    "big eps": {"rms_norm_eps": 1e-2, **ONE_LAYER},
    "one group, top 1, odd ranks": {**ODD, **ONE_LAYER},
    "three groups": {**THREE, **ONE_LAYER},
    "hf_test": {**HF_TEST, "seed": 7, "padding": 2},
    "top 1, a router without gradient": {"num_experts_per_tok": 1, "seed": 11, **ONE_LAYER},
    "mtp": {"mtp": True, "seed": 3, **ONE_LAYER},
    "mtp, no query compression": {"mtp": True, "seed": 4, "q_lora_rank": None, "rope_scaling": None, **ONE_LAYER},
    "v2, groups": {"arch": "v2", "padding": 5},
    "v2, greedy": {"q_lora_rank": None, **GREEDY, **ONE_LAYER},
    "v2, one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1, **GREEDY, **ONE_LAYER},
}


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.tobytes() == other[name].tobytes(), name


def assert_mtp_gradients(config, params, tokens, expected):
    """Of the loss of the token after next, for all tensors of the MTP module and what it takes from the main model."""
    tokens = jnp.asarray(tokens)

    @jax.jit
    @jax.grad
    def gradient(params):
        second = Decoder(config).apply({"params": params}, tokens, method=run_all)[1]
        return jnp.mean(cross_entropy(second[:, :-1], tokens[:, 2:]))

    found = {tuple(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(gradient(params))}
    named = {f"mtp_grad/{name}": path for name, path in memory_names(config) if path[-1] != ROUTER_BIAS}
    assert named.keys() == expected.keys()
    assert sum(path[0] == "mtp" for path in named.values()) > 12
    for name, path in named.items():
        size = np.linalg.norm(expected[name])
        assert size > 0 and np.linalg.norm(np.asarray(found[path]) - expected[name]) <= 1e-4 * size, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_everything_equals_transformers(tmp_path, case):
    arrays = reference.make(tmp_path / "theirs", **case)
    second = {name: arrays.pop(name) for name in list(arrays) if name.startswith("mtp_grad/")}
    assert 0.5 < arrays["logits"].std() < 2
    report = verify(tmp_path / "theirs")
    rows = {row.name: row for row in report.rows}
    assert rows.keys() == arrays.keys() - {"input_ids"}, "something was not compared"
    for name, row in rows.items():
        assert row.holds, row
        if name.startswith("grad/"):
            assert row.tolerance == 1e-4
        elif name.startswith("topk_idx"):
            assert row.tolerance == 0
        else:
            assert row.difference <= 5e-6 * max(1, arrays[name].std()), row

    config = read_config(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", config)
    if case.get("mtp"):
        assert_mtp_gradients(config, params, arrays["input_ids"], second)
    published = reference.published(tmp_path / "theirs")
    save_params(tmp_path / "ours", config, params, base=published, shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert_same_tensors(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    assert reference.published(tmp_path / "ours") == {k: v for k, v in published.items() if k != "transformers_version"}
    if not case.get("mtp"):  # of which `transformers` knows the published layer 61 only
        import torch

        model = reference.load(tmp_path / "ours", case.get("arch", "v3"), "float32")
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(arrays["input_ids"]).long()).logits.numpy()
        np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("arch", "mtp"), [("v3", False), ("v2", False), ("v3", True)])
def test_block_fp8_equals_what_it_stands_for(tmp_path, arch, mtp):
    """`transformers` runs the dequantised weights: it cannot read ragged blocks itself."""
    import torch

    change = {"hidden_size": 144, "moe_intermediate_size": 136, "q_lora_rank": 130, **ONE_LAYER}
    reference.make(tmp_path / "plain", arch, mtp=mtp, **change)
    quantised, plain = quantise(load_file(tmp_path / "plain" / "model.safetensors"))
    assert any(v.shape == (2, 2) for n, v in quantised.items() if n.endswith("scale_inv"))
    assert any(n.startswith("model.layers.1.") for n in quantised if n.endswith("scale_inv")) == mtp
    published = reference.published(tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(24).reshape(2, 12)
    arrays = {"input_ids": ids.numpy().astype(np.int32)}
    model = reference.load(tmp_path / "plain", arch, "float32", mtp_of="model.layers.1." if mtp else None)
    with torch.no_grad():
        arrays["logits"] = model(input_ids=ids).logits.numpy()
    if mtp:
        # Not its states, which reach 4 here: their rounding in `transformers` alone is near the tolerance.
        arrays["mtp_logits"] = reference.run_mtp(model, reference.load_mtp(model), ids)["mtp_logits"]
    told = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = write_folder(tmp_path / "fp8", published | {"quantization_config": told}, quantised, shards=2)
    np.savez(folder / "reference.npz", **arrays)
    rows = verify(folder).rows
    assert {row.name for row in rows} == arrays.keys() - {"input_ids"}
    for row in rows:
        # MTP's logits are of two layers, and CPUs sum in different orders: they were 6.4e-6 apart on one.
        most = 1e-5 if row.name == "mtp_logits" else 5e-6
        assert row.holds and row.difference <= most * max(1, arrays[row.name].std()), row


BF16_KL = 5e-4
"""Mean divergence, in nats, of bf16 from fp32 with the same experts; logits have a standard deviation near 1."""


@pytest.mark.parametrize("seed", [0, 1])
def test_bf16_is_near_fp32_under_the_same_experts(tmp_path, monkeypatch, seed):
    """Near ties of experts flip in bf16, so the choices of fp32 are forced; their weights are those of bf16."""
    arrays = reference.make(tmp_path / "x", seed=seed, dtype="bfloat16")
    config = read_config(tmp_path / "x")
    tokens = jnp.asarray(arrays["input_ids"])
    choose, chosen = moe.select_experts, []

    def record(scores, bias, config):
        experts, weights = choose(scores, bias, config)
        chosen.append(experts)
        return experts, weights

    def force(scores, bias, config):
        experts = chosen.pop(0)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        return experts, weights / jnp.sum(weights, axis=-1, keepdims=True) * config.routed_scaling_factor

    logits = {}
    for dtype, select in (("float32", record), ("bfloat16", force)):
        params = load_params(tmp_path / "x", config, dtype=dtype)
        with monkeypatch.context() as patch:
            patch.setattr(moe, "select_experts", select)
            decoder = Decoder(config, jnp.dtype(dtype))
            logits[dtype] = decoder.apply({"params": params}, tokens, method=run_all)[0]
    log_p, log_q = (jax.nn.log_softmax(logits[dtype]) for dtype in ("float32", "bfloat16"))
    divergence = float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))
    assert 1e-7 < divergence < BF16_KL
    (row,) = verify(tmp_path / "x").rows  # theirs in bf16 against ours in fp32, with free choices
    assert row.holds


def test_verify_asks_transformers_where_there_is_no_reference(tmp_path, monkeypatch):
    import transformers

    reference.make(tmp_path / "x", **ONE_LAYER)
    (tmp_path / "x" / "reference.npz").unlink()
    report = verify(tmp_path / "x")
    assert report.against.startswith("transformers 5") and report.holds
    assert [row.name for row in report.rows] == ["logits"]
    with monkeypatch.context() as patch:
        patch.setattr(transformers.DeepseekV3ForCausalLM, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(UserError, match="transformers cannot run .*division by zero"):
            verify(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        verify(tmp_path / "x")


@pytest.mark.parametrize("arch", ["v3", "v2"])
def test_decoders_made_here_load_there(tmp_path, arch):
    """Without a config.json that came from elsewhere, and in half precision."""
    change = {"v3": {}, "v2": {"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}}
    config = DecoderConfig(num_hidden_layers=2, rope_scaling=YarnConfig(factor=4.0, mscale=0.5), **change[arch])
    params = random_params(config)
    save_params(
        tmp_path / "x", replace(config, num_nextn_predict_layers=0), {k: params[k] for k in params if k != "mtp"}
    )
    import torch

    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    with torch.no_grad():
        theirs = reference.load(tmp_path / "x", arch, "float32")(input_ids=torch.from_numpy(ids).long()).logits.numpy()
    ours = logits_of(config, jax.tree.map(jnp.asarray, params), jnp.asarray(ids), *whole(jnp.asarray(ids)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)
    save_params(tmp_path / "half", config, params, dtype="bfloat16", shard_bytes=100_000)
    if arch == "v2":
        reference.load(tmp_path / "half", arch, "bfloat16")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("own", [True, False], ids=["own tokenizer", "bytes"])
def test_a_fine_tuned_import_loads_there_with_its_tokenizer(tmp_path, own, caplog, request):
    """There -> import -> adapters -> export -> there: no warning, the same logits, the same tokens."""
    import torch
    import transformers

    transformers.logging.enable_propagation()  # so that what it says is seen here
    request.addfinalizer(transformers.logging.disable_propagation)
    texts = ["The old cat sees 3 只猫.", "a\n\n  <b> don't", "<｜end▁of▁sentence｜> é"]
    reference.make(tmp_path / "theirs", vocab_size=320, bos_token_id=0, eos_token_id=1, **ONE_LAYER)
    files = write_tokenizer(tmp_path / "theirs", texts, 300) if own else {}
    assert dispatch(["hf", "import", str(tmp_path / "theirs"), str(tmp_path / "in")]) == 0
    imported = Checkpoint(tmp_path / "in")
    params, config = imported.restore_decoder(), imported.config()
    adapted = params["layers_0"]["self_attn"]["o_proj"]
    rng, (out, into) = np.random.default_rng(0), adapted["weight"].shape
    adapted |= {"lora_a": rng.standard_normal((2, into), np.float32), "lora_b": np.full((out, 2), 0.03, np.float32)}
    config = replace(config, model=replace(config.model, lora_rank=2))
    meta = {"step": 1, "validation": None, "data": {}}
    meta |= {"hugging_face": imported.meta()["hugging_face"]} if own else {}
    CheckpointFolder(tmp_path / "run" / "checkpoints").save(1, {"params": {"decoder": params}}, config, meta, files)
    assert dispatch(["hf", "export", str(tmp_path / "run"), str(tmp_path / "ours")]) == 0

    caplog.clear()
    assert {name: (tmp_path / "ours" / name).read_bytes() for name in files} == files
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    source = open_pretrained(tmp_path / "run")
    ours = source.tokenizer()
    for text in texts:
        assert [ours.first, *tokenizer(text, add_special_tokens=False).input_ids] == ours.encode(text)
        assert own or tokenizer(text).input_ids == ours.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.first, ours.end)
    model = reference.load(tmp_path / "ours", "v3", "float32")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (ours.first, ours.end)
    assert not caplog.records
    ids = jnp.asarray([ours.encode(texts[0])])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids.tolist())).logits.numpy()
    merged = jax.tree.map(jnp.asarray, merge_lora(params, config.model))
    before = load_params(tmp_path / "theirs", source.decoder)
    now, then = (np.asarray(logits_of(source.decoder, x, ids, *whole(ids))) for x in (merged, before))
    np.testing.assert_allclose(logits, now, rtol=0, atol=5e-6 * now.std())
    assert np.abs(logits - then).max() > 0.01
