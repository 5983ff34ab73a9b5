"""Kernels of libraries and of our own are tried on this machine's device before a program is built of them."""

import concurrent.futures
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

TOLERANCE = 2e-2
"""Relative distance of a product in bf16 from the same in fp32: 2e-3 to 4e-3 are usual, wrong ones are near 1."""


def target() -> jax.Device:
    """The device that a program which is traced now will run on."""
    chosen = jax.config.jax_default_device
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def multiprocessors() -> int:
    """Of the target; Pallas' interpreter, which runs without a GPU, is given two."""
    device = target()
    return device.core_count if device.platform == "gpu" else 2


def takes_triton() -> bool:
    """Whether kernels that JAX itself gives to Triton run on the target, and no compiler would have to divide them."""
    # JAX 0.12 has deprecated its Triton.
    return target().platform == "gpu" and jax.device_count() == 1 and (0, 11) <= jax.__version_info__ < (0, 12)


def agrees(
    what: str,
    fast: Callable[..., Array],
    reference: Callable[..., Array],
    arrays: Sequence[np.ndarray | jax.Array],
    *,
    gradients: bool = True,
) -> bool:
    """Whether a kernel gives the values and gradients of its reference; warns where it does not.

    Processes of one run that trace a program together find the same: what fails in one is used in none, or each would
    wait for the others in another program.

    It runs in a thread of its own, for the caller is in the middle of tracing a program, and what is computed there
    becomes part of that program. It costs two compilations: the kernel's values and gradients in one program of the
    device, and the reference's in one of the CPU, whose compiler does not try variants of each product.

    Args:
      what: Name of the kernel, for the warning.
      fast: Takes the arrays, returns one.
      reference: The same; is given the arrays in fp32.
      arrays: Small ones.
      gradients: Whether the kernel has any.

    Returns:
      False also where the kernel cannot be compiled or run at all.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        trouble = thread.submit(_trouble_anywhere, fast, reference, arrays, target(), gradients).result()
    if trouble:
        warnings.warn(f"{what} is not used on this machine, which is slower: {trouble}", stacklevel=2)
    return not trouble


def _trouble_anywhere(
    fast: Callable[..., Array],
    reference: Callable[..., Array],
    arrays: Sequence[np.ndarray | jax.Array],
    device: jax.Device,
    gradients: bool,
) -> str | None:
    """What is wrong with a kernel here, or that something is in another process; None where nothing is."""
    trouble = _trouble(fast, reference, arrays, device, gradients)
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.int32(trouble is not None)).any():
        return trouble or "it failed in another process of the run"
    return trouble


def _trouble(
    fast: Callable[..., Array],
    reference: Callable[..., Array],
    arrays: Sequence[np.ndarray | jax.Array],
    device: jax.Device,
    gradients: bool,
) -> str | None:
    """What is wrong with a kernel; None where nothing is."""

    def everything(function: Callable[..., Array], *arrays: Array) -> tuple[Array, ...]:
        if not gradients:
            return (function(*arrays),)
        out, back = jax.vjp(function, *arrays)
        pull = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return out, *back(pull.astype(out.dtype))

    try:
        with jax.default_device(device):
            found = jax.jit(lambda *x: everything(fast, *x))(*arrays)
        with jax.default_device(_cpu() or device), jax.default_matmul_precision("highest"):
            expected = jax.jit(lambda *x: everything(reference, *(a.astype(jnp.float32) for a in x)))(*arrays)
        pairs = [[np.asarray(x, np.float32) for x in pair] for pair in zip(found, expected, strict=True)]
    except Exception as error:  # whatever a library says to a device, version or shape that it does not support
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    distances = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    if all(distance < TOLERANCE for distance in distances):  # of NaN, this is false
        return None
    return f"its values and gradients differ from the reference by {', '.join(f'{x:.1e}' for x in distances)}"


def _cpu() -> jax.Device | None:
    """This process's CPU as a device; None where JAX was told to leave it alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
