"""`r1jax export --to iree`: what the compiler is asked, what a device does with its file, and the whole route if asked.

The whole route installs the compiler with pip (600 MB) and compiles for minutes: only with R1JAX_EDGE_TESTS=1.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from r1jax.disk import sha256
from r1jax.edge.artefact import FORMAT, RUNNER, TEXTS, Artefact, InputError, open_iree
from r1jax.errors import UserError
from r1jax.serve import export_command, export_iree, iree_worker
from r1jax.serve.export_card import write_card
from r1jax.serve.export_command import ExportArguments, Opened, export, open_checkpoint, write
from r1jax.serve.export_device import find_converter, one_case_program
from r1jax.serve.export_iree import HERE, Target, check_target, target_of, write_model
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
from tests.train.tiny import get_config

OTHER = next(name for name in export_iree.USUAL if name != platform.machine())
RUNTIME = export_iree.TOOL.requirements[1]


def test_targets_are_a_kind_of_cpu_and_a_linux():
    usual = target_of(None, None)
    assert usual.told == {"machine": platform.machine(), "cpu": export_iree.USUAL[platform.machine()]}
    assert target_of(None, "generic") == HERE and not HERE.elsewhere and not usual.elsewhere
    for triple, cpu in (("aarch64-linux-android", "generic"), ("x86_64-unknown-linux-gnu", "x86-64-v3")):
        target = target_of(triple, None)
        assert target.told == {"machine": triple, "cpu": cpu}
        assert target.elsewhere == (platform.machine() not in triple)


@pytest.mark.parametrize("triple", ["aarch64", "sparc-sun-solaris", "aarch64-apple-darwin", "x86_64-linux-gnu --x", ""])
def test_what_is_no_linux_on_a_known_cpu_is_refused(triple):
    with pytest.raises(UserError, match="is no Linux on x86_64 or aarch64: name one as aarch64-linux-gnu"):
        target_of(triple, None)


@pytest.mark.parametrize("cpu", ["", "--help", "x86 64", "Zen4", "host"])
def test_what_is_no_name_of_a_cpu_is_refused(cpu):
    with pytest.raises(UserError, match="is no name of a CPU: take generic"):
        target_of(None, cpu)


def test_the_compiler_is_given_the_program_and_the_target(tmp_path):
    """A stand-in for its Python, which writes something."""
    body = f"""exec {sys.executable} -c '
import json, sys
asked = json.load(open(sys.argv[1]))
assert asked["do"] == "convert" and asked["converter"] == "iree_worker"
assert open(asked["source"], "rb").read(2) == b"ML"  # bytecode
open(asked["target"], "w").write(asked["cpu"] + " " + asked["triple"])
print(json.dumps(dict(versions=dict(compiler="1"))))' "$3\""""
    target = Target("aarch64-linux-gnu", "cortex-a76")
    python = converter_that(tmp_path, body)
    versions, outputs = write_model(tmp_path, double, WANTED, target, python)
    assert versions == {"compiler": "1"} and outputs["y"].shape == (1, 2)
    assert (tmp_path / "model.vmfb").read_text() == "cortex-a76 aarch64-linux-gnu" and (tmp_path / RUNNER).is_file()


def test_an_unknown_cpu_is_told_before_the_checkpoint_is_read(tmp_path, monkeypatch):
    """By a stand-in, which is given a small program for that CPU and knows none."""
    body = f"""exec {sys.executable} -c '
import json, sys
asked = json.load(open(sys.argv[1]))
program = open(asked["source"]).read()
assert "stablehlo.add" in program and len(program) < 200
sys.exit(" ".join(["no CPU", asked["cpu"], "of", asked["triple"]]))' "$3\""""
    checkpoint = write_checkpoint(tmp_path / "run" / "00000024")
    monkeypatch.setattr(export_command, "open_checkpoint", lambda *_: pytest.fail("the checkpoint was read"))
    words = ["--to", "iree", "--target-triple", f"{OTHER}-linux-gnu", "--target-cpu", "z80"]
    triple = f"{OTHER}-linux-gnu"
    message = rf"^the IREE compiler refused {triple}, CPU z80 \(no CPU z80 of {triple}\): nothing was exported$"
    with pytest.raises(UserError, match=message):
        python = converter_that(tmp_path, body)
        export([str(checkpoint.path), *words, "--converter", str(python), "--output", str(tmp_path / "edge")])
    assert not (tmp_path / "edge").exists()


@pytest.fixture(scope="module")
def device(tmp_path_factory) -> Iterator[Path]:
    """A Python with IREE's run time alone."""
    yield from device_with(tmp_path_factory.mktemp("tools"), RUNTIME)


