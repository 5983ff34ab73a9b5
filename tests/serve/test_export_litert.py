"""`r1jax export --to litert`: what goes wrong with the converter is one sentence, and the whole route where asked for.

The whole route installs the converter and LiteRT with pip (1 GB, minutes), so it runs only with R1JAX_EDGE_TESTS=1.
"""

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
from r1jax.edge.artefact import FORMAT, RUNNER, TEXTS
from r1jax.edge.risk import SCORES
from r1jax.errors import UserError
from r1jax.serve import export_litert
from r1jax.serve.export_card import write_card
from r1jax.serve.export_command import export
from r1jax.serve.export_graph import GroupedCodes, Port
from r1jax.serve.export_litert import find_converter, read_constants, write_model
from r1jax.tasks.finance.task import Finance
from tests.serve.exported import write_cases, write_checkpoint
from tests.serve.exported_finance import write_checkpoint as write_finance_checkpoint

WANTED = {"x": Port((2,), "float32", "1", "")}


def converter_that(tmp_path: Path, body: str) -> Path:
    """A stand-in for the converter's Python."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return script


def double(inputs):
    return {"y": 2 * inputs["x"]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -SEGV $$", r"crashed \(SIGSEGV\) at this model: nothing was exported"),
        ("echo 'cannot lower sort' >&2; exit 1", r"refused this model \(cannot lower sort\)"),
        ("echo \"No module named 'litert_converter'\" >&2; exit 3", r"lacks a package .* add --install"),
    ],
)
def test_a_converter_that_fails_is_one_sentence(tmp_path, body, message):
    with pytest.raises(UserError, match=message) as caught:
        write_model(tmp_path, double, WANTED, narrow=False, converter=converter_that(tmp_path, body))
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["python"]


def test_a_python_without_the_converter_is_told_apart(tmp_path):
    with pytest.raises(UserError, match="lacks a package of the LiteRT converter .*litert_converter"):
        write_model(tmp_path, double, WANTED, narrow=False, converter=Path(sys.executable))


def test_a_converter_that_cannot_be_run_is_named(tmp_path):
    (tmp_path / "python").write_text("not a program")
    with pytest.raises(UserError, match="cannot be run"):
        write_model(tmp_path, double, WANTED, narrow=False, converter=tmp_path / "python")


def test_an_installation_that_fails_leaves_no_half_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = converter_that(tmp_path, "mkdir -p $4/bin; touch $4/bin/python; echo 'no network' >&2; exit 1")
    monkeypatch.setattr(sys, "executable", str(half))
    with pytest.raises(UserError, match=r"cannot be installed \(no network\)"):
        find_converter(None, install=True)
    assert not export_litert.default_environment().exists()


def test_an_interrupted_installation_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = export_litert.default_environment()
    interrupted = [True]

    def run(command, **_):
        (home / "bin").mkdir(parents=True, exist_ok=True)
        (home / "bin" / "python").touch()
        if "pip" in command and interrupted.pop():
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        find_converter(None, install=True)
    assert not home.exists()
    run(["venv"])  # a kill leaves no time to clean up
    interrupted.append(False)
    assert find_converter(None, install=True) == home / "bin" / "python" and not interrupted
    assert find_converter(None, install=False) == home / "bin" / "python"


def test_an_installed_converter_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    python = export_litert.default_environment() / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    with pytest.raises(UserError, match="add --install"):  # what an interrupted installation leaves
        find_converter(None, install=False)
    (export_litert.default_environment() / export_litert.COMPLETE).touch()
    assert find_converter(None, install=False) == python


def test_the_constants_of_the_converted_program_are_read(tmp_path):
    """A stand-in writes them; the model that it writes beside them is dropped."""
    body = f"""exec {sys.executable} -c '
import json, sys
import numpy as np
asked = json.load(open(sys.argv[1]))
assert asked["narrow"] is False
open(asked["target"], "w").write("model")
np.savez(asked["constants"], np.ones((2, 3)), np.zeros((1, 2)))
print(json.dumps(dict(versions=dict(converter="1"), stored=dict(), found=[])))' "$3\""""
    found = read_constants(double, WANTED, converter_that(tmp_path, body))
    assert [x.shape for x in found] == [(2, 3), (1, 2)] and (found[0] == 1).all()
    assert [file.name for file in tmp_path.iterdir()] == ["python"]


