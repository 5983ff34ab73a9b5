"""Which devices a process computes on, and where compiled programs are kept."""

import os
import time
import zlib
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
    if jax.process_index() == 0:  # which alone writes it, where processes share it
        mend_cache(Path(jax.config.jax_compilation_cache_dir))
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){processes}, jax {jax.__version__}"


def mend_cache(cache: Path) -> None:
    """Removes entries that a killed process or a full disk cut off: JAX would warn of them and compile, every time.

    JAX writes an entry in place and never replaces one. What is written while this looks is lost and compiled again.

    Args:
      cache: JAX's folder of compiled programs; entries that an earlier call found whole are not read again.
    """
    stamp, began = cache / ".checked", time.time_ns()
    try:
        checked = stamp.stat().st_mtime_ns if stamp.exists() else 0
        for entry in cache.glob("*-cache"):
            if entry.stat().st_mtime_ns >= checked and not _whole(entry.read_bytes()):
                entry.unlink(missing_ok=True)
        if cache.is_dir():
            stamp.touch()
            os.utime(stamp, ns=(began, began - 10**9))  # a second earlier: file systems have coarse clocks
    except OSError:
        return  # of another user, on another host, or just removed: JAX copes with what there is


def _whole(entry: bytes) -> bool:
    """Whether a stream of zlib has its end; other streams (JAX takes zstandard where it is installed) pass unread."""
    if not entry or entry[0] != 0x78:
        return bool(entry)
    try:
        stream = zlib.decompressobj()
        stream.decompress(entry)
        return stream.eof
    except zlib.error:
        return False
