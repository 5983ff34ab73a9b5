import dataclasses
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.config import MeshConfig
from r1jax.errors import UserError
from r1jax.hf import load, place, weights
from r1jax.hf.config import decoder_config
from r1jax.hf.files import open_folder
from r1jax.hf.load import load_params, read_config
from r1jax.hf.weights import Weight
from r1jax.models.decoder import Decoder
from r1jax.parallel import mesh as meshes
from tests.hf.checkpoints import params_by_name, quantise, stored, write_folder
from tests.models.test_decoder import run_all


@pytest.fixture(params=["v3", "v2"])
def arch(request):
    return request.param


def assert_holds(params, config, tensors):
    """Every tensor on disk is in the tree, and nothing else but the zero bias of V2."""
    found = params_by_name(params, config)
    extra = {name for name in found if name not in tensors}
    assert all(name.endswith("e_score_correction_bias") and not found[name].any() for name in extra)
    assert found.keys() - extra == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_finds_its_place(tmp_path, arch, shards):
    published, tensors, _ = stored(arch)
    folder = write_folder(tmp_path, published, tensors, shards)
    config, told = read_config(folder), []
    params = load_params(folder, config, progress=lambda done, total: told.append((done, total)))
    assert_holds(params, config, tensors)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert told[-1] == (total, total) and told == sorted(told)
    tokens = jnp.zeros((1, 3), jnp.int32)
    shapes = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), tokens, method=run_all))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize("staged", [place.STAGED_BYTES, 3000], ids=["staged", "in parts"])
@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (2, 4)])
def test_shards_hold_what_the_whole_holds(monkeypatch, tmp_path, arch, data, fsdp, staged):
    monkeypatch.setattr(meshes, "SMALLEST_SHARDED", 1)
    monkeypatch.setattr(place, "STAGED_BYTES", staged)
    monkeypatch.setattr(weights, "READ_BYTES", 1000)  # several blocks even of small tensors
    published, tensors, _ = stored(arch)
    folder = write_folder(tmp_path, published, tensors)
    config, mesh = read_config(folder), meshes.make_mesh(MeshConfig(data=data, fsdp=fsdp))
    params = load_params(folder, config, mesh=mesh)
    assert_holds(params, config, tensors)
    assert jax.tree.map(lambda x: x.sharding, params) == meshes.shard_tree(mesh, params)
    cut = {str(x.sharding.spec) for x in jax.tree.leaves(params) if not x.is_fully_replicated}
    assert len(cut) > 1, "rows and columns must both be cut"


@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, kind, wanted):
    published, tensors, _ = stored("v3")
    fp32 = ("e_score_correction_bias", "mlp.gate.weight") if kind != np.float16 else ()
    tensors = {n: v if n.endswith(fp32) else v.astype(kind) for n, v in tensors.items()}
    folder = write_folder(tmp_path, published, tensors)
    config = read_config(folder)
    params = load_params(folder, config, dtype=wanted)
    for name, value in params_by_name(params, config).items():
        expected = value.dtype if wanted is None else np.dtype(wanted)
        if wanted is None:
            expected = tensors[name].dtype
        if name.endswith("bias") or tensors[name].dtype == np.float32 and name.endswith("gate.weight"):
            expected = np.dtype(np.float32)
        assert value.dtype == expected, name
        np.testing.assert_array_equal(value, tensors[name].astype(np.float32).astype(expected), strict=True)


def test_block_fp8_is_dequantised_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "READ_BYTES", 40_000)
    published, tensors, _ = stored("v3")
    rng = np.random.default_rng(0)
    published |= {"hidden_size": 144, "intermediate_size": 272, "moe_intermediate_size": 136, "q_lora_rank": 130}
    published |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    config = decoder_config(published, "test")
    leaves = [piece for leaf in load.layout(config) for piece in leaf.pieces]
    tensors = {piece.name: rng.standard_normal(piece.shape).astype(np.float32) for piece in leaves}
    quantised, plain = quantise(tensors)
    assert any(min(v.shape) > 1 for n, v in quantised.items() if n.endswith("scale_inv"))
    told = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = write_folder(tmp_path, published | {"quantization_config": told}, quantised, shards=2)
    assert read_config(folder) == config
    assert_holds(load_params(folder, config, dtype=jnp.float32), config, plain)
    half = params_by_name(load_params(folder, config), config)
    for name, value in plain.items():
        kind = ml_dtypes.bfloat16 if f"{name}_scale_inv" in quantised else np.float32
        np.testing.assert_array_equal(half[name], value.astype(kind), err_msg=name, strict=True)


@settings(max_examples=40)
@given(st.data())
def test_any_block_is_right(tmp_path_factory, data):
    rows, columns = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    value = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    quantised, plain = quantise({"x_proj": value})
    tensors = open_folder(write_folder(tmp_path_factory.mktemp("rows"), {}, quantised))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "READ_BYTES", data.draw(st.integers(1, 50_000)))
        weight = Weight(tensors, "x_proj")
        blocks = list(weight.blocks())
        assert max(b.stop - b.start for b in blocks) * columns * 4 <= max(weights.READ_BYTES, columns * 4)
        np.testing.assert_array_equal(np.concatenate([weight.read(rows) for rows in blocks]), plain["x_proj"])


