"""Records from a file to a trained checkpoint and its evaluation."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import AxisType
from sklearn.metrics import roc_auc_score

import eval as command
import train
from tests.data.record_sets import write_stocks

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--model.modalities=series,table,text",
    "--model.series.layers=0",
    "--model.series.bins=2",
    "--model.text_tokens=16",
    "--model.text_ngrams=64",
    "--model.decoder.num_hidden_layers=1",
    "--model.decoder.hidden_size=16",
    "--train.steps=3",
    "--train.warmup_steps=1",
    "--train.eval_every=3",
    "--train.batch_size=16",
    "--train.ema=0",
]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs for one device compile in a fraction of the time."""

    def make_mesh(_config):
        return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", make_mesh)
        patch.setattr(command, "make_mesh", make_mesh)
        yield


def test_stocks_are_learned_and_scored_in_every_mode(tmp_path, capsys):
    data, run = write_stocks(tmp_path / "set"), tmp_path / "run"
    config = ["--config", str(ROOT / "configs/records.py") + ":stocks", "--data.path", str(data)]
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        assert train.main([*config, *TINY, "--workdir", str(run)]) == 0
    assert "numbers auroc" in capsys.readouterr().out
    assert command.main(["--checkpoint", str(run), "--resamples", "5", "--batch-size", "64"]) == 0
    found, table = json.loads((run / "eval/metrics.json").read_text()), pq.read_table(run / "eval/scores.parquet")
    label = np.array(table["class"].to_pylist()) == "loss"
    for mode in ("both", "numbers", "text"):
        p = np.stack([table[f"{mode}.{name}"].to_numpy() for name in ("other", "loss")])
        np.testing.assert_allclose(p.sum(axis=0), 1, rtol=1e-5)
        figure = found["figures"][mode]["auroc"]
        assert figure["value"] == pytest.approx(roc_auc_score(label, p[1])) and figure["low"] <= figure["value"]
    assert found["counts"] == {"other": int((~label).sum()), "loss": int(label.sum()), "unknown": 0}
    assert found["provenance"]["data"]["seen_in_training"] == 0 and "chose the checkpoint" in found["warnings"][0]
    assert f"warning: {found['warnings'][0]}" in capsys.readouterr().out
