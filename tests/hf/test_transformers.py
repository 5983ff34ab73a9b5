"""Checkpoints of many shapes against `transformers`, both ways and both passes (needs torch and transformers)."""

import importlib.util

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax.hf.load import load_params, read_config
from r1jax.hf.save import save_params
from r1jax.hf.verify import verify
from tests.hf import reference

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
    "mtp": {"mtp": True, "seed": 3, **ONE_LAYER},
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_everything_equals_transformers(tmp_path, case):
    arrays = reference.make(tmp_path / "theirs", **case)
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
            assert row.tolerance <= 5.001e-6 * max(1, arrays[name].std())

    config = read_config(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", config)
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
