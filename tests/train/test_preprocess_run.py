"""Runs whose cases pass through plug-ins: trained, gone on with, and refused with other code."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from r1jax.data.pipeline import Preprocessed
from r1jax.errors import UserError
from r1jax.tasks.catalog import TASKS
from r1jax.train.checkpoints import CheckpointFolder

CODE = """
import numpy as np
from r1jax.data.plugins import Preprocessor

class Shake(Preprocessor):
    modality = "table"
    deterministic = False

    def process(self, case, rng):
        if rng is not None:
            case["table"] = case["table"] + rng.normal(size=case["table"].shape).astype(np.float32)
        return case

class Middle(Preprocessor):
    fitted = True

    def fit(self, cases):
        return {"mean": float(np.nanmean([case["table"][0] for case in cases]))}

    def process(self, case):
        assert self.statistics["mean"] > 0
        return case
"""


@pytest.fixture
def plugged(tiny, tmp_path):
    """The tiny experiment with a plug-in between cases and model; the compiled step is the same."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "shake.py").write_text(CODE)

    def make(**more):
        data = {"preprocess": "middle|shake", "plugins": (str(tmp_path / "plugins"),)} | more
        config = replace(
            tiny.config,
            data=replace(tiny.config.data, **data),
            train=replace(tiny.config.train, steps=6, warmup_steps=1, eval_every=6),
        )
        task = TASKS["medical"](config)
        return replace(tiny, config=config, task=task, source=task.source("train"), validation=task.source("val"))

    return make


def weights(state):
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state.params))]


def test_a_run_goes_on_with_workers_as_without(plugged, tmp_path):
    whole = weights(plugged().train(tmp_path / "whole")[0])
    first = plugged()
    stop = replace(first.config.train, steps=6)
    first = replace(first, config=replace(first.config, train=stop))

    class Enough(Exception):
        pass

    calls = []

    def step(state, batch, limit):
        calls.append(1)
        if len(calls) > 4:
            raise Enough
        return first.step(state, batch, limit)

    with pytest.raises(Enough):
        first.train(tmp_path / "run", step=step)
    assert [c.step for c in CheckpointFolder(tmp_path / "run" / "checkpoints").all()] == [3]
    state, said, _ = plugged(workers=1, ahead=3).train(tmp_path / "run")
    assert said[-1].endswith("00000003")
    assert all(np.array_equal(a, b) for a, b in zip(weights(state), whole, strict=True))
    meta = CheckpointFolder(tmp_path / "run" / "checkpoints").all()[-1].meta()
    assert [step["step"] for step in meta["preprocess"]["steps"]] == ["middle", "shake"]
    assert meta["preprocess"]["statistics"]["0"]["mean"] > 0
    assert meta["order"]["next_batch"] == 6 and meta["order"]["seed"] == 0 and meta["order"]["order"] == "global"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["data_wait"] <= 1 for row in rows if "loss" in row)


def test_a_changed_plug_in_is_refused(plugged, tmp_path):
    plugged().train(tmp_path / "run")
    (tmp_path / "plugins" / "shake.py").write_text(CODE + "# another version\n")
    with pytest.raises(UserError, match="middle .shake.py. is not the code of then.*choose another --workdir"):
        plugged().train(tmp_path / "run")
    (tmp_path / "plugins" / "shake.py").write_text(CODE)
    with pytest.raises(UserError, match="data.preprocess 'middle.shake', but this command says 'middle'"):
        plugged(preprocess="middle").train(tmp_path / "run")
    moved = (tmp_path / "plugins").rename(tmp_path / "elsewhere")
    plugged(plugins=(str(moved),)).train(tmp_path / "run")  # the same code from another folder


def test_evaluation_takes_the_statistics_of_the_checkpoint(plugged, tmp_path):
    trained = plugged()
    task = TASKS["medical"](trained.config)
    with pytest.raises(UserError, match="middle .* fitted on the training part alone"):
        task.source("val")
    assert task.pipeline.restore(trained.task.pipeline.provenance()) == []
    source = task.source("val")
    assert isinstance(source, Preprocessed) and source.fingerprint == trained.validation.fingerprint