@pytest.mark.slow
@where_asked
def test_the_compiler_itself_tells_an_unknown_cpu_at_once(device, tmp_path):
    """Within seconds, where the program of a checkpoint takes it minutes."""
    python = find_converter(export_iree.TOOL, None, install=True)
    check_target(target_of(None, None), python)
    check_target(target_of(f"{OTHER}-linux-gnu", None), python)
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"refused .*, CPU z80 \(it knows no CPU 'z80' of this machine: name another"):
        check_target(target_of(None, "z80"), python)
    assert time.perf_counter() - began < 10


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """IREE's packages, whose compiler is a script that keeps what it was told."""

    def made(body: str) -> Path:
        script = converter_that(tmp_path, f'echo "$@" > {tmp_path}/told\n{body}')
        tools = ModuleType("iree.compiler.tools")
        tools.binaries = SimpleNamespace(find_tool={"iree-compile": str(script)}.get)
        for name, module in (("iree", ModuleType("iree")), ("iree.compiler", ModuleType("iree.compiler"))):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "iree.compiler.tools", tools)
        return tmp_path / "told"

    return made


def test_a_triple_is_passed_on_where_there_is_one(compiler):
    told = compiler("exit 0")
    asked = {"source": "a", "target": "b", "cpu": "generic", "triple": None}
    assert iree_worker.convert(asked) == {}
    words = told.read_text().split()
    assert words[:3] == ["a", "-o", "b"] and "--iree-llvmcpu-target-cpu=generic" in words
    iree_worker.convert(asked | {"triple": "aarch64-linux-gnu"})
    assert told.read_text().split() == [*words, "--iree-llvmcpu-target-triple=aarch64-linux-gnu"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo \"'z80' is not a recognized processor for this target\" >&2; kill -ABRT $$", "it knows no CPU 'z80'"),
        ("kill -SEGV $$", "it crashed, SIGSEGV"),
        ("printf 'note: a\\na.mlir:1:2: error: cannot lower it\\nnote: b\\n' >&2; exit 1", "^cannot lower it$"),
        ("echo 'no room' >&2; exit 1", "^no room$"),
        ("exit 7", "exit code 7"),
    ],
)
def test_a_compiler_that_fails_says_why(compiler, body, message):
    compiler(body)
    with pytest.raises(SystemExit, match=message):
        iree_worker.convert({"source": "a", "target": "b", "cpu": "z80", "triple": None})


CARD = {
    "format": FORMAT,
    "to": "iree",
    "file": "model.vmfb",
    "versions": {"iree-base-runtime": "3.13.0"},
    "compiled_for": {"machine": "aarch64-linux-gnu", "cpu": "generic"},
    "inputs": {"b": {}, "a": {}},
    "outputs": {"difference": {}, "sum": {}},
}


def test_a_device_without_the_run_time_is_told_its_version(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "iree", None)
    for name in ("model.vmfb", TEXTS, RUNNER):
        (tmp_path / name).write_text("{}")
    write_card(tmp_path, CARD | {"sha256": {name: sha256(tmp_path / name) for name in ("model.vmfb", TEXTS, RUNNER)}})
    with pytest.raises(InputError, match=f"is not installed: pip install {RUNTIME}"):
        Artefact(tmp_path)


@pytest.fixture
def runtime(monkeypatch):
    """IREE's run time, whose program subtracts and adds; what it was configured with is kept, and steps can fail."""
    kept, wrong = [], {}

    def fail(step):
        if step in wrong:
            raise wrong[step]

    def copy_buffer(instance, content):
        fail("copy")
        return SimpleNamespace(name="graph")

    def main(*inputs):
        a, b = inputs
        return [SimpleNamespace(to_host=lambda x=x: x) for x in (a - b, a + b)]

    class SystemContext:
        instance = None
        modules = {"graph": {"main": main}}

        def __init__(self, config):
            kept.append(config)

        def add_vm_module(self, module):
            fail("add")

    made = SimpleNamespace(
        flags=SimpleNamespace(parse_flags=kept.append),
        Config=lambda driver: driver,
        SystemContext=SystemContext,
        VmModule=SimpleNamespace(copy_buffer=copy_buffer),
    )
    package = ModuleType("iree")
    package.runtime = made
    monkeypatch.setitem(sys.modules, "iree", package)
    return kept, wrong


@pytest.mark.parametrize(
    ("threads", "told"), [(1, ["local-sync"]), (3, ["--task_topology_group_count=3", "local-task"])]
)
def test_inputs_and_outputs_are_in_the_order_of_their_names(runtime, tmp_path, threads, told):
    (tmp_path / "model.vmfb").touch()
    run = open_iree(tmp_path / "model.vmfb", CARD, threads)
    found = run({"b": np.array([1.0]), "a": np.array([5.0])})
    assert found == {"difference": 4.0, "sum": 6.0} and runtime[0] == told