def test_missing_surplus_and_misshapen_tensors_are_one_error(tmp_path):
    published, tensors, _ = stored("v3")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["lm_head.weight"] = np.zeros((24, 48), np.float32)
    tensors["model.norm.weight"] = np.zeros(24, np.int32)
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # old checkpoints have it
    folder = write_folder(tmp_path, published, tensors)
    with pytest.raises(UserError) as caught:
        load_params(folder, read_config(folder))
    assert str(caught.value) == (
        f"the tensors of {folder} are not those of its config; missing: model.layers.1.mlp.experts.3.up_proj.weight; "
        "surplus: model.layers.0.self_attn.q_proj.weight; of another shape: lm_head.weight [24, 48] instead of "
        "[48, 24]; of a wrong dtype: model.norm.weight I32."
    )


def test_long_lists_of_names_are_counted(tmp_path):
    published, tensors, _ = stored("v3")
    folder = write_folder(tmp_path, published, {n: v for n, v in tensors.items() if "layers.1." not in n})
    with pytest.raises(UserError, match=r"missing: (\S+, ){19}\S+ and 18 more\.$"):
        load_params(folder, read_config(folder))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("_scale_inv", None, "missing: {}_scale_inv"),
        ("_scale_inv", np.ones((2, 1), np.float32), "{}_scale_inv [2, 1] instead of [1, 1]"),
        ("_scale_inv", np.ones((1, 1), np.float16), "of a wrong dtype: {}_scale_inv F16"),
        ("", np.zeros((20, 24), np.float32), "surplus: {}_scale_inv"),
        ("", np.zeros((20, 24), ml_dtypes.float8_e5m2), "of a wrong dtype: {} F8_E5M2"),
    ],
)
def test_fp8_needs_its_scale(tmp_path, name, value, told):
    published, tensors, _ = stored("v3")
    tensor = "model.layers.0.self_attn.q_a_proj.weight"
    tensors |= quantise({tensor: tensors[tensor]})[0]
    tensors[tensor + name] = value
    folder = write_folder(tmp_path, published, {n: v for n, v in tensors.items() if v is not None})
    with pytest.raises(UserError) as caught:
        load_params(folder, read_config(folder))
    assert told.format(tensor) in str(caught.value)


def test_two_kinds_of_half_precision_are_a_damaged_header(tmp_path):
    published, tensors, _ = stored("v3")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    folder = write_folder(tmp_path, published, tensors)
    with pytest.raises(UserError, match="F16 and BF16 in one checkpoint"):
        load_params(folder, read_config(folder))


def test_experts_of_several_dtypes_need_one(tmp_path):
    published, tensors, _ = stored("v3")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    folder = write_folder(tmp_path, published, tensors)
    with pytest.raises(UserError, match="give one dtype"):
        load_params(folder, read_config(folder))
    assert_holds(load_params(folder, read_config(folder), dtype="float32"), read_config(folder), stored("v3")[1])


def without_mtp(tensors):
    return {n: v for n, v in tensors.items() if not n.startswith("model.layers.3.")}


def test_mtp_that_the_files_lack_is_left_out_aloud(tmp_path, caplog):
    published, tensors, _ = stored("v3")
    folder = write_folder(tmp_path, published, without_mtp(tensors))
    with caplog.at_level(logging.WARNING):
        config = read_config(folder)
    assert config.num_nextn_predict_layers == 0
    assert "no tensors of multi-token prediction" in caplog.text
    assert_holds(load_params(folder, config), config, without_mtp(tensors))


def test_mtp_can_be_left_out(folders):
    config = dataclasses.replace(read_config(folders["v3"]), num_nextn_predict_layers=0)
    assert_holds(load_params(folders["v3"], config), config, without_mtp(stored("v3")[1]))


def test_a_layer_that_is_no_mtp_is_not_left_out(tmp_path):
    published, tensors, _ = stored("v3")
    folder = write_folder(
        tmp_path, published | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, without_mtp(tensors)
    )
    with pytest.raises(UserError, match=r"surplus: model\.layers\.2\."):
        load_params(folder, read_config(folder))


def test_copies_of_embedding_and_head_must_be_copies(tmp_path):
    published, tensors, _ = stored("v3")
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    repeated = {f"model.layers.3.{copy}.weight": tensors[main].copy() for copy, main in copies.items()}
    folder = write_folder(tmp_path / "same", published, tensors | repeated)
    config = read_config(folder)
    assert_holds(load_params(folder, config), config, tensors)
    for name, value in repeated.items():
        value[-1, -1] += 1
        folder = write_folder(tmp_path / name, published, tensors | repeated)
        with pytest.raises(UserError, match=f"{name} differs from"):
            load_params(folder, config)
        value[-1, -1] -= 1
