"""Converters in environments of their own: whatever goes wrong with one is a sentence; runners are asked by case."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1jax.edge.artefact import RUNNER
from r1jax.errors import UserError
from r1jax.serve import export_iree, export_litert
from r1jax.serve.export_device import COMPLETE, Tool, ask, find_converter, run_model
from tests.serve.on_device import converter_that


@pytest.fixture(params=[export_litert.TOOL, export_iree.TOOL], ids=lambda tool: tool.worker)
def tool(request) -> Tool:
    return request.param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -SEGV $$", r"crashed at this model \(SIGSEGV\): nothing was exported"),
        ("echo 'cannot lower sort' >&2; exit 1", r"refused this model \(cannot lower sort\)"),
        ("echo \"No module named 'some_package'\" >&2; exit 3", r"lacks a package .* add --install"),
    ],
)
def test_a_converter_that_fails_is_one_sentence(tool, tmp_path, body, message):
    with pytest.raises(UserError, match=message) as caught:
        ask(tool, converter_that(tmp_path, body), {"do": "convert"})
    assert "\n" not in str(caught.value) and tool.name in str(caught.value)


def test_a_python_without_the_converter_is_told_apart(tool):
    lacking = Path(sys.executable), {"do": "convert"}
    with pytest.raises(UserError, match=f"lacks a package of the {tool.name} .*for not-there"):
        ask(tool._replace(requirements=("pytest", "not-there==1")), *lacking)
    with pytest.raises(UserError, match=f"lacks a package of the {tool.name} .*No module named"):
        ask(tool._replace(requirements=("pytest",)), *lacking)


def test_a_converter_that_cannot_be_run_is_named(tool, tmp_path):
    (tmp_path / "python").write_text("not a program")
    with pytest.raises(UserError, match="cannot be run"):
        ask(tool, tmp_path / "python", {"do": "convert"})


def test_an_installation_that_fails_leaves_no_half_environment(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = converter_that(tmp_path, "mkdir -p $4/bin; touch $4/bin/python; echo 'no network' >&2; exit 1")
    monkeypatch.setattr(sys, "executable", str(half))
    with pytest.raises(UserError, match=r"cannot be installed \(no network\)"):
        find_converter(tool, None, install=True)
    assert not tool.home.exists()


def test_an_interrupted_installation_leaves_nothing_and_can_be_repeated(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tool.home
    interrupted = [True]

    def run(command, **_):
        (home / "bin").mkdir(parents=True, exist_ok=True)
        (home / "bin" / "python").touch()
        if "pip" in command and interrupted.pop():
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        find_converter(tool, None, install=True)
    assert not home.exists()
    run(["venv"])  # a kill leaves no time to clean up
    interrupted.append(False)
    assert find_converter(tool, None, install=True) == home / "bin" / "python" and not interrupted
    assert find_converter(tool, None, install=False) == home / "bin" / "python"


def test_an_installed_converter_is_found(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    python = tool.home / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    with pytest.raises(UserError, match="add --install"):  # what an interrupted installation leaves
        find_converter(tool, None, install=False)
    (tool.home / COMPLETE).touch()
    assert find_converter(tool, None, install=False) == python


RUNS = """
import numpy as np
class InputError(Exception):
    pass
class Artefact:
    def __init__(self, folder):
        if (folder / "damaged").exists():
            raise InputError("the file is damaged")
    def predict(self, inputs):
        return {"y": 2 * inputs["x"], "sum": inputs["x"].sum()}
"""


def test_a_runner_is_asked_case_by_case(tool, tmp_path):
    package = tmp_path / RUNNER / "r1jax_edge"
    package.mkdir(parents=True)
    (package / "artefact.py").write_text(RUNS)
    versions = "import importlib.metadata; importlib.metadata.version = lambda name: '1'; "
    runs = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    python = converter_that(tmp_path, f"""exec {sys.executable} -I -c "{versions}{runs}" "$2" "$3\"""")
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = run_model(tmp_path, {"x": x}, tool, python)
    np.testing.assert_array_equal(found["y"], 2 * x)
    np.testing.assert_array_equal(found["sum"], x.sum(axis=1))
    told = {"ILL": r"lacks instructions of --target-cpu \(SIGILL\)", "BUS": r"crashes its run time \(SIGBUS\)"}
    for name, message in told.items():
        with pytest.raises(UserError, match=message):
            run_model(tmp_path, {"x": x}, tool, converter_that(tmp_path / RUNNER, f"kill -{name} $$"))
    (tmp_path / "damaged").touch()
    with pytest.raises(UserError, match=r"the written model does not run \(the file is damaged\): nothing was"):
        run_model(tmp_path, {"x": x}, tool, python)
