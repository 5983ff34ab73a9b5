"""Layers stacked on the devices of a pipeline, and one by one: the same numbers, nobody with more than its share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs.language import DEEPSEEK_V3
from r1jax.config import DecoderConfig, MeshConfig
from r1jax.hf.names import layout
from r1jax.parallel import mesh as mesh_module
from r1jax.parallel.mesh import abstract_mesh, make_mesh, shard_tree
from r1jax.parallel.show import bytes_a_device, show
from r1jax.parallel.stages import into_stages, out_of_stages, stacked, stages_on

LAYER = {"mlp": {"up_proj": {"weight": (24, 16)}}, "norm": {"weight": (16,)}}
DECODER = DecoderConfig(num_hidden_layers=6, first_k_dense_replace=1)


@pytest.fixture(autouse=True)
def tiny_arrays_are_split(monkeypatch):
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 64)


def state():
    """A tree that has the layers twice, as that of a run has them with its moments, and a number beside them."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731

    def decoder():
        layers = {f"layers_{i}": jax.tree.map(draw, LAYER, is_leaf=is_shape) for i in range(6)}
        return {"decoder": {"embed_tokens": draw((64, 16)), **layers}, "volume": layers}

    return {"params": decoder(), "optimizer": ({"mu": decoder()}, np.int32(3))}


@pytest.mark.parametrize(
    "sizes",
    [{"pipe": 4, "fsdp": 2}, {"pipe": 2, "interleave": 2, "tensor": 2, "fsdp": 2}, {"pipe": 5, "devices": 5}],
    ids=str,
)
def test_there_and_back_is_bit_for_bit(sizes):
    devices = jax.devices()[: sizes.pop("devices", 8)]
    config = MeshConfig(**{"data": 1, **sizes})
    mesh = make_mesh(config, devices)
    stages, tree = stages_on(mesh, config, DECODER), state()
    placed = jax.device_put(tree, shard_tree(mesh, tree))
    together = into_stages(placed, mesh, stages)
    jax.tree.map(
        lambda x, where: where.is_equivalent_to(x.sharding, x.ndim) or pytest.fail(f"{x.sharding} is not {where}"),
        together,
        shard_tree(mesh, together),
    )
    kept = together["params"]["decoder"]
    assert set(together["params"]["volume"]) == {f"layers_{i}" for i in range(6)}, "an encoder's layers stay"
    assert set(kept) == {"embed_tokens", "stages", *(f"layers_{i}" for i in range(6) if i not in stages.layers)}
    for slot, number in enumerate(stages.order):
        np.testing.assert_array_equal(
            kept["stages"]["norm"]["weight"][slot], tree["params"]["decoder"][f"layers_{number}"]["norm"]["weight"]
        )
    back = out_of_stages(together, mesh, stages)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), tree)


def test_every_number_moves_once_and_nobody_has_more_than_a_share():
    config = MeshConfig(data=1, pipe=4, fsdp=2)
    mesh = make_mesh(config)
    stages = stages_on(mesh, config, DECODER)
    weight = {"decoder": {f"layers_{i}": {"up_proj": {"weight": jnp.ones((32, 64))}} for i in range(6)}}
    weight = jax.device_put(weight, shard_tree(mesh, weight))
    assert weight["decoder"]["layers_2"]["up_proj"]["weight"].sharding.spec == P("pipe", "fsdp")
    compiled = jax.jit(lambda tree: stacked(tree, mesh, stages)).lower(weight).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "all-to-all" in text and "all-gather" not in text and "all-reduce" not in text
    share = sum(bytes_a_device(mesh, weight))
    assert memory.output_size_in_bytes == pytest.approx(share, rel=0.01)
    assert memory.temp_size_in_bytes <= 2 * share


@pytest.mark.parametrize("sizes", [{"pipe": 2, "expert": 64}, {"pipe": 2, "fsdp": 8, "expert": 8}], ids=str)
def test_a_device_keeps_an_even_share_of_deepseek_v3(sizes):
    config = MeshConfig(data=1, **sizes)
    mesh, tree = abstract_mesh(config, 1), {}
    for leaf in layout(DEEPSEEK_V3):
        inner = tree
        for name in leaf.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[leaf.path[-1]] = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    stages = stages_on(mesh, config, DEEPSEEK_V3)
    kept = jax.eval_shape(lambda tree: stacked(tree, mesh, stages), {"decoder": tree})
    total = sum(x.size for x in jax.tree.leaves(kept)) * 2
    assert total == pytest.approx(2 * 682.6e9, rel=1e-3)
    assert sum(bytes_a_device(mesh, kept)) == pytest.approx(total / mesh.size, rel=0.02)


def test_the_table_names_the_layers_of_each_stage():
    config = MeshConfig(data=1, pipe=2, interleave=2)
    mesh = abstract_mesh(config, 1)
    stages = stages_on(mesh, config, DecoderConfig(num_hidden_layers=10, first_k_dense_replace=1))
    tree = {"decoder": {f"layers_{i}": {"weight": jax.ShapeDtypeStruct((8,), jnp.float32)} for i in range(10)}}
    kept = jax.eval_shape(lambda tree: stacked(tree, mesh, stages), tree)
    lines = show(mesh, {"parameters": kept}, stages).splitlines()
    assert "stage 0  layers 2 to 3, layers 6 to 7" in lines
    assert "stage 1  layers 4 to 5, layers 8 to 9" in lines
    assert any(line.split() == ["decoder/stages/weight", "8", "x", "8", "pipe", "4", "x", "8", "128"] for line in lines)
