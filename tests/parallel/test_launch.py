"""How a process finds the others and how it leaves: what srun, mpirun and Kubernetes set, and what is said."""

import signal
from pathlib import Path

import pytest

from r1jax.config import LaunchConfig
from r1jax.errors import UserError
from r1jax.parallel.launch import LOST, Place, find_place, share_gpus, visible_gpus
from tests.processes import finish, start

SCRIPT = Path(__file__).with_name("together.py")
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HERE = "node01:8476"


@pytest.mark.parametrize(
    ("config", "env", "gpus", "expected"),
    [
        ({}, {}, 8, None),
        ({}, SLURM, 8, Place("slurm", None, 4, 3, [4, 5, 6, 7])),
        ({}, SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, 8, (1, 2, list(range(8)))),
        ({}, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 8, None),
        ({}, {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, 8, None),  # sbatch without srun
        ({"processes": 1}, SLURM, 8, None),
        ({}, MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911"}, 1, Place("ompi", None, 4, 1, [0])),
        ({}, MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, 1, None),
        ({"coordinator": HERE}, MPI, 2, Place("ompi", HERE, 4, 1, [1])),
        ({"coordinator": HERE, "processes": 2, "process": 1}, {}, 0, Place(None, HERE, 2, 1, None)),
        ({"coordinator": HERE, "processes": 2}, {"JOB_COMPLETION_INDEX": "1"}, 8, (1, 2, list(range(8)))),
        ({}, {"JOB_COMPLETION_INDEX": "1"}, 8, None),  # without JAX's access to Kubernetes, as with a lone indexed job
    ],
)
def test_place(monkeypatch, config, env, gpus, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    place = find_place(LaunchConfig(**config), env, gpus)
    assert place == expected or (place.index, place.count, place.devices) == expected


def test_kubernetes_asks_its_server(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "kubernetes")
    place = find_place(LaunchConfig(), {"JOB_COMPLETION_INDEX": "2"}, 8)
    assert place == Place("k8s", None, None, 2, list(range(8)))


@pytest.mark.parametrize(
    ("config", "env", "message"),
    [
        ({"coordinator": HERE}, {}, "add --launch.processes N --launch.process I"),
        ({"processes": 2, "process": 0}, {}, "launch.processes is 2, but .*: add --launch.coordinator HOST:PORT"),
        ({"process": 1}, {}, "launch.process is 1, but .*: add --launch.coordinator HOST:PORT"),
        ({"processes": 2}, {"JOB_COMPLETION_INDEX": "1"}, "launch.processes is 2, but .*: add --launch.coordinator"),
        ({}, MPI, "Open MPI 5 does not say where process 0 runs: add --launch.coordinator HOST:PORT"),
        ({"process": 4}, SLURM, "launch.process is 4, but it must be below the number of processes, 4"),
    ],
)
def test_contradictions(monkeypatch, config, env, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        find_place(LaunchConfig(**config), env, 8)


def test_gpus_of_a_host_are_shared():
    assert [share_gpus(i, 2, 8) for i in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [share_gpus(i, 8, 8) for i in (0, 7)] == [[0], [7]]
    assert share_gpus(3, 4, 1) == [0]  # srun --gpus-per-task=1 shows each its own
    assert share_gpus(0, 1, 0) is None and share_gpus(1, 2, 0) is None


def test_visible_gpus(monkeypatch):
    for value, count in (("0,1,3", 3), ("", 0), ("GPU-1a, GPU-2b", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == count


def run(folder, processes, *flags):
    """Runs together.py."""
    return finish(start(folder, SCRIPT, processes, 1, "--folder", folder / "checkpoints", *flags), folder)


@pytest.mark.slow
def test_a_process_that_is_frozen_ends_the_others(tmp_path):
    """As with NCCL, the collective operation only waits: it is the heartbeats that tell."""
    processes = start(
        tmp_path, SCRIPT, 2, 1, "--ends", 1, "--signal", int(signal.SIGSTOP), "--launch.heartbeat_timeout", 4
    )
    try:
        assert processes[0].wait(timeout=250) == LOST
    finally:
        finish([process for process in processes if not process.kill()], tmp_path)
    said = (tmp_path / "err.0").read_text()
    assert "error: process 0 of 2: another process has ended or cannot be reached; what was saved is untouched" in said


@pytest.mark.slow
def test_the_others_end_with_process_0(tmp_path):
    """At once: heartbeats would be missed only after the test has given up."""
    codes, errors = run(tmp_path, 2, "--ends", 0, "--launch.heartbeat_timeout", 600)
    assert codes == [-signal.SIGKILL, LOST]
    assert "process 1 of 2: " in errors[1] and "the same command goes on from there" in errors[1]


@pytest.mark.slow
def test_a_mistake_that_all_meet(tmp_path):
    codes, errors = run(tmp_path, 2, "--mistaken", "no such folder")
    assert codes == [2, 2]
    assert errors[0].splitlines()[-1] == "error: no such folder"
    assert errors[1].splitlines()[-1] == "process 1: error: no such folder"


@pytest.mark.slow
def test_a_coordinator_that_is_not_there(tmp_path):
    flags = ("--launch.coordinator", "localhost:9", "--launch.processes", 2, "--launch.process", 1)
    codes, errors = run(tmp_path, 1, *flags, "--launch.connect_timeout", 1)
    assert codes == [2]
    assert "error: process 1 of 2: no agreement with the coordinator (localhost:9) within" in errors[0]
