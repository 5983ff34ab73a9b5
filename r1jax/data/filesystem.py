"""Files behind a URL, here or far away: one listing, bounded reading, and writing that is seen whole or not at all."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, FSSpecHandler, LocalFileSystem, PyFileSystem

from r1jax.disk import flush
from r1jax.errors import FULL, UserError

TIMEOUT_S = 30.0
"""Longest wait for a server that does not answer, restarts included; then reading ends with an error."""
SLOWEST = 2**20
"""Bytes a second below which a server counts as one that does not answer."""
THREADS = 8
"""Requests to a server at a time."""
PAUSE_S = 0.5
FAILURES = (OSError, RuntimeError, ValueError)
"""What the clients raise: pyarrow OSError and ValueError, hdfs-native RuntimeError."""
DRAFT = ".draft-"
T = TypeVar("T")


def is_remote(url: str) -> bool:
    """Tells a URL of a server from a folder of this machine.

    Args:
      url: Path or URL.

    Returns:
      Whether it names a server.
    """
    return "://" in url and not url.startswith("file:")


def open_filesystem(url: str) -> tuple[FileSystem, str]:
    """Opens what a path or URL names; nothing is asked of a server yet.

    Args:
      url: A path, file:, hdfs://HOST:PORT/PATH (hdfs://NAMESERVICE/PATH and hdfs:///PATH by Hadoop's own files),
        s3://BUCKET/PATH[?endpoint_override=...&region=...&scheme=...] or gs://BUCKET/PATH. Keys come from the
        environment and files of the provider, never from the URL.

    Returns:
      The file system, and the path on it.

    Raises:
      UserError: The URL is of another kind or malformed, or its client is not installed.
    """
    if not is_remote(url):
        path = unquote(urlsplit(url).path) if url.startswith("file:") else os.path.expanduser(url)
        return LocalFileSystem(), os.path.abspath(path)
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UserError(f"the URL of {parts.scheme}://{parts.netloc.rpartition('@')[2]} has a user or a key in it: "
                        "give keys in the environment")  # fmt: skip
    options = dict(parse_qsl(parts.query))
    try:
        if parts.scheme == "hdfs":
            return PyFileSystem(FSSpecHandler(_hdfs(parts.hostname, parts.port))), unquote(parts.path) or "/"
        if parts.scheme == "s3":
            return _s3(parts.netloc, options), f"{parts.netloc}{unquote(parts.path)}".rstrip("/")
        if parts.scheme == "gs":
            from pyarrow.fs import GcsFileSystem

            return GcsFileSystem(retry_time_limit=timedelta(seconds=TIMEOUT_S)), f"{parts.netloc}{unquote(parts.path)}"
    except FAILURES as error:
        raise UserError(f"{url}: {_reason(error)}") from error
    raise UserError(f"{url}: there is no client for {parts.scheme}: use a path, file:, hdfs:, s3: or gs:")


def _hdfs(host: str | None, port: int | None):
    """HDFS without a JVM."""
    try:
        from hdfs_native.fsspec import HdfsFileSystem
    except ImportError as error:
        raise UserError("hdfs: needs hdfs-native: pip install 'r1jax[hdfs]'") from error
    return HdfsFileSystem(host=host, port=port)


def _s3(bucket: str, options: dict[str, str]) -> FileSystem:
    """S3 with bounded waiting; the address of another server than Amazon's is an option or in the environment."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    known = ("endpoint_override", "region", "scheme")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"s3://{bucket} has the option {unknown[0]!r}: choose among {', '.join(known)}")
    environment = os.environ
    endpoint = options.get("endpoint_override") or environment.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or environment.get("AWS_ENDPOINT_URL")
    region = options.get("region") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    return S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else resolve_s3_region(bucket)),
        scheme=options.get("scheme", "https"),
        connect_timeout=min(5.0, TIMEOUT_S),
        request_timeout=TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
    )


class Listed(NamedTuple):
    """A file below a root: its name relative to it, and bytes."""

    name: str
    size: int


