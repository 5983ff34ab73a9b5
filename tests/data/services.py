"""Real servers for tests, fixtures of tests/conftest.py: on free ports, in temporary folders, always stopped."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data.get_servers import SERVERS, redis_binary

START_S = 90.0
"""A busy machine with other tests on it starts a JVM slowly."""
OPENED = (
    *(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in ("lang", "util", "nio", "net")),
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-opens=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
    "--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
)
"""What Hadoop 2.7 reaches into and newer Java keeps shut."""
HELP = "python tests/data/get_servers.py fetches it"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(command: list[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a server that dies with this process; what it says goes to a file."""
    leash = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with log.open("ab") as file:
        return subprocess.Popen(
            [*leash, *command], env=os.environ | (environment or {}), stdout=file, stderr=file, cwd=log.parent
        )


def stop(process: subprocess.Popen) -> None:
    """Ends a server and takes its exit code, also of one that a test has stopped or killed."""
    process.kill()
    process.wait()


def until(ready, process: subprocess.Popen, log: Path) -> None:
    """Waits until a server answers; fails with the end of its log where it does not."""
    end = time.monotonic() + START_S
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text("utf-8", "replace")[-1500:]
            raise RuntimeError(f"{process.args} is not up, exit code {process.poll()}: {said}")
        time.sleep(0.05)


@dataclass
class RedisServer:
    """A Redis server of its own; a test may kill, stop or flush it.

    Attributes:
      process: `process.kill()`, `process.send_signal(signal.SIGSTOP)` and so on are meant to be used.
      host: Always 127.0.0.1.
      port: TCP port.
      socket: Path of the unix socket.
    """

    process: subprocess.Popen
    host: str
    port: int
    socket: Path

    @property
    def url(self) -> str:
        """redis:// URL of the TCP port."""
        return f"redis://{self.host}:{self.port}"

    @property
    def unix_url(self) -> str:
        """unix:// URL of the socket."""
        return f"unix://{self.socket}"


@contextmanager
def start_redis(folder: Path, *options: str, port: int | None = None) -> Iterator[RedisServer]:
    """Runs a Redis server for one test or one session; skips where there is none.

    Args:
      folder: Empty folder for its files; a short path, or the socket's name is too long for the system.
      *options: Further options, such as `--maxmemory`, `4mb`.
      port: A port that was used before, to come back after a crash; None takes a free one.
    """
    binary = redis_binary()
    command, libraries = shutil.which("redis-server"), {}
    if binary is not None:
        command = str(binary)
        folders = sorted({str(path.parent) for path in (SERVERS / "redis").rglob("*.so*")})
        libraries = {"LD_LIBRARY_PATH": ":".join(folders)}
    if command is None:
        pytest.skip(f"no redis-server on this machine and none in {SERVERS}: {HELP}")
    port = port or free_port()
    place = folder / f"{port}.sock"
    fixed = ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", str(place), "--save", "", "--appendonly", "no"]
    process = launch([command, *fixed, "--dir", str(folder), *options], folder / "redis.log", libraries)
    try:
        until(lambda: connects(port), process, folder / "redis.log")
        yield RedisServer(process, "127.0.0.1", port, place)
    finally:
        stop(process)


def connects(port: int) -> bool:
    """Whether somebody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    """One Redis server for all tests that leave it running; those that kill it call `start_redis` themselves."""
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
