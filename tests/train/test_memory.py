"""Batches that fit: the search on known memories, the whole way on the tiny experiment, and running out of memory."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from r1jax.config import MeshConfig
from r1jax.errors import UserError
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.stages import schedule_on
from r1jax.tasks.medical.task import Medical
from r1jax.train import loop, memory, recover
from r1jax.train.checkpoints import CheckpointFolder
from r1jax.train.memory import divisions, fewest_parts, in_more_parts, largest_part, settle_batch, unit_of
from r1jax.train.run import open_run

TINY = Path(__file__).with_name("tiny.py")
OOM = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")


def powers(devices, cases):
    return [devices * 2**k for k in range(40) if devices * 2**k <= cases]


@given(
    st.integers(1, 8),
    st.floats(1, 1e4),
    st.floats(0.1, 100),
    st.floats(0, 0.01),
    st.floats(10, 1e6),
    st.integers(1, 5000),
)
def test_the_largest_power_of_two_that_fits(devices, fixed, slope, bend, budget, cases):
    asked = []

    def need(size):
        asked.append(size)
        return fixed + slope * size + bend * size * size

    fitting = [size for size in powers(devices, max(cases, devices)) if fixed + slope * size + bend * size**2 <= budget]
    if fitting:
        assert largest_part(need, budget, devices, cases) == fitting[-1]
    else:
        with pytest.raises(UserError, match="not even one case a device fits"):
            largest_part(need, budget, devices, cases)
    if bend == 0:
        assert len(set(asked)) <= 5  # the two probes, the answer and its neighbour


@given(st.integers(1, 8), st.integers(1, 96), st.floats(0, 50), st.floats(1, 120))
def test_the_fewest_parts_that_fit(devices, batch_size, fixed, budget):
    need = lambda size, parts: fixed + size + (parts > 1)  # noqa: E731
    sound = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n % devices == 0]
    assert list(divisions(batch_size, devices)) == sound
    fitting = [n for n in sound if fixed + batch_size // n + (n > 1) <= budget]
    if fitting:
        assert fewest_parts(need, budget, devices, batch_size) == fitting[0]
    else:
        with pytest.raises(UserError, match="not even one case" if sound else "no multiple of the"):
            fewest_parts(need, budget, devices, batch_size)


def with_train(tiny, workdir, **fields):
    return replace(tiny.config, workdir=str(workdir), train=replace(tiny.config.train, **fields))


@pytest.fixture
def compiled(monkeypatch):
    """Needs of made-up programs: a megabyte for each case of a part; counts what is asked for."""
    asked = []

    def needs(config, mesh, task, source):
        def need(cases, parts):
            asked.append((cases, parts))
            return (cases + (parts > 1)) * 2.0**20  # more parts need room for the sum of their gradients

        return need

    monkeypatch.setattr(memory, "_needs", needs)
    return asked


def test_auto_is_settled_kept_and_taken_up_again(tiny, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda mesh: 10 * 2.0**20)
    said = []
    config = settle_batch(with_train(tiny, tmp_path, batch_size="auto"), tiny.mesh, tiny.task, tiny.source, said.append)
    assert (config.train.batch_size, config.train.accumulation) == (8, 1)
    assert said == ["batch: 8 cases in 1 part, 8 MiB of a device (80.0%; train.memory_share allows 80.0%)"]
    double = settle_batch(
        with_train(tiny, tmp_path, batch_size="auto", accumulation=3), tiny.mesh, tiny.task, tiny.source, said.append
    )
    assert (double.train.batch_size, double.train.accumulation) == (12, 3)
    parts = settle_batch(
        with_train(tiny, tmp_path, batch_size=24, accumulation="auto"), tiny.mesh, tiny.task, tiny.source, said.append
    )
    assert (parts.train.batch_size, parts.train.accumulation) == (24, 4)

    memory.keep(config, tiny.mesh)
    compiled.clear()
    again = settle_batch(with_train(tiny, tmp_path, batch_size="auto"), tiny.mesh, tiny.task, tiny.source, said.append)
    assert again == config and not compiled and "batch.json" in said[-1]
    # On another device the run keeps its batch; only the parts are found anew.
    (tmp_path / "batch.json").write_text(json.dumps({"device": "8 x other", "batch_size": 64, "accumulation": 1}))
    moved = settle_batch(with_train(tiny, tmp_path, batch_size="auto"), tiny.mesh, tiny.task, tiny.source, said.append)
    assert (moved.train.batch_size, moved.train.accumulation) == (64, 16)


def test_a_batch_that_was_found_on_another_mesh_is_divided_anew(tiny, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda mesh: 80 * 2.0**20)
    auto, sizes = with_train(tiny, tmp_path, batch_size="auto"), ({"data": 8}, {"data": 2, "fsdp": 4}, {"tensor": 8})
    meshes = [make_mesh(MeshConfig(**{"data": 1, **size})) for size in sizes]
    for mesh in meshes:
        (tmp_path / "batch.json").unlink(missing_ok=True)
        memory.keep(with_train(tiny, tmp_path, batch_size=64, accumulation=1), mesh)
        for other in meshes:
            compiled.clear()
            found = settle_batch(auto, other, tiny.task, tiny.source, lambda line: None)
            assert (found.train.batch_size, bool(compiled)) == (64, other != mesh)


def test_the_command_opens_the_training_cases_once(tmp_path, compiled, monkeypatch, capsys):
    opened, source = [], Medical.source
    monkeypatch.setattr(Medical, "source", lambda self, split: opened.append(split) or source(self, split))
    monkeypatch.setattr(memory, "device_limit", lambda mesh: 50 * 2.0**20)
    monkeypatch.setattr(train, "plan", lambda config, *_: f"planned {config.train.batch_size} cases")
    flags = ["--config", str(TINY), "--train.batch_size", "auto", "--workdir", str(tmp_path / "run"), "--dry-run"]
    assert train.main(flags) == 0
    assert capsys.readouterr().out == "planned 32 cases\n" and sorted(opened) == ["train", "val"]


def test_what_cannot_be_settled_is_said(tiny, tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda mesh: None)
    with pytest.raises(UserError, match=r"does not say how much memory it has: give train\.batch_size"):
        settle_batch(with_train(tiny, tmp_path, batch_size="auto"), tiny.mesh, tiny.task, tiny.source, print)
    (tmp_path / "batch.json").write_text("{")
    with pytest.raises(UserError, match=r"batch\.json cannot be read"):
        settle_batch(with_train(tiny, tmp_path, batch_size="auto"), tiny.mesh, tiny.task, tiny.source, print)


def test_parts_run_out(tiny, tmp_path):
    config = in_more_parts(with_train(tiny, tmp_path, batch_size=8, accumulation=3), tiny.mesh)
    assert config.train.accumulation == 8
    with pytest.raises(UserError, match="8 cases in 8 parts takes more memory"):
        in_more_parts(config, tiny.mesh)


@pytest.mark.parametrize(
    ("sizes", "unit"),
    [
        ({"data": 8}, 8),
        ({"data": 1, "pipe": 2}, 2),
        ({"data": 1, "pipe": 2, "microbatches": 8}, 8),
        ({"data": 2, "pipe": 2, "fsdp": 2, "microbatches": 6}, 24),
    ],
    ids=str,
)
def test_a_batch_is_divided_only_so_that_a_pipeline_can_go_on(tiny, tmp_path, compiled, monkeypatch, sizes, unit):
    """Whoever ran out of memory would else leave a folder that no start accepts."""
    monkeypatch.setattr(memory, "device_limit", lambda mesh: 2.0 * unit * 2**20)
    decoder = replace(tiny.config.model.decoder, num_hidden_layers=4)
    tiny = replace(tiny, config=replace(tiny.config, model=replace(tiny.config.model, decoder=decoder)))
    mesh_config = MeshConfig(**sizes)
    mesh = make_mesh(mesh_config, jax.devices()[: 2 if mesh_config.pipe == 2 and mesh_config.data == 1 else 8])
    asked = replace(with_train(tiny, tmp_path, batch_size=4 * unit, accumulation=1), mesh=mesh_config)
    assert unit_of(asked, mesh) == unit
    parts = []
    while not parts or parts[-1] < 4:
        divided = in_more_parts(replace(asked, train=replace(asked.train, accumulation=(parts or [1])[-1])), mesh)
        schedule_on(mesh, divided)
        parts.append(divided.train.accumulation)
    assert parts == [2, 4]
    with pytest.raises(UserError, match=f"{4 * unit} cases in 4 parts takes more memory"):
        in_more_parts(divided, mesh)
    for changes in ({"accumulation": "auto"}, {"batch_size": "auto"}):
        (tmp_path / "batch.json").unlink()
        found = settle_batch(
            replace(asked, train=replace(asked.train, **changes)), mesh, tiny.task, tiny.source, lambda line: None
        )
        assert found.train.batch_size // found.train.accumulation == unit, "a megabyte a case is more than 80% of it"
        memory.keep(found, mesh)
    # What an earlier start wrote down for fewer microbatches does not divide the batch any more.
    memory.keep(replace(asked, train=replace(asked.train, accumulation=4 * unit)), mesh)
    again = settle_batch(asked, mesh, tiny.task, tiny.source, lambda line: None)
    assert again.train.accumulation == 1


@pytest.mark.parametrize(("where", "phase"), [("validate", "evaluation"), ("out_of_stages", "copying the state")])
def test_out_of_memory_outside_of_the_step_divides_nothing(tiny, tmp_path, monkeypatch, where, phase):
    def full(*_):
        raise OOM

    monkeypatch.setattr(loop, where, full)
    monkeypatch.setattr(recover, "compile_step", lambda *_: tiny.step)
    train = replace(tiny.config.train, eval_every=2)
    config = replace(tiny.config, workdir=str(tmp_path), train=train)
    if where == "out_of_stages":
        config = replace(config, train=replace(train, eval_every=24))
    step = 2 if where == "validate" else 3
    told = f"out of memory after step {step}, in: {phase}, of which more parts"
    with tiny.traced_once(), open_run(config) as run, pytest.raises(UserError, match=told):
        recover.train(config, run, tiny.model, tiny.task, tiny.mesh, tiny.source, tiny.validation, tiny.batch)
    assert not (tmp_path / "batch.json").exists()


def test_a_step_is_divided_also_where_the_state_cannot_be_copied(tiny, tmp_path, monkeypatch):
    """It goes on from the last checkpoint then."""
    taken, kept, copy = [], [], loop.out_of_stages

    def compile_step(config, *_):
        parts = config.train.accumulation

        def step(state, batch, limit):
            if parts == 1 and int(state.step) == 4:
                kept.append(True)
                raise OOM
            taken.append((int(state.step) + 1, parts))
            return tiny.step(state, batch, limit)

        return step

    def copied(*arguments):
        if kept and kept.pop():
            raise OOM
        return copy(*arguments)

    monkeypatch.setattr(recover, "compile_step", compile_step)
    monkeypatch.setattr(loop, "out_of_stages", copied)
    config = replace(tiny.config, workdir=str(tmp_path), train=replace(tiny.config.train, eval_every=24))
    with tiny.traced_once(), open_run(config) as run:
        recover.train(config, run, tiny.model, tiny.task, tiny.mesh, tiny.source, tiny.validation, tiny.batch)
    assert taken == [*((i, 1) for i in range(1, 5)), *((i, 2) for i in range(4, 25))]


@pytest.mark.parametrize("at", [1, 5, 20])
def test_out_of_memory_goes_on_from_the_same_step_in_more_parts(tiny, tmp_path, monkeypatch, capsys, at):
    taken = []

    def compile_step(config, *_):
        parts = config.train.accumulation

        def step(state, batch, limit):
            if parts == 1 and int(state.step) == at - 1:
                raise OOM
            taken.append((int(state.step) + 1, parts))
            return tiny.step(state, batch, limit)

        return step

    monkeypatch.setattr(recover, "compile_step", compile_step)
    config = replace(tiny.config, workdir=str(tmp_path))
    with tiny.traced_once(), open_run(config) as run:
        recover.train(config, run, tiny.model, tiny.task, tiny.mesh, tiny.source, tiny.validation, tiny.batch)
    assert taken == [(i, 1 if i < at else 2) for i in range(1, 25)]
    assert "out of memory: the batch is computed in 2 parts from now on" in capsys.readouterr().err
    assert json.loads((tmp_path / "batch.json").read_text())["accumulation"] == 2
    again = settle_batch(config, tiny.mesh, tiny.task, tiny.source, print)  # the next start does not try one part again
    assert again.train.accumulation == 2
    newest = CheckpointFolder(tmp_path / "checkpoints").all()[-1]
    assert newest.step == 24 and newest.config().train.accumulation == 2


def test_another_error_is_no_lack_of_memory(tiny, tmp_path, monkeypatch):
    def step(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(recover, "compile_step", lambda *_: step)
    config = replace(tiny.config, workdir=str(tmp_path))
    with tiny.traced_once(), open_run(config) as run, pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        recover.train(config, run, tiny.model, tiny.task, tiny.mesh, tiny.source, tiny.validation, tiny.batch)
    assert not (tmp_path / "batch.json").exists()


@pytest.mark.slow
def test_the_step_that_is_found_is_the_largest_of_the_compiled_ones(tiny, tmp_path, monkeypatch):
    """With real programs, of a model that compiles fast: twice the answer would not fit."""
    model = replace(tiny.config.model, modalities=("table", "text"))
    config = replace(tiny.config, model=model, task=replace(tiny.config.task, modality_dropout=0.0))
    tiny = replace(tiny, config=config, task=Medical(config))
    need = memory._needs(tiny.config, tiny.mesh, tiny.task, tiny.source)
    with jax.numpy_dtype_promotion("standard"):
        at = {size: need(size, 1) for size in (4, 16)}
        assert at[16] > 1.5 * at[4]
        monkeypatch.setattr(memory, "device_limit", lambda mesh: float(np.mean([at[16], 2 * at[16]])) / 0.8)
        found = settle_batch(with_train(tiny, tmp_path, batch_size="auto"), tiny.mesh, tiny.task, tiny.source, print)
        assert found.train.batch_size == 16
