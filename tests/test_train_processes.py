"""A run in several processes, as srun starts them: stopped, killed, gone on with fewer, and the end of one process."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from r1jax.parallel.launch import LOST
from r1jax.train.checkpoints import CheckpointFolder
from tests.processes import ROOT, environment, finish, places
from tests.train.forked import Forked, Server, signal_at

FLAGS = (
    *("--config", ROOT / "tests" / "train" / "tiny_language.py", "--mesh.data", 1, "--mesh.fsdp", -1),
    *("--model.decoder.vocab_size", 4096, "--model.decoder.num_nextn_predict_layers", 0),  # embeddings that are sharded
    *("--train.steps", 24, "--train.batch_size", 8, "--train.save_every", 3, "--train.eval_every", 12),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Forks processes that have imported train.py."""
    server = Server(environment(1, tmp_path_factory.mktemp("xla")))
    yield server
    server.close()


def train(
    server: Server, folder: Path, workdir: Path, processes: int, devices: int, *flags: object, before: dict[int, str]
) -> list[Forked]:
    """Starts all; some run Python of their own first."""
    folder.mkdir()
    first = f"import jax; jax.config.update('jax_num_cpu_devices', {devices})\n"
    words = (*FLAGS, *flags, "--workdir", workdir)
    return [
        server.start(folder / f"out.{i}", folder / f"err.{i}", *words, *place, before=first + before.get(i, ""))
        for i, place in enumerate(places(processes))
    ]


def at_row(number: int, row: int) -> str:
    """Sends a process a signal when it comes to a row of its figures, one a step."""
    return signal_at("r1jax.telemetry:Telemetry.log", number, call=row, delay=0.0)


PIPELINE = ("--mesh.pipe", 2, "--model.decoder.num_hidden_layers", 2)
"""Two stages, each on the devices of a process where there are two."""
READS = """
import sys
from r1jax.train import evaluation
batches = evaluation.padded_batches

def counted(*given, **how):
    read = 0
    for item in batches(*given, **how):
        read += len(item[2]["case_id"])
        yield item
    print("validation read", read, file=sys.stderr)

evaluation.padded_batches = counted
"""
"""Has a process say how many cases it has read in a validation."""
SCORED = "validation.text.loss"
REFUSED = """
from r1jax.train.guard import PATIENCE, Guard
settle, calls = Guard.settle, []

def refuse(self, flags):
    calls.append(settle(self, flags))
    self.streak = PATIENCE if len(calls) == 8 else self.streak
    return calls[-1]

Guard.settle = refuse
"""
"""Has the guard of a process find that the steps before step 8 were refused, once."""


def rows(workdir: Path, having: str = "loss") -> dict[int, dict]:
    """Rows of metrics.jsonl that have such a figure, by step."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row for row in read if having in row}


def last_state(workdir: Path) -> dict[str, np.ndarray]:
    newest = CheckpointFolder(workdir / "checkpoints").all()[-1]
    newest.verify()
    with ocp.PyTreeCheckpointer() as checkpointer:
        structure = checkpointer.metadata(newest.path.absolute() / "state").item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        state = checkpointer.restore(newest.path.absolute() / "state", restore_args=numpy)
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopped_killed_and_gone_on_with_fewer_processes(server, tmp_path):
    """Four processes, of which one is told to stop; then two, of which one is killed; then one."""
    workdir, folder = tmp_path / "run", CheckpointFolder(tmp_path / "run" / "checkpoints")

    reference = train(server, tmp_path / "undisturbed", tmp_path / "undisturbed" / "run", 1, 4, before={})
    codes, errors = finish(reference, tmp_path / "undisturbed")
    assert codes == [0], errors[0]

    four = train(server, tmp_path / "four", workdir, 4, 1, before={2: at_row(signal.SIGTERM, 3)})
    codes, errors = finish(four, tmp_path / "four")
    assert codes == [128 + signal.SIGTERM] * 4, "\n".join(errors)
    stopped = folder.all()[-1].step
    assert f"SIGTERM: saved at step {stopped}; the same command goes on from there" in errors[0] and stopped < 24
    assert not any(line.startswith("process ") for text in errors[1:] for line in text.splitlines())  # all quiet

    two = train(server, tmp_path / "two", workdir, 2, 2, before={1: at_row(signal.SIGKILL, 5)})
    codes, errors = finish(two, tmp_path / "two")
    assert codes == [LOST, -signal.SIGKILL], "\n".join(errors)
    assert "process 0 of 2: another process has ended" in errors[0]
    kept = folder.all()[-1].step
    assert stopped < kept < 24 and len(rows(workdir)) >= kept

    one = train(server, tmp_path / "one", workdir, 1, 4, before={})
    codes, errors = finish(one, tmp_path / "one")
    assert codes == [0] and f"goes on from {folder.at(kept).path}" in errors[0]

    expected, got = rows(tmp_path / "undisturbed" / "run"), rows(workdir)
    assert got.keys() == expected.keys() == set(range(1, 25))
    for name in ("loss", "gradient_norm"):  # nothing but the order of additions differs
        np.testing.assert_allclose([r[name] for r in got.values()], [r[name] for r in expected.values()], rtol=1e-5)
    expected, got = last_state(tmp_path / "undisturbed" / "run"), last_state(workdir)
    assert got.keys() == expected.keys() and len(got) > 50
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
    events = [json.loads(line)["event"] for line in (workdir / "history.jsonl").read_text().splitlines()]
    # "failed" is written where an operation between the two breaks off, and not where heartbeats are missed first.
    assert [event for event in events if event != "failed"] == ["started", "stopped", "started", "started", "ended"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_go_back_together(server, tmp_path):
    """Many refused steps send a pipeline back; in two processes it goes the way that it goes in one."""
    found, scored = {}, {}
    for processes, devices in ((1, 4), (2, 2)):
        here, workdir = tmp_path / f"{processes}", tmp_path / f"{processes}" / "run"
        before = dict.fromkeys(range(2), REFUSED + READS)
        codes, errors = finish(train(server, here, workdir, processes, devices, *PIPELINE, before=before), here)
        assert codes == [0] * processes, "\n".join(errors)
        assert "back to step 6, without the 2 batches since" in errors[0]
        # Fifteen cases in batches of eight: each process reads its part of both, the last of which is filled.
        told = f"validation read {16 // processes}"
        assert all(text.count(f"{told}\n") == 2 for text in errors)
        assert not any(line.startswith("process ") and told not in line for line in errors[-1].splitlines())
        (jump,) = json.loads((workdir / "jumps.json").read_text())
        assert (jump["step"], jump["batches"]) == (6, 2)
        found[processes], scored[processes] = rows(workdir), rows(workdir, SCORED)
    assert found[1].keys() == found[2].keys() == set(range(1, 25)) and scored[1].keys() == scored[2].keys() == {12, 24}
    np.testing.assert_allclose(*([row["loss"] for row in found[n].values()] for n in (1, 2)), rtol=1e-5)
    for step, row in scored[1].items():
        for name, value in row.items():
            if name.startswith("validation."):
                assert scored[2][step][name] == pytest.approx(value, rel=1e-5), name