def test_the_package_beside_the_model_runs_as_one_file(tmp_path):
    """Everything but the converter, which a stand-in replaces by a program that writes something."""
    body = f"""exec {sys.executable} -c '
import json, sys
asked = json.load(open(sys.argv[1]))
assert "stablehlo.multiply" in open(asked["source"]).read() and asked["inputs"] == ["x"]
assert asked["narrow"] is True and asked["constants"] is None
import numpy as np
given = np.load(asked["codes"])
assert str(given["a/b.kind"]) == "int4" and given["a/b.groups"].tolist() == [[1, -7]] and given["a/b.row"] == 2
open(asked["target"], "w").write("model")
print(json.dumps(dict(versions=dict(converter="1"), stored=dict(int8=7), found=["a/b"])))' "$3\""""
    codes = {"a/b": GroupedCodes("int4", np.array([[1, -7]], np.int8), np.ones(1, np.float32), 2)}
    versions, outputs, stored, found = write_model(
        tmp_path, double, WANTED, narrow=True, converter=converter_that(tmp_path, body), codes=codes
    )
    assert versions == {"converter": "1"} and outputs["y"].shape == (1, 2)
    assert stored == {"int8": 7} and found == ["a/b"]
    sums = dict.fromkeys(["model.tflite", TEXTS, RUNNER], "0" * 64)
    write_card(tmp_path, {"format": FORMAT, "file": "model.tflite", "sha256": sums})
    np.savez(tmp_path / "cases.npz", age=[60.0])
    command = [sys.executable, "-I", str(tmp_path / "r1jax_edge.pyz"), str(tmp_path / "cases.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path / 'model.tflite'} is missing or not what was exported: copy the folder again\n"
    )


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


where_asked = pytest.mark.skipif(
    os.environ.get("R1JAX_EDGE_TESTS") != "1", reason="installs 1 GB by pip: set R1JAX_EDGE_TESTS=1"
)


@pytest.fixture(scope="module")
def device(tmp_path_factory) -> Iterator[Path]:
    """A Python with LiteRT alone; the converter is installed where the command looks for it."""
    place = tmp_path_factory.mktemp("tools")
    python = place / "device" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(place / "device")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "ai-edge-litert==2.3.0"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        yield python


@pytest.mark.slow
@pytest.mark.timeout(1500)
@where_asked
def test_a_device_without_jax_writes_the_evaluation_s_reports(device, tmp_path):
    place = tmp_path
    checkpoint = write_checkpoint(place / "run" / "00000024")
    raw = SyntheticCases(3, 6, "test", (16, 16, 16)).read_batch(np.arange(6))
    write_cases(place / "cases" / "cases.npz", raw)
    with jax.numpy_dtype_promotion("standard"):
        words = ["--checkpoint", str(checkpoint.path), "--data.path", str(place / "cases"), "--data.split", "all"]
        assert evaluation.main([*words, "--output", str(place / "eval"), "--resamples", "5", "--pictures", "0"]) == 0
    for name, weights in (("fp32", "float"), ("fp16", "fp16"), ("int8", "int8")):
        folder = place / name
        words = [str(checkpoint.path), "--to", "litert", "--install", "--weights", weights, "--output", str(folder)]
        assert export(words) == 0
        call = [str(device), "-I", str(folder / "r1jax_edge.pyz"), str(place / "cases" / "cases.npz")]
        subprocess.run([*call, "--output", str(place / f"reports-{name}")], check=True)
        for file in sorted((place / "eval" / "reports").glob("*.json")):
            ours = json.loads((place / f"reports-{name}" / file.name).read_text())
            if name == "fp32":
                assert_same(ours, json.loads(file.read_text()), file.stem, 1e-5)
            assert (place / f"reports-{name}" / f"{file.stem}.xml").is_file()
    (place / "int8" / "model.tflite").write_bytes(b"another model")
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and "not what was exported" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
@where_asked
def test_a_device_without_jax_writes_the_evaluation_s_alerts(device, tmp_path):
    checkpoint = write_finance_checkpoint(tmp_path / "run" / "00000024")
    task = Finance(checkpoint.config())
    with jax.numpy_dtype_promotion("standard"):
        words = ["--checkpoint", str(checkpoint.path), "--data.split", "test", "--reasons", "0", "--resamples", "5"]
        assert evaluation.main([*words, "--output", str(tmp_path / "eval")]) == 0
    cases = task.source("test")
    raw, table, rows = cases.read_batch(np.arange(len(cases))), cases.table, cases.rows
    names = {"customer": (table.customers, table.customer), "terminal": (table.terminals, table.terminal)}
    np.savez(
        tmp_path / "payments.npz",
        **{name: raw[name] for name in ("series", "series_state", "series_valid", "table")},
        **{name: np.array(words.take(pa.array(whose[rows])).to_pylist()) for name, (words, whose) in names.items()},
        case_id=np.array(raw["case_id"]),
        text=np.array(raw["text"]),
        seconds=table.seconds[rows],
    )
    folder = tmp_path / "edge"
    assert export([str(checkpoint.path), "--to", "litert", "--install", "--output", str(folder)]) == 0
    call = [str(device), "-I", str(folder / RUNNER), str(tmp_path / "payments.npz"), "--output", str(tmp_path / "out")]
    subprocess.run([*call, "--synthetic"], check=True)
    theirs = sorted((tmp_path / "eval" / "reports").iterdir())
    ours = {file.name for file in (tmp_path / "out").iterdir()}
    assert ours == {file.name for file in theirs} | {SCORES} and len(theirs) > 20
    for file in theirs:
        if file.suffix == ".json":
            ours, told = (json.loads(path.read_text()) for path in (tmp_path / "out" / file.name, file))
            told["provenance"] |= {name: ours["provenance"][name] for name in ("model", "dataName", "dataFingerprint")}
            assert_same(ours, told, file.stem, 1e-5)