class Files:
    """The files below one URL; picklable, safe to use from several threads, reconnects by itself.

    Every request to a server ends within `TIMEOUT_S` (more for many bytes, see `SLOWEST`) in an answer or a UserError
    that names the file; until then one that failed is tried again, so that a server that restarts is not noticed.

    Attributes:
      address: As it was given.
      url: The same without options, for people.
      remote: Whether a server is asked.
    """

    def __init__(self, url: str) -> None:
        """Opens nothing yet.

        Args:
          url: As `open_filesystem` takes it.
        """
        self.address, self.remote = url, is_remote(url)
        bare = url.partition("?")[0] if self.remote else url
        self.url = bare.rstrip("/") or bare
        self._lock = threading.Lock()
        self._opened: tuple[FileSystem, str] | None = None
        self._handles: dict[str, pa.NativeFile] = {}

    def __reduce__(self):
        return Files, (self.address,)

    @property
    def root(self) -> tuple[FileSystem, str]:
        """The file system and the root's path on it."""
        with self._lock:
            if self._opened is None:
                self._opened = open_filesystem(self.address)
            return self._opened

    def place(self, name: str) -> str:
        """Path of a file on its file system.

        Args:
          name: Relative to the root.

        Returns:
          The path.
        """
        return f"{self.root[1].rstrip('/')}/{name}"

    def listing(self) -> list[Listed]:
        """Lists all files, those in folders below included and hidden ones left out.

        Returns:
          By name.

        Raises:
          UserError: There is no such folder, or it cannot be read.
        """
        filesystem, root = self.root

        def ask() -> list[FileInfo]:
            if filesystem.get_file_info(root).type == FileType.NotFound:
                raise FileNotFoundError("there is no such folder")
            return filesystem.get_file_info(FileSelector(root, recursive=True))

        infos = self.bounded("", [ask])[0]
        start = len(root.rstrip("/")) + 1
        names = [(info.path[start:], info.size) for info in infos if info.type == FileType.File]
        return sorted(Listed(name, size) for name, size in names if not _is_hidden(name))

    def stamp(self, name: str) -> str:
        """What changes when a file is written again: its ETag where there is one, else the time of its writing.

        Args:
          name: Relative to the root.

        Returns:
          A text without meaning.

        Raises:
          UserError: The file cannot be read.
        """
        filesystem, place = self.root[0], self.place(name)

        def ask() -> str:
            if isinstance(filesystem, PyFileSystem):
                return str(filesystem.handler.fs.info(place)["modification_time"])
            if self.remote:
                with filesystem.open_input_file(place) as file:
                    return (file.metadata() or {}).get(b"ETag", b"").decode() or str(file.size())
            return str(filesystem.get_file_info(place).mtime_ns)

        return self.bounded(name, [ask])[0]

    def read(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Reads parts of a file.

        Args:
          name: Relative to the root.
          ranges: First byte and number of bytes of each.

        Returns:
          The bytes of each; fewer where the file ends earlier.

        Raises:
          UserError: The file cannot be read.
        """
        return self.read_many([(name, ranges)])[0]

    def read_many(self, wanted: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> list[list[bytes]]:
        """Reads parts of several files, from a server with several requests at a time.

        Args:
          wanted: Names and ranges, as `read` takes them.

        Returns:
          What `read` gives, of each.

        Raises:
          UserError: A file cannot be read; names it.
        """
        size = sum(length for _, ranges in wanted for _, length in ranges)
        calls = [lambda name=name, ranges=ranges: self._read(name, ranges) for name, ranges in wanted]
        return self.bounded([name for name, _ in wanted], calls, size)

    def read_all(self, name: str) -> bytes:
        """Reads a whole file.

        Args:
          name: Relative to the root.

        Returns:
          Its bytes.

        Raises:
          UserError: It cannot be read.
        """
        size = self.bounded(name, [lambda: self._handle(name).size()])[0]
        return self.read(name, [(0, size)])[0]

    def find(self, name: str) -> bytes | None:
        """Reads a whole file that may be absent.

        Args:
          name: Relative to the root.

        Returns:
          Its bytes, None where there is none.

        Raises:
          UserError: It cannot be read.
        """
        ask = self.root[0].get_file_info
        kind = self.bounded(name, [lambda: ask(self.place(name)).type])[0]
        return self.read_all(name) if kind == FileType.File else None

    def _handle(self, name: str) -> pa.NativeFile:
        with self._lock:
            found = self._handles.get(name)
        if found is not None:
            return found
        filesystem, place = self.root[0], self.place(name)
        if isinstance(filesystem, PyFileSystem):  # pyarrow's own way takes every failure for a missing file
            made = pa.PythonFile(filesystem.handler.fs.open(place, "rb"), mode="r")
        else:
            made = filesystem.open_input_file(place)
        with self._lock:
            while len(self._handles) >= 64:
                self._handles.pop(next(iter(self._handles)))
            return self._handles.setdefault(name, made)

    def _read(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        try:
            return [self._handle(name).read_at(length, start) for start, length in ranges]
        except FAILURES:
            self.forget(name)
            raise

    def forget(self, name: str) -> None:
        """Drops what is open of a file: it was written again, or its server restarted.

        Args:
          name: Relative to the root.
        """
        with self._lock:
            self._handles.pop(name, None)

    def bounded(self, names: str | Sequence[str], calls: Sequence[Callable[[], T]], size: int = 0) -> list[T]:
        """Runs requests: on a local disk one after the other, to a server in threads and with an end to waiting.

        Args:
          names: Of the file that each call is about, for the error.
          calls: May be called again after a failure.
          size: Bytes that they move.

        Returns:
          Results in order.

        Raises:
          UserError: A call failed, or there was no answer in time.
        """
        names = [names] * len(calls) if isinstance(names, str) else names
        if not self.remote:
            try:
                return [call() for call in calls]
            except OSError as error:
                if error.errno in FULL:
                    raise
                raise UserError(f"{self._label(names, None)}: {_reason(error)}") from error
        return _Requests(self, names, calls, time.monotonic() + TIMEOUT_S + size / SLOWEST).run()

    def _label(self, names: Sequence[str], index: int | None) -> str:
        name = names[index or 0] if index is not None or len(set(names)) == 1 else ""
        return f"{self.url}/{name}" if name else self.url

    def publish(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file that is there whole or not at all, also after a power loss; replaces one of that name.

        Args:
          name: Relative to the root.
          content: All of it.

        Raises:
          UserError: It cannot be written.
          OSError: The local disk is full.
        """
        self.forget(name)
        if not self.remote:
            _publish_local(Path(self.place(name)), content)
            return
        filesystem, place = self.root[0], self.place(name)
        folder, _, bare = place.rpartition("/")
        hdfs = isinstance(filesystem, PyFileSystem)
        draft = f"{folder}/{DRAFT}{bare}" if hdfs else place  # an object of a store appears when it is complete

        def write() -> None:
            if hdfs:
                filesystem.create_dir(folder, recursive=True)
            stream = filesystem.open_output_stream(draft)
            try:
                stream.write(content)
            except BaseException:
                if hdfs:  # elsewhere closing would publish the half: the upload is left to the store to forget
                    with contextlib.suppress(*FAILURES):
                        stream.close()
                raise
            stream.close()
            if hdfs:
                filesystem.handler.fs.mv(draft, place, overwrite=True)

        self.bounded(name, [write], len(content))

    def remove(self, name: str) -> None:
        """Deletes a file if it is there.

        Args:
          name: Relative to the root.

        Raises:
          UserError: It cannot be deleted.
        """
        self.forget(name)
        filesystem, place = self.root[0], self.place(name)

        def delete() -> None:
            if filesystem.get_file_info(place).type == FileType.File:
                filesystem.delete_file(place)

        self.bounded(name, [delete])


class _Requests:
    """Requests under way to one server; daemon threads, because one that never answers must not hold the program."""

    def __init__(self, files: Files, names: Sequence[str], calls: Sequence[Callable[[], T]], end: float) -> None:
        self.files, self.names, self.calls, self.end = files, names, calls, end
        self.results: dict[int, T] = {}
        self.failure: tuple[int, BaseException] | None = None
        self.waiting = list(range(len(calls)))[::-1]
        self.running: set[int] = set()
        self.changed = threading.Condition()

    def run(self) -> list[T]:
        """Waits for all of them."""
        for _ in range(min(THREADS, len(self.calls))):
            threading.Thread(target=self._work, daemon=True).start()
        with self.changed:
            while len(self.results) < len(self.calls) and self.failure is None:
                left = self.end - time.monotonic()
                if left <= 0 or not self.changed.wait(left):
                    index = min(self.running, default=0)
                    self.failure = (index, TimeoutError(f"no answer within {TIMEOUT_S:g} s"))
        if self.failure is None:
            return [self.results[index] for index in range(len(self.calls))]
        index, error = self.failure
        for name in set(self.names):
            self.files.forget(name)
        if not isinstance(error, FAILURES):
            raise error
        message = (
            f"{self.files._label(self.names, index)}: {_reason(error)}: check the server, and run the command again"
        )
        raise UserError(message) from error

    def _work(self) -> None:
        while True:
            with self.changed:
                if not self.waiting or self.failure is not None:
                    return
                index = self.waiting.pop()
                self.running.add(index)
            result, error = self._try(index)
            with self.changed:
                self.running.discard(index)
                if error is None:
                    self.results[index] = result
                elif self.failure is None:
                    self.failure = (index, error)
                self.changed.notify_all()

    def _try(self, index: int) -> tuple[T | None, BaseException | None]:
        """Calls until it succeeds, the error is none that time mends, or time is up."""
        spoke = False
        while True:
            try:
                return self.calls[index](), None
            except FAILURES as error:
                lasting = isinstance(error, FileNotFoundError | PermissionError | ValueError | UserError)
                if lasting or time.monotonic() + PAUSE_S >= self.end or self.failure is not None:
                    return None, error
                if not spoke:
                    label, left = self.files._label(self.names, index), self.end - time.monotonic()
                    print(f"{label}: {_reason(error)}; trying again for {left:.0f} s", file=sys.stderr, flush=True)
                spoke = True
                time.sleep(PAUSE_S)
            except BaseException as error:
                return None, error


def _publish_local(place: Path, content: bytes | memoryview) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f"{DRAFT}{place.name}")
    try:
        draft.write_bytes(content)
        flush(draft)
        os.replace(draft, place)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if error.errno in FULL:
            raise
        raise UserError(f"{place} cannot be written ({error.strerror or error}): check the folder") from error
    flush(place.parent)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _reason(error: BaseException) -> str:
    """First line of a message, and not all of it: some clients print whole structures."""
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."
