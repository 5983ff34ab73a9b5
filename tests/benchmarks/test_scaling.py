"""benchmarks/scaling.py on simulated devices: what it trains fits every mesh, and its table is what it measured."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import jax
import pytest

from benchmarks.scaling import AXES, collectives, compiled, config_of, measured, table
from r1jax.config import MeshConfig
from r1jax.parallel.mesh import check_batch, check_model, make_mesh
from r1jax.parallel.stages import schedule_on, stages_on


@pytest.mark.parametrize("scale", ["tiny", "full"])
@pytest.mark.parametrize("axis", AXES)
def test_eight_devices_can_divide_the_model_along_every_axis(axis, scale):
    config = config_of(scale, MeshConfig(**{"data": 1, axis: 8}), 1)
    mesh = make_mesh(config.mesh)
    check_model(mesh.shape, config.model)
    check_batch(mesh, config.train.batch_size)
    assert config.model.text_tokens % 8 == 0 and config.model.decoder.n_routed_experts % 8 == 0
    assert schedule_on(mesh, config) is None or len(stages_on(mesh, config.mesh, config.model.decoder).layers) == 8
    assert config_of(scale, config.mesh, 8).train.batch_size == 8 * config.train.batch_size


def test_collectives_have_a_rate():
    found = collectives(jax.devices(), 2**14, 2)
    assert set(found) == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "collective_permute"}
    assert all(rate > 0 for rate in found.values())


def test_what_the_limit_left_out_is_said():
    cancelled, done = Future(), Future()
    cancelled.cancel()
    done.set_exception(MemoryError("no  room"))
    assert measured(cancelled, 1, 9.0) == {"error": "not compiled within --limit"}
    assert measured(done, 1, -1.0) == {"error": "not measured within --limit"}
    assert measured(done, 1, 9.0) == {"error": "no room"}
    six = replace(MeshConfig(data=1), expert=6)
    with ThreadPoolExecutor(1) as pool:
        undivided = pool.submit(compiled, config_of("tiny", six, 1), jax.devices()[:6])
    assert "must be a multiple of mesh.expert" in measured(undivided, 1, 9.0)["error"]


def test_efficiency_is_a_share_of_one_device():
    one = {"seconds": 0.5, "tokens_per_second": 200.0, "cases": 1, "sent_bytes": 0, "loss": 2.0}
    row = {"seconds": 0.5, "tokens_per_second": 600.0, "cases": 4, "sent_bytes": 2**21, "loss": 2.002}
    report = {
        "devices": 4,
        "simulated": False,
        "one": one,
        "steps": {"fsdp weak": row, "fsdp strong": row, "tensor strong": {"error": "RESOURCE_EXHAUSTED: no room"}},
        "collectives": {"all_reduce": 2.5e9},
    }
    lines = table(report).splitlines()
    assert "| fsdp | weak | 4 | 500.0 | 600 | 75% | 2.0 |  |" in lines and "| all_reduce | 2.50 |" in lines
    assert "| fsdp | strong | 4 | 500.0 | 600 | 75% | 2.0 | 1e-03 |" in lines
    assert "| tensor | strong | failed: RESOURCE_EXHAUSTED: no room | | | | | |" in lines
    assert "times and rates mean nothing" in table(report | {"simulated": True})
