import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.show import bytes_a_device
from r1jax.train import plan as plan_module
from r1jax.train.plan import device_need, example_batch, plan
from r1jax.train.step import init_state
from tests.train.experiment import optax_promotes


@pytest.fixture(scope="module")
def rows(tiny):
    with optax_promotes():
        text = plan(tiny.config, tiny.model, tiny.task, tiny.mesh, tiny.batch)
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.replace("\n  ", "\n").splitlines())


def number(text):
    return float(text.split()[0].replace(",", ""))


def test_parameters_are_those_of_the_tree(tiny, rows):
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in tiny.fresh.params.items()}
    assert number(rows["parameters"]) == sum(sizes.values())
    assert {name: number(rows[name]) for name in sizes} == sizes
    # Of 4 experts a token uses 2; an expert has three matrices of 16 x 8.
    assert f"({sum(sizes.values()) - 2 * 3 * 16 * 8:,} active" in rows["parameters"]


def test_memory_and_work(tiny, rows):
    held = sum(x.nbytes for x in jax.tree.leaves(tiny.fresh)) / 2**20
    assert number(rows["state a device"]) == pytest.approx(held, abs=0.06)
    assert number(rows["host's memory for a save"]) == pytest.approx(held, abs=0.06)
    working = number(rows["batch, temporaries a device"])
    assert working > 0
    limit, verdict = rows["memory of a device"].split(" MiB: ")
    assert verdict == f"the step fits, it takes {(held + working) / number(limit):.1%}"
    flops = number(rows["FLOPs a step and device"])
    assert flops > 6 * number(rows["parameters"])
    assert number(rows["FLOPs an example"]) == pytest.approx(flops / 8, rel=1e-3)
    assert rows["mesh"] == "one device"


def test_example_batch_has_the_shapes_of_a_batch(tiny):
    example = example_batch(tiny.source, tiny.task, 8)
    for name, x in tiny.batches(1)[0].items():
        assert (example[name].shape, example[name].dtype) == (x.shape, x.dtype), name
        np.testing.assert_array_equal(example[name][3], x[0])


@pytest.mark.parametrize(("sizes", "copies"), [({"fsdp": 2}, 1), ({"pipe": 2}, 2)], ids=str)
def test_a_pipeline_needs_room_for_a_copy_of_its_layers(tiny, sizes, copies):
    """Which a save makes on the devices, when what the step takes for itself is free again."""
    decoder = replace(tiny.config.model.decoder, num_hidden_layers=4)
    config = replace(tiny.config, model=replace(tiny.config.model, decoder=decoder), mesh=MeshConfig(data=1, **sizes))
    mesh, model = make_mesh(config.mesh, jax.devices()[:2]), R1(config.model, tiny.task.heads)
    for temporaries in (10, 2**40):
        analysis = SimpleNamespace(temp_size_in_bytes=temporaries)
        compiled = SimpleNamespace(memory_analysis=lambda analysis=analysis: analysis)
        held, working = device_need(config, model, tiny.task, mesh, tiny.batch, compiled)
        batch = sum(x.nbytes for x in tiny.batch.values()) // 2
        if temporaries == 10 and copies == 2:
            alone = jax.eval_shape(lambda: init_state(config, model, tiny.task, tiny.batch))
            assert working == sum(bytes_a_device(mesh, alone)) >= held > batch + 10
        else:
            assert working == temporaries + batch


@pytest.mark.parametrize(("pages", "verdict"), [(4, "the step does not fit"), (2**30, "the step fits")])
def test_says_whether_the_memory_suffices(tiny, monkeypatch, pages, verdict):
    monkeypatch.setattr(plan_module.os, "sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}.get)
    with optax_promotes():
        text = plan(tiny.config, tiny.model, tiny.task, tiny.mesh, tiny.batch)
    assert f" MiB: {verdict}, it takes " in text
