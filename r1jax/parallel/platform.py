"""Which devices a process computes on, and where compiled programs are kept."""

import os
from pathlib import Path

import jax

from r1jax.errors import UserError


def start_platform(platform: str) -> str:
    """Chooses the platform before the first computation, and turns on the cache of compiled programs.

    Args:
      platform: auto takes the best there is; cuda and cpu take just that.

    Returns:
      One line that names the devices.

    Raises:
      UserError: A GPU was asked for and JAX finds none.
    """
    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where no plugin for the platform is installed
        reason = (str(error) or "no plugin for it is installed").splitlines()[0]
        raise UserError(
            f"--platform {platform}: JAX finds no such device ({reason}); install r1jax[cuda12] or r1jax[cuda13] on a "
            "machine with a GPU, or use --platform cpu"
        ) from None
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "r1jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), jax {jax.__version__}"
