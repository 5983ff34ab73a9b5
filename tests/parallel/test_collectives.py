"""What is read from compiled programs, against what the programs were written to do."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from r1jax.config import MeshConfig
from r1jax.parallel.collectives import _first_group, collectives
from r1jax.parallel.mesh import make_mesh
from r1jax.train.roofline import near, roofline_rows

MESH = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


def compiled(function, *shapes):
    specs = tuple(P(None, ("fsdp", "expert", "tensor")) for _ in shapes)
    spread = jax.shard_map(function, mesh=MESH, in_specs=specs, out_specs=P(), check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(spread).lower(*arrays).compile().as_text()


@pytest.mark.parametrize(
    ("function", "kind", "axes", "devices", "wire"),
    [
        (lambda x: jax.lax.psum(x, "tensor"), "all-reduce", ("tensor",), 2, 256),
        (lambda x: jax.lax.psum(x, ("fsdp", "tensor")), "all-reduce", ("fsdp", "tensor"), 4, 256 * 1.5),
        (lambda x: jax.lax.all_gather(x, "expert", tiled=True), "all-gather", ("expert",), 2, 256),
        (
            lambda x: jax.lax.psum_scatter(x, ("fsdp", "expert"), scatter_dimension=0, tiled=True),
            "reduce-scatter",
            ("fsdp", "expert"),
            4,
            64 * 3,
        ),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), "all-to-all", ("fsdp",), 2, 128),
        (lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), "collective-permute", ("tensor",), 2, 256),
    ],
)
def test_one_exchange(function, kind, axes, devices, wire):
    (one,) = collectives(compiled(function, (8, 64)), MESH)  # each device has 8 x 8 numbers, 256 bytes
    assert (one.kind, one.axes, one.devices, one.wire_bytes) == (kind, axes, devices, wire)
    assert (one.times, one.rare) == (1, False)


def test_loops_count_their_turns_and_choices_are_rare():
    def function(x):
        turn = lambda x, _: (jax.lax.psum(x, "tensor"), None)  # noqa: E731
        x = jax.lax.scan(turn, x, None, length=5)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "fsdp"), lambda x: x, x)

    found = {one.axes: one for one in collectives(compiled(function, (8, 64)), MESH)}
    assert (found["tensor",].times, found["tensor",].rare) == (5, False)
    assert (found["fsdp",].times, found["fsdp",].rare) == (1, True)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,3},{1,2}}", [0, 3]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ("source_target_pairs={{0,0},{1,2},{2,1}}", [1, 2]),
    ],
)
def test_groups_in_every_notation(text, group):
    assert _first_group(text, 8).tolist() == group


def test_the_least_time_of_a_step():
    found = collectives(compiled(partial(jax.lax.psum, axis_name="tensor"), (8, 64)), MESH)
    rows = dict(roofline_rows(found, MESH, flops=8 * 494.7e12, held=0, dtype="float32"))
    assert rows["  all-reduce, tensor"] == "0.0 MiB"
    assert rows["H100s need at least"].startswith(
        "1e+03 ms a step if all overlaps"
    )  # a second at 494.7 TFLOP/s a device
    assert rows["  model FLOPs utilisation"] == "at most 100.0%"


def test_inner_axes_are_within_a_node():
    assert near({"fsdp": 2, "tensor": 4}, ("fsdp",))
    sizes = {"data": 2, "fsdp": 4, "tensor": 4}
    assert [near(sizes, (axis,)) for axis in sizes] == [False, False, True]
    assert not near(sizes, ("fsdp", "tensor"))
