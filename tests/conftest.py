"""Strict settings of every test: eight CPU devices, no implicit promotion, run-time type checks, warnings as errors."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # commands that tests start inherit it

import hypothesis
import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("r1jax", "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("r1jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("r1jax")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, which are not part of the repository."""
    folder = Path(os.environ.get("R1JAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets are not here: no folder {folder} (R1JAX_SHARED_DATA names another)")
    return folder
