"""What processes do together, to be started several times: says what each found as JSON."""

import json
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.cli import load_arguments
from r1jax.config import Config, LaunchConfig, MeshConfig
from r1jax.errors import UserError
from r1jax.ops.self_test import agrees
from r1jax.parallel.agree import Vote, from_first, place_share, share_of, whole_rows
from r1jax.parallel.launch import launched
from r1jax.parallel.mesh import make_mesh, shard_tree
from r1jax.train.checkpoint import abstract_like
from r1jax.train.checkpoints import CheckpointFolder


@dataclass(frozen=True)
class Arguments:
    """Of this script."""

    folder: str = "nowhere"
    step: int = 1
    """Number of the checkpoint to write."""
    restore: int = 0
    """Number of the one to read first; 0 makes the numbers anew."""
    ends: int = -1
    """Number of the process that a signal ends instead."""
    signal: int = 9
    mistaken: str = ""
    """What is said of a mistake that all meet, process 0 first; process 1 two seconds later."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)


def numbers() -> dict[str, np.ndarray]:
    """A state with an array that is sharded and two that are not."""
    draw = np.random.default_rng(0)
    sharded = draw.standard_normal((256, 512), np.float32)
    return {"sharded": sharded, "whole": draw.standard_normal(7, np.float32), "step": np.int32(5)}


def refused() -> str:
    raise UserError("no such thing")


def full() -> str:
    raise OSError(28, "No space left on device")


def caught(find) -> list[str]:
    try:
        return from_first(find)
    except (UserError, OSError) as error:
        return [type(error).__name__, str(error)]


def kernels() -> list[list[object]]:
    """Whether kernels are used here: one that is right everywhere, and one that is wrong in process 1 alone."""
    wrong = 2.0 if jax.process_index() == 1 else 1.0
    found = []
    for factor in (1.0, wrong):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            used = agrees("it", lambda x, f=factor: f * x @ x.T, lambda x: x @ x.T, [np.ones((2, 3), np.float32)])
        found.append([used, *(str(warning.message).rpartition("slower: ")[2][:29] for warning in told)])
    return found


def main(arguments: Arguments) -> None:
    if arguments.mistaken:
        time.sleep(2 * jax.process_index())
        raise UserError(arguments.mistaken)
    if arguments.ends >= 0:
        from_first(lambda: None)
        if jax.process_index() == arguments.ends:
            os.kill(os.getpid(), arguments.signal)
        from_first(lambda: None)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    index, count = jax.process_index(), jax.process_count()
    found = {"place": [index, count, jax.device_count()]}
    found["said"] = [caught(lambda: ["of", index]), caught(refused), caught(full)]
    found["kernels"] = kernels()
    vote = Vote(mesh)
    found["votes"] = [vote.cast(15 if (step, index) == (1, count - 1) else 0) for step in range(6)]
    part, parts = share_of(mesh, 16)
    rows, own = np.arange(16, dtype=np.float32), slice(part * 16 // parts, (part + 1) * 16 // parts)
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    found["batch"] = np.asarray(whole(place_share(mesh, rows[own], 16))).tolist()
    two = np.arange(32).reshape(2, 16)[:, own].reshape(-1)  # of two batches
    large, texts = 2**40 + np.stack([two, -two], axis=1), np.array([f"long{i}" if i == 31 else str(i) for i in two])
    found["gathered"] = [whole_rows(mesh, x, 16).tolist() for x in (large, texts)]
    found["rows read"] = 16 // parts
    like = numbers()
    where = shard_tree(mesh, like)
    checkpoints = CheckpointFolder(Path(arguments.folder))
    if arguments.restore:
        state = checkpoints.at(arguments.restore).restore(abstract_like(like, where))
    else:
        state = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i, x=x: x[i]), like, where)
    meta = {"step": arguments.step, "validation": {"score": -arguments.step}, "versions": {"r1jax": "0"}}
    checkpoints.save(arguments.step, state, Config(), meta)
    found["sum"] = float(jnp.sum(state["sharded"].addressable_data(0)))
    print(json.dumps(found))


if __name__ == "__main__":
    given = load_arguments(Arguments, sys.argv[1:], "together.py", "Examples:\n  together.py --folder F --step 1")
    with launched(given.launch):
        main(given)
