"""The table of weights, against what column and row parallel layers mean, and sums over the published model."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs.language import DEEPSEEK_V3
from r1jax.config import DecoderConfig, MeshConfig
from r1jax.hf.names import layout
from r1jax.parallel.mesh import abstract_mesh, shard_tree
from r1jax.parallel.rules import WEIGHTS, weight_spec
from r1jax.parallel.show import show

SIZES = {"data": 2, "fsdp": 4, "expert": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "shape", "kept", "used"),
    [
        ("decoder/embed_tokens", (264, 64), P("tensor", ("fsdp", "expert")), P("tensor")),
        ("decoder/layers_0/self_attn/q_b_proj/weight", (80, 32), P("tensor", ("fsdp", "expert")), P("tensor")),
        ("decoder/layers_0/self_attn/o_proj/weight", (64, 48), P(("fsdp", "expert"), "tensor"), P(None, "tensor")),
        ("decoder/layers_0/mlp/down_proj/weight", (64, 160), P(("fsdp", "expert"), "tensor"), P(None, "tensor")),
        ("decoder/layers_0/mlp/up_proj/lora_b", (160, 4), P(("tensor", "fsdp", "expert")), P("tensor")),
        ("layers_1/mlp/experts/gate_up_proj", (8, 96, 64), P("expert", "tensor", "fsdp"), P("expert", "tensor")),
        ("layers_1/mlp/experts/down_proj", (8, 64, 48), P("expert", "fsdp", "tensor"), P("expert", None, "tensor")),
        ("1/mu/decoder/layers_0/self_attn/q_a_proj/weight", (32, 64), P(None, ("fsdp", "expert")), P()),
        ("volume/stage_0_block_0/first/weight", (3, 3, 8, 8), P(None, None, ("fsdp", "expert")), P()),
        ("decoder/norm/weight", (12,), P("fsdp"), P()),  # 12 is no multiple of 8
        ("table/layers_0/qkv_proj/weight", (27, 9), P(), P()),
    ],
)
def test_where_a_weight_lies(path, shape, kept, used):
    assert weight_spec(path, shape, SIZES) == kept
    assert weight_spec(path, shape, SIZES, kept=False) == used
    assert weight_spec(path, shape, {"data": 8}) == P()
    assert weight_spec(path, shape, SIZES, smallest=math.prod(shape) + 1) == P()


@pytest.mark.parametrize(
    ("path", "shape", "kept"),
    [
        ("decoder/stages/self_attn/q_b_proj/weight", (4, 80, 32), P("pipe", "tensor", "fsdp")),
        ("1/mu/decoder/stages/mlp/experts/down_proj", (4, 8, 64, 48), P("pipe", None, "fsdp", "tensor")),
        ("decoder/stages/norm/weight", (4, 6), P("pipe")),
        ("decoder/embed_tokens", (264, 64), P(("tensor", "pipe"), "fsdp")),
        ("decoder/layers_0/self_attn/q_a_proj/weight", (32, 64), P("pipe", "fsdp")),
    ],
)
def test_where_a_weight_lies_beside_a_pipeline(path, shape, kept):
    sizes = {"pipe": 2, "fsdp": 4, "tensor": 2}
    assert weight_spec(path, shape, sizes) == kept
    stacked = "/stages/" in path
    alone = weight_spec(path.replace("stages", "layers_1"), shape[1:], {"tensor": 2}, kept=False) if stacked else P()
    used = P("pipe", *alone) if stacked else P("tensor") if "embed" in path else P()
    assert weight_spec(path, shape, sizes, kept=False) == used


def published(config: DecoderConfig):
    return {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for leaf in layout(config)}


def test_every_rule_finds_a_weight():
    paths = ["/".join(path) for path in published(DEEPSEEK_V3)] + ["table/layers_0/qkv_proj/weight", "q_proj/weight"]
    assert [pattern for pattern, _ in WEIGHTS if not any(re.search(pattern, path) for path in paths)] == []


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"expert": 8},
        {"tensor": 4, "fsdp": 2},
        {"fsdp": 64},
        {"expert": 32, "fsdp": 2},
        {"fsdp": 8, "expert": 64},
        {"expert": 64, "tensor": 8},
        {"fsdp": 64, "tensor": 8},
        {"expert": 128, "sequence": 4},
    ],
    ids=str,
)
def test_a_device_keeps_an_even_share_of_deepseek_v3(sizes):
    mesh, tree = abstract_mesh(MeshConfig(data=1, **sizes), 1), published(DEEPSEEK_V3)
    own = sum(
        math.prod(where.shard_shape(leaf.shape))
        for leaf, where in zip(jax.tree.leaves(tree), jax.tree.leaves(shard_tree(mesh, tree)), strict=True)
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert total == pytest.approx(682.6e9, rel=1e-3)  # 671.0 billion and MTP's own 11.6
    assert own == pytest.approx(total / math.prod(sizes.values()), rel=0.02)


def test_the_table_says_what_lies_where():
    mesh = abstract_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 1)
    tree = {
        "embed_tokens": jax.ShapeDtypeStruct((1024, 512), jnp.float32),
        "norm": jax.ShapeDtypeStruct((512,), jnp.float32),
    }
    lines = [
        re.split(r"\s{2,}", line.strip()) for line in show(mesh, {"parameters": tree, "average": tree}).splitlines()
    ]
    assert lines[1] == ["embed_tokens", "1024 x 512", "tensor, fsdp", "512 x 128", "262,144"]
    assert lines[2] == ["norm", "512", "whole", "512", "2,048"]
    assert lines[4] == ["8 devices: fsdp 4, tensor 2"]
    assert [line[0] for line in lines[5:]] == ["parameters", "average", "together"]
    assert lines[7][1:] == ["0.5 MiB a device,", "4.0 MiB in all, 1.007 times an even share"]
