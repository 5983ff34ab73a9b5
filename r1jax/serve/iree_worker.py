"""The part of device_worker.py that knows IREE: StableHLO -> .vmfb, by the compiler's own program."""

import signal
import subprocess
from typing import Any

OPTIONS = (
    "--iree-input-type=stablehlo",
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
)
UNKNOWN = "is not a recognized processor"
"""What the compiler says of a CPU that it does not know, before it goes on or dies of something else."""


def convert(asked: dict[str, Any]) -> dict[str, Any]:
    """Compiles a program of StableHLO for one kind of CPU.

    Args:
      asked: "source", "target" (files), "cpu", and "triple", None being this machine's.

    Returns:
      Nothing more.
    """
    from iree.compiler.tools import binaries

    command = [binaries.find_tool("iree-compile"), asked["source"], "-o", asked["target"], *OPTIONS]
    command += [f"--iree-llvmcpu-target-cpu={asked['cpu']}"]
    command += [f"--iree-llvmcpu-target-triple={asked['triple']}"] if asked["triple"] else []
    done = subprocess.run(command, capture_output=True, text=True)
    if UNKNOWN in done.stderr:
        raise SystemExit(f"it knows no CPU {asked['cpu']!r} of {asked['triple'] or 'this machine'}: name another one")
    if done.returncode < 0:
        raise SystemExit(f"it crashed, {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        wrong = [line.partition("error: ")[2] for line in lines if "error: " in line]
        raise SystemExit((wrong or lines or [f"exit code {done.returncode}"])[0])
    return {}
