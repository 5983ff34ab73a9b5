"""`r1jax export --to litert`: what goes wrong with the converter is one sentence, and the whole route where asked for.

The whole route installs the converter and LiteRT with pip (1 GB, minutes), so it runs only with R1JAX_EDGE_TESTS=1.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import eval as evaluation
from r1jax.data.synthetic import SyntheticCases
from r1jax.edge.artefact import FORMAT, RUNNER, TEXTS
from r1jax.errors import UserError
from r1jax.serve import export_litert
from r1jax.serve.export_card import write_card
from r1jax.serve.export_command import export
from r1jax.serve.export_graph import Port
from r1jax.serve.export_litert import find_converter, write_model
from tests.serve.exported import write_cases, write_checkpoint

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
        write_model(tmp_path, double, WANTED, int8=False, converter=converter_that(tmp_path, body))
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["python"]


def test_a_python_without_the_converter_is_told_apart(tmp_path):
    with pytest.raises(UserError, match="lacks a package of the LiteRT converter .*litert_converter"):
        write_model(tmp_path, double, WANTED, int8=False, converter=Path(sys.executable))


def test_a_converter_that_cannot_be_run_is_named(tmp_path):
    (tmp_path / "python").write_text("not a program")
    with pytest.raises(UserError, match="cannot be run"):
        write_model(tmp_path, double, WANTED, int8=False, converter=tmp_path / "python")


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


def test_the_package_beside_the_model_runs_as_one_file(tmp_path):
    """Everything but the converter, which a stand-in replaces by a program that writes something."""
    body = f"""exec {sys.executable} -c '
import json, sys
asked = json.load(open(sys.argv[1]))
assert "stablehlo.multiply" in open(asked["source"]).read() and asked["inputs"] == ["x"]
open(asked["target"], "w").write("model")
print(json.dumps(dict(converter="1")))' "$3\""""
    versions, outputs = write_model(tmp_path, double, WANTED, int8=True, converter=converter_that(tmp_path, body))
    assert versions == {"converter": "1"} and outputs["y"].shape == (1, 2)
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


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(os.environ.get("R1JAX_EDGE_TESTS") != "1", reason="installs 1 GB by pip: set R1JAX_EDGE_TESTS=1")
def test_a_device_without_jax_writes_the_evaluation_s_reports(tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("route")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    device = place / "device" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(place / "device")], check=True)
    subprocess.run([str(device), "-m", "pip", "install", "-q", "ai-edge-litert==2.3.0"], check=True)
    checkpoint = write_checkpoint(place / "run" / "00000024")
    raw = SyntheticCases(3, 6, "test", (16, 16, 16)).read_batch(np.arange(6))
    write_cases(place / "cases" / "cases.npz", raw)
    with jax.numpy_dtype_promotion("standard"):
        words = ["--checkpoint", str(checkpoint.path), "--data.path", str(place / "cases"), "--data.split", "all"]
        assert evaluation.main([*words, "--output", str(place / "eval"), "--resamples", "5", "--pictures", "0"]) == 0
    for name, words, tolerance in (("fp32", [], 1e-5), ("int8", ["--int8"], 0.1)):
        folder = place / name
        assert export([str(checkpoint.path), "--to", "litert", "--install", "--output", str(folder), *words]) == 0
        call = [str(device), "-I", str(folder / "r1jax_edge.pyz"), str(place / "cases" / "cases.npz")]
        subprocess.run([*call, "--output", str(place / f"reports-{name}")], check=True)
        for file in sorted((place / "eval" / "reports").glob("*.json")):
            ours = json.loads((place / f"reports-{name}" / file.name).read_text())
            if name == "fp32":
                assert_same(ours, json.loads(file.read_text()), file.stem, tolerance)
            assert (place / f"reports-{name}" / f"{file.stem}.xml").is_file()
    (place / "int8" / "model.tflite").write_bytes(b"another model")
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and "not what was exported" in done.stderr
