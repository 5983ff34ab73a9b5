"""Fetches the servers that tests of the data layer start: Redis from Debian's packages, HDFS from pyspark's archive.

  python tests/data/get_servers.py

They go to $XDG_CACHE_HOME/r1jax-tests (about 32 MB), once. What cannot be had is named in one line, and the tests that
need it are skipped; nothing is installed and no service of the machine is touched.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

SERVERS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1jax-tests"
DEBIAN = (
    "redis-server",
    "redis-tools",
    "libjemalloc2",
    "liblua5.1-0",
    "liblzf1",
    "lua-cjson",
    "lua-bitop",
    "libatomic1",
)
SPARK = "pyspark==2.4.8"  # the last release that bundles a NameNode and a DataNode (Hadoop 2.7.3)
JARS = """
    commons-cli-1.2 commons-codec-1.10 commons-collections-3.2.2 commons-configuration-1.6 commons-io-2.4
    commons-lang-2.6 commons-logging-1.1.3 guava-14.0.1 hadoop-annotations-2.7.3 hadoop-auth-2.7.3 hadoop-common-2.7.3
    hadoop-hdfs-2.7.3 htrace-core-3.1.0-incubating jackson-core-asl-1.9.13 jackson-mapper-asl-1.9.13
    javax.servlet-api-3.1.0 javax.ws.rs-api-2.0.1 jetty-6.1.26 jetty-util-6.1.26 jsr305-1.3.9 leveldbjni-all-1.8
    log4j-1.2.17 netty-3.9.9.Final netty-all-4.1.47.Final protobuf-java-2.5.0 slf4j-api-1.7.16 slf4j-log4j12-1.7.16
    xercesImpl-2.9.1 xmlenc-0.52
"""
JARS_SUM = "61832c1f5ef03e4e582497e31e99424694199c0f39f3d472dc4909e0f3316876"
"""SHA-256 over the sums of the jars, in the order above: what is started here is known to the last bit."""
LIMIT_S = 300


def redis_binary() -> Path | None:
    """Finds the unpacked Redis server."""
    found = SERVERS / "redis/usr/bin/redis-server"
    return found if found.exists() else None


def hadoop_jars() -> Path | None:
    """Finds the folder of Hadoop's jars."""
    found = SERVERS / "hadoop"
    return found if found.is_dir() else None


def get_redis(work: Path) -> None:
    """Unpacks Redis and the libraries that it needs; nothing is installed."""
    download = ["apt-get", "download", "-q", "-o", "Acquire::http::Timeout=20", *DEBIAN]
    try:
        run(download, work)
    except RuntimeError:  # a fresh system has no lists of packages yet
        run(["apt-get", "update", "-q", "-o", "Acquire::http::Timeout=20"], work)
        run(download, work)
    packages = sorted(work.glob("*.deb"))
    for package in packages:
        run(["dpkg", "-x", package.name, "root"], work)
    publish(work / "root", SERVERS / "redis")


def get_hadoop(work: Path) -> None:
    """Takes Hadoop's jars out of pyspark's source archive and compares their sums."""
    (work / "build.txt").write_text("pypandoc<1.8\n", "utf-8")  # its setup.py calls what later releases lack
    constraint = str(work / "build.txt")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--retries=1"]
    # Older pip hands PIP_CONSTRAINT on to the build, newer pip has a name of its own for that.
    names = {"PIP_CONSTRAINT": constraint, "PIP_BUILD_CONSTRAINT": constraint, "TMPDIR": str(work)}
    run([*command, "--no-deps", "--no-binary", ":all:", SPARK], work, names)
    (work / "jars").mkdir()
    wanted = {f"{name}.jar" for name in JARS.split()}
    archive = next(work.glob("pyspark-*.tar.gz"))
    with tarfile.open(archive) as spark:
        for member in spark:
            name = Path(member.name).name
            if name in wanted and member.isfile():
                with spark.extractfile(member) as packed, (work / "jars" / name).open("wb") as jar:
                    shutil.copyfileobj(packed, jar)
    total = hashlib.sha256()
    for name in JARS.split():
        total.update(hashlib.sha256((work / "jars" / f"{name}.jar").read_bytes()).digest())
    if total.hexdigest() != JARS_SUM:
        raise RuntimeError(f"the jars of {archive.name} have the sum {total.hexdigest()}, not {JARS_SUM}")
    publish(work / "jars", SERVERS / "hadoop")


def publish(made: Path, place: Path) -> None:
    """Moves a finished folder to its place; another process may have been faster."""
    try:
        made.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Runs a command and keeps the last line of its complaints for the error."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["no word"]
        raise RuntimeError(f"{' '.join(command[:4])} ...: exit code {done.returncode}, {said[-1]}")


def main() -> None:
    """Fetches what is missing; a server that cannot be had is no failure."""
    SERVERS.mkdir(parents=True, exist_ok=True)
    for what, find, get in (("Redis", redis_binary, get_redis), ("HDFS", hadoop_jars, get_hadoop)):
        start = time.monotonic()
        if find() is None:
            with tempfile.TemporaryDirectory(dir=SERVERS) as work:
                try:
                    get(Path(work))
                except (OSError, RuntimeError, StopIteration, subprocess.TimeoutExpired, tarfile.TarError) as error:
                    print(f"{what}: not here, its tests will be skipped ({error})")
                    continue
        print(f"{what}: {find()}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
