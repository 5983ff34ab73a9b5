"""Who made a run or a checkpoint: versions, revision, command, device, and the variables that steer JAX."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from r1jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
STEERING = ("JAX_", "XLA_", "NCCL_")
NAMED = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
"""Variables that are kept by name; all others stay out, since any of them may be a password."""


def provenance() -> dict[str, Any]:
    """What any checkpoint says about its making.

    Returns:
      "versions", "device", "command", "git" (revision, or "unknown") and "dirty" (whether tracked files differ from
      it; None where that is unknown); JSON-able.
    """
    revision, dirty = _revision(Path(__file__))
    return {
        "versions": {
            "r1jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": jax.devices()[0].device_kind,
        "command": sys.argv,
        "git": revision,
        "dirty": dirty,
    }


def environment() -> dict[str, str]:
    """Variables of the environment that change what is computed or where; secrets are never among them."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(STEERING) or k in NAMED}


def _revision(file: Path) -> tuple[str, bool | None]:
    """The commit of the repository that tracks a file; one that merely lies around an installed copy is not meant."""

    def git(*words: str) -> str:
        call = ["git", *words]
        return subprocess.run(call, cwd=file.parent, capture_output=True, text=True, check=True, timeout=5).stdout

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        return "unknown", None
