import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file

from r1jax.config import DecoderConfig, MeshConfig
from r1jax.errors import UserError
from r1jax.hf import save
from r1jax.hf.forward import logits_of, whole
from r1jax.hf.load import load_params, read_config
from r1jax.hf.names import ROUTER_BIAS, layout, nest
from r1jax.hf.save import save_params
from r1jax.parallel import mesh as meshes
from tests.hf.checkpoints import stored, write_folder
from tests.hf.test_config import decoders


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    v2 = config.scoring_func == "softmax"

    def draw(leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if leaf.path[-1] == ROUTER_BIAS:
            return np.zeros_like(noise) if v2 else 0.3 * noise - 1.5
        if len(leaf.shape) == 1:
            return 1 + 0.3 * noise
        return noise if leaf.path == ("embed_tokens",) else noise * np.float32(leaf.shape[-1] ** -0.5)

    return nest({leaf.path: draw(leaf) for leaf in layout(config)})


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("arch", ["v3", "v2"])
def test_round_trip_is_bit_identical(tmp_path, arch, kind):
    published, tensors, _ = stored(arch)
    tensors = {n: v if ROUTER_BIAS in n else v.astype(kind) for n, v in tensors.items()}
    if arch == "v3":  # as published, the MTP module repeats embedding and head
        tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"]
    folder = write_folder(tmp_path / "in", published, tensors, shards=2)
    config = read_config(folder)
    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=8))
    told = []
    save_params(
        tmp_path / "out",
        config,
        load_params(folder, config, mesh=mesh),
        base=published,
        generation={"temperature": 0.6},
        shard_bytes=9_000,
        progress=lambda done, total: told.append((done, total)),
    )
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = tensors_of(tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(v.dtype == again[n].dtype and v.tobytes() == again[n].tobytes() for n, v in tensors.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = sum(v.nbytes for v in tensors.values())
    assert index["metadata"]["total_size"] == total and told[-1] == (total, total)
    assert index["weight_map"].keys() == tensors.keys()
    name = np.dtype(kind).name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.6}
    assert read_config(tmp_path / "out") == config


def test_small_decoders_are_one_file(tmp_path):
    config = DecoderConfig(num_hidden_layers=1)
    save_params(tmp_path / "new" / "out", config, random_params(config))
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ]
    generation = json.loads((tmp_path / "new" / "out" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


@settings(max_examples=25)
@given(decoders())
def test_any_decoder_is_saved_and_loaded(tmp_path_factory, config):
    folder, params = tmp_path_factory.mktemp("any") / "out", random_params(config)
    save_params(folder, config, params, shard_bytes=2000)
    again = load_params(folder, read_config(folder))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b), strict=True), params, again)


@settings(max_examples=4)
@given(decoders())
def test_any_decoder_runs(config):
    tokens = jnp.zeros((1, 3), jnp.int32)
    logits = jax.jit(lambda params: logits_of(config, params, tokens, *whole(tokens)))(random_params(config))
    assert logits.shape == (1, 3, config.vocab_size) and np.isfinite(logits).all()


def test_casts_keep_the_router_in_fp32(tmp_path):
    config = DecoderConfig(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    params = random_params(config)
    save_params(tmp_path / "out", config, params, dtype="bfloat16")
    tensors = tensors_of(tmp_path / "out")
    wide = {n for n, v in tensors.items() if v.dtype == np.float32}
    assert wide == {f"model.layers.0.mlp.gate.{name}" for name in ("weight", ROUTER_BIAS)}
    expected = params["layers_0"]["self_attn"]["o_proj"]["weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.o_proj.weight"], expected, strict=True)
    params["norm"]["weight"][0] = 1e6
    with pytest.raises(UserError, match=r"model.norm.weight has numbers beyond the range of float16"):
        save_params(tmp_path / "half", config, params, dtype="float16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p.pop("norm"), "norm/weight"),
        (lambda p: p.update(extra=np.zeros(3, np.float32)), "extra"),
        (lambda p: p["norm"].update(weight=np.zeros(3, np.float32)), "norm/weight"),
        (lambda p: p["norm"].update(weight=np.zeros(96)), "norm/weight"),
    ],
)
def test_parameters_of_another_decoder_are_refused(tmp_path, change, told):
    config = DecoderConfig(num_hidden_layers=1)
    params = random_params(config)
    change(params)
    with pytest.raises(UserError, match=f"not those of the config: {told}"):
        save_params(tmp_path / "out", config, params)


def test_a_bias_that_deepseek_v2_lacks_must_be_zero(tmp_path):
    config = DecoderConfig(scoring_func="softmax", norm_topk_prob=False, num_nextn_predict_layers=0)
    params = random_params(config)
    params["layers_1"]["mlp"]["gate"][ROUTER_BIAS][0] = 0.1
    with pytest.raises(UserError, match="layers_1/mlp/gate/e_score_correction_bias is not zero"):
        save_params(tmp_path / "out", config, params)


@pytest.fixture
def small():
    config = DecoderConfig(num_hidden_layers=1, num_nextn_predict_layers=0)
    return config, random_params(config)


def test_nothing_is_overwritten(tmp_path, small):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    for path in (taken, taken / "mine"):
        with pytest.raises(UserError, match="exists and is not empty"):
            save_params(path, *small)
    assert (taken / "mine").read_text() == "x"
    (tmp_path / "empty").mkdir()
    save_params(tmp_path / "empty", *small)
    assert read_config(tmp_path / "empty") == small[0]


@pytest.mark.parametrize("call", ["disk_usage", "fsync", "rename"])
def test_a_failure_leaves_nothing(tmp_path, small, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    if call == "disk_usage":
        monkeypatch.setattr(save.shutil, call, lambda _: shutil._ntuple_diskusage(1, 1, 10))
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(type(tmp_path), "rename", full)
    with pytest.raises(UserError, match="cannot be written .*No space left on device"):
        save_params(tmp_path / "out", *small)
    assert list(tmp_path.iterdir()) == []