@pytest.mark.parametrize("step", ["copy", "add"])
@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("verifier.c:184: INVALID_ARGUMENT; bytecode version mismatch; runtime supports 17.0", "version mismatch"),
        ("<vm>:0: INCOMPATIBLE; HAL device `__device_0` not found or unavailable: #hal.device<..>", "not found"),
        ("something else", "something else"),
    ],
)
def test_a_program_of_another_machine_or_version_is_one_sentence(runtime, tmp_path, step, error, why):
    (tmp_path / "model.vmfb").touch()
    runtime[1][step] = ValueError(error)
    message = rf"does not run here \([^;:]*{why}[^;:]*\): it is compiled for aarch64-linux-gnu generic and {RUNTIME}$"
    with pytest.raises(InputError, match=message):
        open_iree(tmp_path / "model.vmfb", CARD, 1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Opened:
    decoder = dataclasses.replace(get_config().model.decoder, num_hidden_layers=2)
    model = dataclasses.replace(get_config().model, decoder=decoder, scan_layers=True, precision="bf16")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "00000024", model=model)
    asked = ExportArguments(checkpoint=str(checkpoint.path), output="", cases=6, to="iree")
    return open_checkpoint(checkpoint, asked)


def test_loops_and_sorts_stay(opened):
    """What LiteRT's converter takes only unrolled, and as products with all experts."""
    assert opened.config.model.scan_layers and opened.config.model.precision == "fp32"
    graph = opened.exported.graph(opened.task, opened.model, opened.params)
    text = one_case_program(graph, opened.exported.ports)[0].mlir_module()
    assert "stablehlo.while" in text and "stablehlo.sort" in text and "bf16" not in text


def test_a_program_for_elsewhere_is_compared_as_compiled_here(opened, tmp_path, monkeypatch, capsys):
    asked = ExportArguments(checkpoint="", output="", to="iree", target_triple=f"{OTHER}-linux-gnu")
    graph = opened.exported.graph(opened.task, opened.model, opened.params)
    program = jax.jit(graph)
    ran = []

    def written(folder, graph, wanted, target, converter):
        (folder / "model.vmfb").write_text(target.told["machine"])
        (folder / RUNNER).touch()
        return {"iree-base-runtime": "3.13.0"}, one_case_program(graph, wanted)[1]

    def run(folder, inputs, tool, converter):
        card = json.loads((folder / "card.json").read_text())
        assert card["sha256"]["model.vmfb"] == sha256(folder / "model.vmfb")
        ran.append((folder / "model.vmfb").read_text())
        return jax.device_get(program(inputs))

    monkeypatch.setattr(export_iree, "write_model", written)
    monkeypatch.setattr(export_command, "run_model", run)
    assert write(tmp_path, opened, asked, Path("python"))["agrees"]
    card = json.loads((tmp_path / "card.json").read_text())
    assert set(ran) == {platform.machine()} and (tmp_path / "model.vmfb").read_text() == f"{OTHER}-linux-gnu"
    assert card["compiled_for"] == {"machine": f"{OTHER}-linux-gnu", "cpu": export_iree.USUAL[OTHER]}
    assert f"for {OTHER}-linux-gnu it is compiled and not run" in capsys.readouterr().out
    assert card["compared_on"] == HERE.told and card["agreement"]["agrees"]
    assert card["sha256"] == {name: sha256(tmp_path / name) for name in ("model.vmfb", RUNNER, TEXTS)}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@where_asked
@pytest.mark.parametrize("kind", ["loops", "codes"])
def test_a_device_without_jax_writes_the_evaluation_s_reports(device, tmp_path, kind):
    decoder = dataclasses.replace(get_config().model.decoder, num_hidden_layers=2)
    loops = {"decoder": decoder, "scan_layers": True, "text_ngrams": 16}
    changes = loops if kind == "loops" else {"quant": ("head_=float", ".=int8")}
    model = dataclasses.replace(get_config().model, **changes)
    checkpoint = write_checkpoint(tmp_path / "run" / "00000024", model=model)
    cases = write_reports(checkpoint, tmp_path)
    words = [str(checkpoint.path), "--to", "iree", "--install", "--cases", "40"]
    assert export([*words, "--output", str(tmp_path / "edge")]) == 0
    run_device(device, tmp_path / "edge", cases, tmp_path / "reports", "--threads", "2")
    assert_same_reports(tmp_path / "reports", tmp_path, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@where_asked
def test_a_device_without_jax_writes_the_evaluation_s_alerts(device, tmp_path):
    checkpoint = write_finance_checkpoint(tmp_path / "run" / "00000024")
    payments, folder = write_alerts(checkpoint, tmp_path), tmp_path / "edge"
    assert export([str(checkpoint.path), "--to", "iree", "--install", "--cases", "40", "--output", str(folder)]) == 0
    run_device(device, folder, payments, tmp_path / "out", "--synthetic")
    assert_same_alerts(tmp_path / "out", tmp_path, 1e-5)
