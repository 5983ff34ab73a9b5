import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.config import MeshConfig
from r1jax.hf import place
from r1jax.hf.place import Filling
from r1jax.parallel.mesh import make_mesh

SPECS = [PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec("data", None, "fsdp")]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_parts_that_are_written_are_there_and_the_rest_is_zero(data):
    """Against the same writes into a NumPy array, whatever the sharding."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    shape = (4, 8, 12)
    expected = np.zeros(shape, ml_dtypes.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "STAGED_BYTES", data.draw(st.sampled_from([0, 10_000])))
        filling = Filling(shape, expected.dtype, NamedSharding(mesh, data.draw(st.sampled_from(SPECS))))
        for number in range(data.draw(st.integers(1, 3))):
            low = [data.draw(st.integers(0, n - 1)) for n in shape]
            box = tuple((a, data.draw(st.sampled_from([a + 1, n]))) for a, n in zip(low, shape, strict=True))
            values = np.random.default_rng(number).standard_normal([b - a for a, b in box]).astype(np.float32)
            assert filling.wants(box)
            filling.write(box, values)
            expected[tuple(slice(a, b) for a, b in box)] = values
        array = filling.finish()
    np.testing.assert_array_equal(np.asarray(array), expected, strict=True)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index], strict=True)


def test_parts_of_other_processes_are_not_wanted():
    class OneOfTwo(jax.sharding.SingleDeviceSharding):
        """What a process sees whose device holds the second half."""

        def addressable_devices_indices_map(self, shape):
            return {jax.devices()[0]: (slice(2, 4), slice(None))}

    filling = Filling((4, 3), np.dtype(np.float32), OneOfTwo(jax.devices()[0]))
    assert filling.wants(((0, 3), (0, 3))) and not filling.wants(((0, 2), (0, 3)))
