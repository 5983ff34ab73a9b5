"""Exports for devices: a stand-in for a converter, and the comparison of a device's reports with the evaluation's."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

import eval as evaluation
from r1jax.data.synthetic import SyntheticCases
from r1jax.edge.artefact import RUNNER
from r1jax.edge.risk import SCORES
from r1jax.serve.export_graph import Port
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoint import Checkpoint
from tests.serve.exported import write_cases

where_asked = pytest.mark.skipif(
    os.environ.get("R1JAX_EDGE_TESTS") != "1", reason="installs 1 GB by pip: set R1JAX_EDGE_TESTS=1"
)
WANTED = {"x": Port((2,), "float32", "1", "")}


def converter_that(tmp_path: Path, body: str) -> Path:
    """A stand-in for the converter's Python."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return script


def double(inputs):
    return {"y": 2 * inputs["x"]}


def device_with(place: Path, requirement: str) -> Iterator[Path]:
    """A Python with a run time alone; a converter is installed where the command looks for it."""
    python = place / "device" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(place / "device")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", requirement], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        yield python


def run_device(python: Path, folder: Path, cases: Path, output: Path, *words: str) -> None:
    """Has an exported folder write its reports."""
    call = [str(python), "-I", str(folder / RUNNER), str(cases), "--output", str(output), *words]
    subprocess.run(call, check=True)


def write_reports(checkpoint: Checkpoint, place: Path) -> Path:
    """Has the evaluation write the reports of six cases beside these, which are given back."""
    raw = SyntheticCases(3, 6, "test", (16, 16, 16)).read_batch(np.arange(6))
    write_cases(place / "cases" / "cases.npz", raw)
    with jax.numpy_dtype_promotion("standard"):
        words = ["--checkpoint", str(checkpoint.path), "--data.path", str(place / "cases"), "--data.split", "all"]
        assert evaluation.main([*words, "--output", str(place / "eval"), "--resamples", "5", "--pictures", "0"]) == 0
    return place / "cases" / "cases.npz"


def assert_same_reports(ours: Path, place: Path, tolerance: float | None) -> None:
    """Every report of the evaluation is there in both forms and, with a tolerance, says the same."""
    files = sorted((place / "eval" / "reports").glob("*.json"))
    assert len(files) == 6
    for file in files:
        found = json.loads((ours / file.name).read_text())
        if tolerance is not None:
            assert_same(found, json.loads(file.read_text()), file.stem, tolerance)
        assert (ours / f"{file.stem}.xml").is_file()


def write_alerts(checkpoint: Checkpoint, place: Path) -> Path:
    """Has the evaluation write the alerts of the test part's payments, which are given back."""
    task = Finance(checkpoint.config())
    with jax.numpy_dtype_promotion("standard"):
        words = ["--checkpoint", str(checkpoint.path), "--data.split", "test", "--reasons", "0", "--resamples", "5"]
        assert evaluation.main([*words, "--output", str(place / "eval")]) == 0
    cases = task.source("test")
    raw, table, rows = cases.read_batch(np.arange(len(cases))), cases.table, cases.rows
    names = {"customer": (table.customers, table.customer), "terminal": (table.terminals, table.terminal)}
    np.savez(
        place / "payments.npz",
        **{name: raw[name] for name in ("series", "series_state", "series_valid", "table")},
        **{name: np.array(words.take(pa.array(whose[rows])).to_pylist()) for name, (words, whose) in names.items()},
        case_id=np.array(raw["case_id"]),
        text=np.array(raw["text"]),
        seconds=table.seconds[rows],
    )
    return place / "payments.npz"


def assert_same_alerts(output: Path, place: Path, tolerance: float) -> None:
    """The device's alerts are the evaluation's."""
    theirs = sorted((place / "eval" / "reports").iterdir())
    ours = {file.name for file in output.iterdir()}
    assert ours == {file.name for file in theirs} | {SCORES} and len(theirs) > 20
    for file in theirs:
        if file.suffix == ".json":
            ours, told = (json.loads(path.read_text()) for path in (output / file.name, file))
            told["provenance"] |= {name: ours["provenance"][name] for name in ("model", "dataName", "dataFingerprint")}
            assert_same(ours, told, file.stem, tolerance)


TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def assert_same(ours, theirs, place: str, tolerance: float) -> None:
    """Compares two bundles field by field; times, and what names model and data, are not compared."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), place
        for name in theirs:
            assert_same(ours[name], theirs[name], f"{place}.{name}", tolerance)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), place
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{place}[{index}]", tolerance)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=tolerance), place
    elif not (isinstance(theirs, str) and TIME.fullmatch(theirs)) and not place.endswith(
        ("deviceName[0].name", "what.display")
    ):
        assert ours == theirs, place
