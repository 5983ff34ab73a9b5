"""Several processes that train together: how each finds the others, what it says, and how it leaves when one is lost.

`jax.distributed` does the work: process 0 runs a coordinator to which all send heartbeats. A process that misses them
ends all others within `launch.heartbeat_timeout`; here its end gets an exit code and a sentence that says what to do.
"""

import contextlib
import ctypes
import importlib.util
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import NamedTuple, NoReturn

import jax

from r1jax.config import LaunchConfig
from r1jax.errors import UserError

LOST = 76
"""Exit code of a process that ended because another one did (EX_PROTOCOL of sysexits.h: something remote failed)."""
GO_ON = (
    "what was saved is untouched, and the same command goes on from there, with as many processes or fewer: the first "
    "error is in the output of the process that ended"
)
REMOTE = re.compile(r"\bGloo\b|\bNCCL\b|[Cc]oordination ?[Ss]ervice")
"""What an error of a collective operation names; its type is now JAX's, now ValueError, and Orbax's where it saves."""
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What `srun` sets; a plain process of a batch script lacks the node list of a step."""


class Told(UserError):
    """A mistake that process 0 tells the user of, so that the others need not."""


class Place(NamedTuple):
    """What is known of this process among the others; `jax.distributed` asks the cluster for what is None."""

    cluster: str | None
    """JAX's name of what started the processes: slurm, ompi or k8s; None where only the config tells."""
    coordinator: str | None
    count: int | None
    index: int | None
    devices: list[int] | None = None
    """GPUs of the host that are this process's; None takes all."""

    def __str__(self) -> str:
        count = "?" if self.count is None else self.count
        return f"process {'?' if self.index is None else self.index} of {count}"


