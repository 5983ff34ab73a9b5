"""Processes that find each other on this machine: what they agree on, read and save."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.parallel.mesh import make_mesh, shard_tree
from r1jax.train.checkpoint import Checkpoint, abstract_like
from r1jax.train.checkpoints import CheckpointFolder
from tests.parallel.together import numbers
from tests.processes import finish, start

SCRIPT = Path(__file__).with_name("together.py")


def together(folder: Path, processes: int, devices: int, *flags: object) -> list[dict]:
    """Runs together.py; what each process found."""
    checkpoints = folder / "checkpoints"
    here = folder / f"{processes} processes"
    codes, errors = finish(start(here, SCRIPT, processes, devices, "--folder", checkpoints, *flags), here)
    assert codes == [0] * processes, "\n".join(errors)
    # The last line: Gloo writes before it.
    return [json.loads((here / f"out.{i}").read_text().splitlines()[-1]) for i in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    """Two processes of two devices, which save checkpoint 1."""
    return together(folder, 2, 2, "--step", 1)


@pytest.fixture(scope="module")
def four(folder, two) -> list[dict]:
    """Four processes of one device, which read checkpoint 1 and save it as checkpoint 2."""
    return together(folder, 4, 1, "--step", 2, "--restore", 1)


def arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """What a checkpoint holds, read in this process without its devices."""
    checkpoint.verify()
    like = numbers()
    return checkpoint.read({k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in like.items()})


@pytest.mark.slow
def test_all_agree(two, four):
    for found in (two, four):
        count = len(found)
        assert [of["place"] for of in found] == [[i, count, 4] for i in range(count)]
        mistake = [["UserError", "no such thing"]] + [["Told", "no such thing"]] * (count - 1)
        for i, of in enumerate(found):
            assert of["said"] == [["of", 0], mistake[i], ["OSError", "[Errno 28] No space left on device"]]
            assert of["votes"] == [0, 0, 0, 15, 0, 0]  # given at the second step, known two steps later


@pytest.mark.slow
def test_a_kernel_that_fails_in_one_process_is_used_in_none(two, four):
    for found in (two, four):
        for i, of in enumerate(found):
            here, elsewhere = "its values and gradients diff", "it failed in another process "
            assert of["kernels"] == [[True], [False, here if i == 1 else elsewhere]]


@pytest.mark.slow
def test_each_reads_its_share(two, four):
    for found, rows in ((two, 8), (four, 4)):
        for of in found:
            assert of["batch"] == list(range(16)) and of["rows read"] == rows


@pytest.mark.slow
def test_what_each_has_read_comes_together_bit_for_bit(two, four):
    numbers = [[2**40 + i, 2**40 - i] for i in range(32)]
    texts = [*map(str, range(31)), "long31"]
    assert all(of["gathered"] == [numbers, texts] for of in (*two, *four))


@pytest.mark.slow
def test_checkpoints_move_between_processes_bit_for_bit(folder, two, four):
    checkpoints, like = CheckpointFolder(folder / "checkpoints"), numbers()
    assert [c.step for c in checkpoints.all()] == [1, 2] and not list(checkpoints.path.glob(".draft*"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    for checkpoint in checkpoints.all():
        on_eight = checkpoint.restore(abstract_like(like, shard_tree(mesh, like)))
        assert len(on_eight["sharded"].sharding.device_set) == 8
        for name, x in arrays(checkpoint).items():
            assert x.tobytes() == like[name].tobytes() == np.asarray(on_eight[name]).tobytes(), name
    assert len({of["sum"] for of in four}) == 4  # each held a part of its own
