import math
from dataclasses import replace

import pytest

from r1jax.hf.config import decoder_config
from r1jax.hf.names import copies, layout, nest
from tests.hf.test_config import LITE, R1


@pytest.mark.parametrize(
    ("published", "billions", "tensors"),
    [
        # DeepSeek-V3 README_WEIGHTS.md: 671B and 11.5B of MTP; 58 + 1 layers of 256 x 3 expert matrices
        (R1, 671.03 + 11.61, 59 * 256 * 3 + 3 * 12 + 59 * 14 + 3 + 4),
        (R1 | {"num_nextn_predict_layers": 0}, 671.03, 58 * 256 * 3 + 3 * 12 + 58 * 14 + 3),
    ],
)
def test_the_published_sizes(published, billions, tensors):
    leaves = layout(decoder_config(published, "x"))
    assert abs(sum(math.prod(leaf.shape) for leaf in leaves) / 1e9 - billions) < 0.01
    names = [piece.name for leaf in leaves for piece in leaf.pieces]
    assert len(set(names)) == len(names) == tensors


def test_published_names():
    """A few names and shapes of the real checkpoint's index."""
    config = decoder_config(R1, "x")
    shapes = {piece.name: piece.shape for leaf in layout(config) for piece in leaf.pieces}
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (18432, 7168)
    assert shapes["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes["model.layers.60.mlp.experts.255.up_proj.weight"] == (2048, 7168)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.61.shared_head.norm.weight"] == (7168,)
    assert shapes["model.layers.5.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert copies(config) == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }
    assert copies(replace(config, num_nextn_predict_layers=0)) == {}


def test_pieces_fill_each_leaf_once():
    config = replace(decoder_config(LITE, "x"), num_hidden_layers=2)
    for leaf in layout(config):
        if leaf.path[-1] == "e_score_correction_bias":
            assert leaf.pieces == ()
        else:
            assert sum(math.prod(piece.shape) for piece in leaf.pieces) == math.prod(leaf.shape)
            assert len({str(piece.place) for piece in leaf.pieces}) == len(leaf.pieces)


def test_nest():
    assert nest({("a", "b"): 1, ("a", "c"): 2, ("d",): 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