def find_place(config: LaunchConfig, env: Mapping[str, str], gpus: int) -> Place | None:
    """Looks where this process stands, in the config first and then in what srun, mpirun or Kubernetes have set.

    Args:
      config: `launch`.
      env: Environment variables.
      gpus: GPUs that the process sees.

    Returns:
      The place; None where there is one process.

    Raises:
      UserError: What is known is too little to find the others, or contradicts itself.
    """
    if config.processes == 1:
        return None
    local, beside = 0, 1
    count = index = cluster = None
    if all(name in env for name in SLURM_STEP):
        cluster, count, index = "slurm", int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"])
        local = int(env["SLURM_LOCALID"])
        beside = -(-count // int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1"))))
    elif "OMPI_COMM_WORLD_SIZE" in env:
        cluster, count, index = "ompi", int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
        local, beside = int(env["OMPI_COMM_WORLD_LOCAL_RANK"]), int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    elif "JOB_COMPLETION_INDEX" in env:
        index = int(env["JOB_COMPLETION_INDEX"])
        cluster = "k8s" if importlib.util.find_spec("kubernetes") else None
    count = config.processes if config.processes is not None else count
    index = config.process if config.process is not None else index
    if config.coordinator is not None:
        if count is None or index is None:
            raise UserError(
                f"launch.coordinator is {config.coordinator!r}, but no srun or mpirun says how many processes there "
                "are and which one this is: add --launch.processes N --launch.process I"
            )
        cluster = None if cluster == "k8s" else cluster
    elif cluster is None and (config.processes, config.process) != (None, None):  # each would train alone
        name = "processes" if config.processes is not None else "process"
        raise UserError(
            f"launch.{name} is {getattr(config, name)}, but nothing says where process 0 runs: add "
            "--launch.coordinator HOST:PORT --launch.processes N --launch.process I"
        )
    elif cluster is None or count == 1:
        return None
    elif cluster == "ompi" and "OMPI_MCA_orte_hnp_uri" not in env:
        raise UserError("Open MPI 5 does not say where process 0 runs: add --launch.coordinator HOST:PORT")
    if count is not None and count > 1 and index is not None and index >= count:
        raise UserError(f"launch.process is {index}, but it must be below the number of processes, {count}")
    return None if count == 1 else Place(cluster, config.coordinator, count, index, share_gpus(local, beside, gpus))


def share_gpus(local: int, beside: int, gpus: int) -> list[int] | None:
    """Gives each of the processes of a host its GPUs.

    Args:
      local: Number of this process on its host.
      beside: Processes of the host.
      gpus: GPUs that this process sees.

    Returns:
      Their numbers: all for a process that is alone or sees but its own, an even part otherwise.
    """
    if beside == 1 or gpus < beside:
        return list(range(gpus)) or None
    part = gpus // beside
    return list(range(local * part, (local + 1) * part))


def visible_gpus() -> int:
    """Counts NVIDIA GPUs without starting JAX."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip()])
    return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])


@contextlib.contextmanager
def launched(config: LaunchConfig) -> Iterator[None]:
    """Joins the other processes of the run, before the first computation; one process alone does nothing.

    A process that fails leaves at once, as the others may be waiting for it in a collective operation.

    Args:
      config: `launch`.

    Yields:
      Nothing.

    Raises:
      UserError: The config contradicts itself.
    """
    place = find_place(config, os.environ, visible_gpus())
    if place is None:
        yield
        return
    try:
        _connect(config, place)
        if place.index:
            sys.stderr = _Prefixed(sys.stderr, f"process {place.index}: ")
        _on_abort(f"error: {place}: another process has ended or cannot be reached; {GO_ON}\n", LOST)
        yield
        jax.distributed.shutdown()
        ctypes.CDLL(None).signal(signal.SIGABRT, None)
    except BaseException as error:
        _leave(error, place)


def _connect(config: LaunchConfig, place: Place) -> None:
    """Starts `jax.distributed`; where it finds no others, its own code ends the process, with a sentence of ours."""
    where = place.coordinator or f"the one of {place.cluster}"
    _on_abort(
        f"error: {place}: no agreement with the coordinator ({where}) within launch.connect_timeout "
        f"({config.connect_timeout} s): see that all {'' if place.count is None else place.count} processes were "
        "started, each once, with the same launch.coordinator and launch.processes, and that its port is open\n",
        2,
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, which the run answers itself
    known = None not in (place.coordinator, place.count, place.index)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.devices or (None if known else [0]),
            cluster_detection_method="deactivate" if known else place.cluster,
            initialization_timeout=config.connect_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.heartbeat_timeout,
        )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{place}: jax.distributed cannot start ({reason}): see docs/launch.md") from None


def _leave(error: BaseException, place: Place) -> NoReturn:
    """Says why this process ends, and ends it; only after a user's mistake it waits a while for the others."""
    if REMOTE.search(str(error)):
        code = LOST
        first = str(error).splitlines()[0]
        reason = f"another process has ended or cannot be reached ({first[:300]})"
        print(f"error: {place}: {reason}; {GO_ON}", file=sys.stderr)
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    elif isinstance(error, UserError):
        code = 2
        if not isinstance(error, Told):
            print(f"error: {error}", file=sys.stderr)
        _wait_for_the_same_mistake()
    else:
        code = 1
        traceback.print_exception(error)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _wait_for_the_same_mistake() -> None:
    """Gives all processes, which most often meet the same mistake, the time to say so, before they miss this one."""
    _on_abort("", 2)
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


_handlers: list[object] = []
"""What the C library was given is kept for as long as the process lives."""


def _on_abort(text: str, code: int) -> None:
    """Sets what is said, and the exit code, where the C++ of `jax.distributed` aborts the process.

    It calls abort() in a thread of its own while Python may be waiting in a collective operation, so that a handler
    of Python's, which would run in the main thread, came too late.
    """

    def ended(_: int) -> None:
        os.write(2, text.encode())
        os._exit(code)

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(ended))
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])


class _Prefixed(io.TextIOBase):
    """A stream that begins every line with the name of its process."""

    def __init__(self, stream: io.TextIOBase, prefix: str) -> None:
        self.stream, self.prefix, self.fresh = stream, prefix, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self.stream.write(self.prefix + line if self.fresh else line)
            self.fresh = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()
