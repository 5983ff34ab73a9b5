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
from pyarrow.fs import FileSystem

from tests.data.get_servers import SERVERS, hadoop_jars, redis_binary

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


@pytest.fixture
def patient(monkeypatch) -> None:
    """A server that is well may take its time, on a machine that others use."""
    monkeypatch.setattr("r1jax.data.cache_redis.TIMEOUT_S", 20.0)
    monkeypatch.setattr("r1jax.data.cache_redis.DEADLINE_S", 60.0)
    monkeypatch.setattr("r1jax.data.tiered.LEASE_WAIT_S", 20.0)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    """One Redis server for all tests that leave it running; those that kill it call `start_redis` themselves."""
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


CORE = """fs.defaultFS=hdfs://127.0.0.1:{rpc}
hadoop.tmp.dir={folder}/scratch"""
SITE = """dfs.replication=1
dfs.webhdfs.enabled=false
dfs.permissions.enabled=false
dfs.namenode.datanode.registration.ip-hostname-check=false
dfs.namenode.name.dir=file://{folder}/nn
dfs.datanode.data.dir=file://{folder}/dn
dfs.namenode.http-address=127.0.0.1:{web}
dfs.datanode.address=127.0.0.1:{data}
dfs.datanode.http.address=127.0.0.1:{data_web}
dfs.datanode.ipc.address=127.0.0.1:{ipc}"""
LOG = """log4j.rootLogger=INFO,A
log4j.appender.A=org.apache.log4j.ConsoleAppender
log4j.appender.A.layout=org.apache.log4j.PatternLayout
log4j.appender.A.layout.ConversionPattern=%d %p %c{1}: %m%n
"""
SERVER = "org.apache.hadoop.hdfs.server"


@dataclass
class Hdfs:
    """An HDFS of one NameNode and one DataNode.

    Attributes:
      folder: Its files and logs.
      command: How its JVMs are called.
      port: RPC port of the NameNode.
      nodes: Running JVMs by role.
    """

    folder: Path
    command: list[str]
    port: int
    nodes: dict[str, subprocess.Popen]

    @property
    def url(self) -> str:
        """hdfs:// URL of the root."""
        return f"hdfs://127.0.0.1:{self.port}"

    def start(self, role: str, log: str, ready: str) -> None:
        """Starts a node and waits until its log, or the NameNode's, says so once more than before."""
        path = self.folder / log
        before = path.read_text("utf-8", "replace").count(ready) if path.exists() else 0
        process = launch([*self.command, f"{SERVER}.{role}"], self.folder / f"{role.rpartition('.')[2]}.log")
        self.nodes[role] = process
        until(lambda: path.read_text("utf-8", "replace").count(ready) > before, process, path)

    def start_datanode(self) -> None:
        """Starts the DataNode, for the first time or after a test has killed it."""
        self.start("datanode.DataNode", "NameNode.log", "BLOCK* processReport: from storage")

    def kill_datanode(self) -> None:
        """Ends the DataNode as a crash would."""
        stop(self.nodes.pop("datanode.DataNode"))


@contextmanager
def start_hdfs(folder: Path) -> Iterator[Hdfs]:
    """Runs an HDFS; skips where Java or Hadoop's jars are missing.

    Args:
      folder: Empty folder for its files.
    """
    jars, java = hadoop_jars(), shutil.which("java")
    if java is None:
        pytest.skip("no Java on this machine, which HDFS needs: install a JRE, 11 or newer")
    if jars is None:
        pytest.skip(f"no Hadoop jars in {SERVERS}: {HELP}")
    ports = {name: free_port() for name in ("rpc", "web", "data", "data_web", "ipc")}
    conf = folder / "conf"
    for name in ("hdfs", "datanode"):  # the nodes insist on their web pages, and are content with empty ones
        (conf / "webapps" / name / "WEB-INF").mkdir(parents=True)
        (conf / "webapps" / name / "WEB-INF/web.xml").write_text("<web-app/>", "utf-8")
    for name, text in (("core-site.xml", CORE), ("hdfs-site.xml", SITE)):
        pairs = (line.split("=", 1) for line in text.format(folder=folder, **ports).splitlines())
        listed = "".join(f"<property><name>{key}</name><value>{value}</value></property>" for key, value in pairs)
        (conf / name).write_text(f"<configuration>{listed}</configuration>", "utf-8")
    (conf / "log4j.properties").write_text(LOG, "utf-8")
    command = [java, *OPENED, "-Xmx256m", "-cp", f"{conf}:{jars}/*"]
    hdfs = Hdfs(folder, command, ports["rpc"], {})
    with (folder / "format.log").open("wb") as log:
        arguments = [f"{SERVER}.namenode.NameNode", "-format", "-nonInteractive"]
        subprocess.run([*command, *arguments], stdout=log, stderr=log, cwd=folder, timeout=START_S, check=True)
    try:
        hdfs.start("namenode.NameNode", "NameNode.log", "NameNode RPC up at")
        hdfs.start_datanode()
        yield hdfs
    finally:
        for process in hdfs.nodes.values():
            stop(process)


@pytest.fixture(scope="session")
def hdfs(tmp_path_factory) -> Iterator[Hdfs]:
    """One HDFS for all tests; who kills its DataNode starts it again."""
    with start_hdfs(tmp_path_factory.mktemp("hdfs")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """s3:// URL of an empty bucket on a server of this process; its address and keys are in the environment."""
    pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[server]'")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            FileSystem.from_uri("s3://r1jax-bucket?allow_bucket_creation=true")[0].create_dir("r1jax-bucket")
            yield "s3://r1jax-bucket"
        finally:
            server.stop()
