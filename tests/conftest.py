"""Strict settings of every test: eight CPU devices, no implicit promotion, run-time type checks, warnings as errors."""

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

from tests.processes import FAST

ROOT = Path(__file__).resolve().parents[1]

# Set in the environment, so that the commands that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/d/xla"))  # pytest --cache-clear empties it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("XLA_FLAGS", FAST)

import hypothesis
import jax
import jaxtyping
import pytest
from jax._src.interpreters import mlir

from tests.data.services import hdfs, patient, redis_server, s3_url  # noqa: F401
from tests.train.forked import Server

jaxtyping.install_import_hook("r1jax", "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most programs of the tests are one operation, and this JAX takes 3 ms for the context of each, later ones a tenth.
if jax.__version__.startswith("0.10."):
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

hypothesis.settings.register_profile("r1jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("r1jax")


gc.disable()  # until all tests are collected: nothing of what is imported goes away


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()  # nor is it looked at again
    gc.enable()


def pytest_unconfigure() -> None:
    from r1jax.errors import IN_CLIENTS  # not before the hook

    IN_CLIENTS.clear()  # what tests have left waiting does not decide how pytest ends


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, which are not part of the repository."""
    folder = Path(os.environ.get("R1JAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets are not here: no folder {folder} (R1JAX_SHARED_DATA names another)")
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this test run see, and no other test run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def trainings(shared) -> Iterator[Server]:
    """Starts train.py; all its processes share a cache of compiled programs, which kills may spoil."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(shared / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    server = Server(environment)
    yield server
    server.close()
