"""`r1jax export --to litert`: what the converter is asked, and the whole route where that is asked for.

The whole route installs the converter and LiteRT with pip (1 GB, minutes), so it runs only with R1JAX_EDGE_TESTS=1.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from r1jax.edge.artefact import FORMAT, RUNNER, TEXTS
from r1jax.serve.export_card import write_card
from r1jax.serve.export_command import export
from r1jax.serve.export_graph import GroupedCodes
from r1jax.serve.export_litert import read_constants, write_model
from tests.serve.exported import write_checkpoint
from tests.serve.exported_finance import write_checkpoint as write_finance_checkpoint
from tests.serve.on_device import (
    WANTED,
    assert_same_alerts,
    assert_same_reports,
    converter_that,
    device_with,
    double,
    run_device,
    where_asked,
    write_alerts,
    write_reports,
)


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


@pytest.fixture(scope="module")
def device(tmp_path_factory) -> Iterator[Path]:
    """A Python with LiteRT alone."""
    yield from device_with(tmp_path_factory.mktemp("tools"), "ai-edge-litert==2.3.0")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@where_asked
def test_a_device_without_jax_writes_the_evaluation_s_reports(device, tmp_path):
    place = tmp_path
    checkpoint = write_checkpoint(place / "run" / "00000024")
    cases = write_reports(checkpoint, place)
    for name, weights in (("fp32", "float"), ("fp16", "fp16"), ("int8", "int8")):
        folder = place / name
        words = [str(checkpoint.path), "--to", "litert", "--install", "--weights", weights, "--output", str(folder)]
        assert export(words) == 0
        run_device(device, folder, cases, place / f"reports-{name}")
        assert_same_reports(place / f"reports-{name}", place, 1e-5 if name == "fp32" else None)
    (place / "int8" / "model.tflite").write_bytes(b"another model")
    done = subprocess.run([str(device), "-I", str(folder / RUNNER), str(cases)], capture_output=True, text=True)
    assert done.returncode == 2 and "not what was exported" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
@where_asked
def test_a_device_without_jax_writes_the_evaluation_s_alerts(device, tmp_path):
    checkpoint = write_finance_checkpoint(tmp_path / "run" / "00000024")
    payments, folder = write_alerts(checkpoint, tmp_path), tmp_path / "edge"
    assert export([str(checkpoint.path), "--to", "litert", "--install", "--output", str(folder)]) == 0
    run_device(device, folder, payments, tmp_path / "out", "--synthetic")
    assert_same_alerts(tmp_path / "out", tmp_path, 1e-5)
