"""The cache of compiled programs: what was cut off goes, what is whole stays."""

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

from r1jax.parallel.platform import mend_cache

WHOLE = zlib.compress(bytes(range(256)) * 40)


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*-cache")}


def test_cut_off_entries_go(tmp_path):
    broken = WHOLE[:50] + bytes(20) + WHOLE[70:]
    for name, content in {"whole": WHOLE, "cut": WHOLE[:-1], "empty": b"", "zeros": broken}.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "zstandard-cache").write_bytes(b"\x28\xb5\x2f\xfd cannot be judged")
    (tmp_path / "whole-atime").write_bytes(b"")
    mend_cache(tmp_path)
    assert entries(tmp_path) == {"whole-cache", "zstandard-cache"}
    assert (tmp_path / "whole-atime").exists()


def test_only_new_entries_are_read(tmp_path):
    (tmp_path / "old-cache").write_bytes(WHOLE)
    mend_cache(tmp_path)
    (tmp_path / "old-cache").write_bytes(WHOLE[:-1])
    minute_ago = time.time() - 60
    os.utime(tmp_path / "old-cache", (minute_ago, minute_ago))
    (tmp_path / "new-cache").write_bytes(WHOLE[:-1])
    mend_cache(tmp_path)
    assert entries(tmp_path) == {"old-cache"}


def test_no_cache_is_no_error(tmp_path):
    mend_cache(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_jax_writes_again_what_was_cut_off(tmp_path):
    script = (
        "from r1jax.parallel.platform import start_platform; start_platform('cpu'); import jax; "
        "print(jax.jit(lambda x: x * 2)(1.5))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start() -> str:
        words = [sys.executable, "-c", script]
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(words, check=True, capture_output=True, text=True, cwd=root, env=environment).stderr

    start()
    names = entries(tmp_path)
    assert names
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    assert "persistent compilation cache" not in start()
    assert entries(tmp_path) == names
    assert all(zlib.decompress((tmp_path / name).read_bytes()) for name in names)
