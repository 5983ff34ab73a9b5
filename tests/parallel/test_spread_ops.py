"""Numerics that exchange by themselves, each against its form for one device: values, gradients and what travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.config import DecoderConfig, MeshConfig
from r1jax.models.attention import MLA
from r1jax.ops.attention import dot_product_attention_reference
from r1jax.ops.axes import constrain, gathered, placement
from r1jax.ops.embedding import embed
from r1jax.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, token_losses
from r1jax.ops.sequence_attention import sequence_attention
from r1jax.parallel import mesh as mesh_module
from r1jax.parallel.collectives import collectives
from r1jax.parallel.mesh import make_mesh, traced_for


@pytest.fixture(autouse=True)
def tiny_arrays_are_split(monkeypatch):
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 64)


def on(sizes, function, *arrays):
    """Result on a mesh of all devices, and the exchanges; arguments come whole."""
    config = MeshConfig(**{"data": 1, **sizes})
    mesh = make_mesh(config)
    whole = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(traced_for(mesh, config, function), in_shardings=whole).lower(*arrays).compile()
    return jax.device_get(compiled(*arrays)), collectives(compiled.as_text(), mesh)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def close(got, expected, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


SIZES = [{"tensor": 8}, {"fsdp": 2, "tensor": 4}, {"expert": 2, "sequence": 2, "tensor": 2}, {"fsdp": 8}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(8, 12), (3, 7)], ids=["even", "ragged"])
def test_loss_of_a_divided_vocabulary(sizes, batch, length):
    hidden, weight = draw(batch, length, 16), draw(24, 16, seed=1)
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 24, (batch, length)), jnp.int32)
    weights = jnp.asarray(np.random.default_rng(3).integers(0, 3, (batch, length)), jnp.float32)

    def both(loss):
        return jax.value_and_grad(lambda h, w: loss(h, w, labels, weights, 0.1, 1e-3), argnums=(0, 1))

    found, exchanged = on(sizes, both(linear_cross_entropy), hidden, weight)
    close(found, both(linear_cross_entropy_reference)(hidden, weight))
    scored, _ = on(sizes, lambda h, w: token_losses(h, w, labels, 0.1, 1e-3), hidden, weight)
    close(scored, token_losses(hidden, weight, labels, 0.1, 1e-3))
    gathers = [one for one in exchanged if one.kind == "all-gather" and "shard_map" in one.name]
    assert not [one for one in gathers if "tensor" in one.axes], "the vocabulary stays divided"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("batch", "length"), [(8, 12), (3, 7)], ids=["even", "ragged"])
def test_rows_of_a_divided_table(sizes, batch, length):
    table = draw(24, 16)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 24, (batch, length)), jnp.int32)
    slope = draw(batch, length, 16, seed=1)

    def look(table):
        rows = embed(table, tokens, jnp.float32, ("embed_tokens",))
        return jnp.sum(rows * slope), rows

    found, _ = on(sizes, jax.value_and_grad(look, has_aux=True), table)
    close(found, jax.value_and_grad(look, has_aux=True)(table))


@pytest.mark.parametrize(
    ("sizes", "masked"),
    [({"sequence": 8}, True), ({"fsdp": 2, "sequence": 2, "tensor": 2}, True), ({"sequence": 8}, False)],
    ids=str,
)
def test_attention_over_a_divided_sequence(sizes, masked):
    q, latent, k_rope, kv_b = draw(2, 16, 4, 7), draw(2, 16, 5, seed=1), draw(2, 16, 3, seed=2), draw(4, 10, 5, seed=3)
    valid = jnp.ones((2, 16), bool).at[0, :3].set(False).at[1, 11:].set(False) if masked else None
    slope = draw(2, 16, 4, 6, seed=4)

    def spread(q, latent, k_rope, kv_b):
        return jnp.sum(sequence_attention(q, latent, k_rope, kv_b, valid, scale=0.3) * slope)

    def alone(q, latent, k_rope, kv_b):
        k_nope, v = jnp.split(jnp.einsum("BSR,NOR->BSNO", latent, kv_b), [4], axis=-1)
        k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope[:, :, None], (2, 16, 4, 3))], axis=-1)
        return jnp.sum(dot_product_attention_reference(q, k, v, scale=0.3, causal=True, valid=valid) * slope)

    arguments = (q, latent, k_rope, kv_b)
    found, exchanged = on(sizes, jax.value_and_grad(spread, argnums=(0, 1, 2, 3)), *arguments)
    close(found, jax.value_and_grad(alone, argnums=(0, 1, 2, 3))(*arguments), 1e-5)
    # Latents and the rotary key of a token travel, 8 numbers, and whether it exists; never keys or values of heads.
    sent = [one for one in exchanged if one.kind == "all-gather" and "sequence" in one.axes and "shard_map" in one.name]
    assert {int(shape.split(",")[-1].rstrip("]")) for one in sent for shape in one.shapes if "f32" in shape} == {8}


def test_text_alone_over_a_divided_sequence():
    """Its decoder passes no mask."""
    decoder = DecoderConfig(hidden_size=16, num_attention_heads=4, q_lora_rank=8, kv_lora_rank=8)
    module, x, valid = (
        MLA(decoder, jnp.float32, prefix=True),
        draw(2, 16, 16),
        jnp.arange(16)[None] < jnp.array([[16], [9]]),
    )
    where = x, jnp.broadcast_to(jnp.arange(16), (2, 16)), valid
    params = module.init(jax.random.key(0), *where)
    found, _ = on({"data": 2, "sequence": 4}, module.apply, params, *where)
    close(found, module.apply(params, *where), 1e-5)


def test_one_device_needs_no_placement():
    x = draw(4, 4)
    assert placement() is None and constrain(x, "batch", None) is x and gathered(x, ("a", "weight")) is x
