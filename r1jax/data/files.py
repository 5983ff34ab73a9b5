"""The files below one path or URL: listed, read in parts, and written so that each is seen whole or not at all."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, PyFileSystem

from r1jax.data.bounded import FAILURES, bounded, reason
from r1jax.data.filesystem import is_remote, open_filesystem
from r1jax.disk import flush
from r1jax.errors import FULL, UserError

DRAFT = ".draft-"
T = TypeVar("T")


class Listed(NamedTuple):
    """A file below a root: its name relative to it, and bytes."""

    name: str
    size: int


class Files:
    """The files below one URL; picklable, safe to use from several threads, reconnects by itself.

    Every request to a server ends in an answer or in a UserError that names the file (see `bounded`).

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

        infos = self.ask("", [ask])[0]
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
                    return file.metadata().get("ETag", b"").decode() or str(file.size())
            return str(filesystem.get_file_info(place).mtime_ns)

        return self.ask(name, [ask])[0]

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
        return self.ask([name for name, _ in wanted], calls, size)

    def read_all(self, name: str) -> bytes:
        """Reads a whole file.

        Args:
          name: Relative to the root.

        Returns:
          Its bytes.

        Raises:
          UserError: It cannot be read.
        """
        size = self.ask(name, [lambda: self._handle(name).size()])[0]
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
        kind = self.ask(name, [lambda: ask(self.place(name)).type])[0]
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

    def ask(self, names: str | Sequence[str], calls: Sequence[Callable[[], T]], size: int = 0) -> list[T]:
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
        labels = [f"{self.url}/{name}" if name else self.url for name in names]
        if self.remote:
            try:
                return bounded(labels, calls, size)
            except UserError:
                for name in names:  # a request that hangs holds its file: the next one opens it anew
                    self.forget(name)
                raise
        results: list[T] = []
        for label, call in zip(labels, calls, strict=True):
            try:
                results.append(call())
            except OSError as error:
                if error.errno in FULL:
                    raise
                raise UserError(f"{label}: {reason(error)}") from error
        return results

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

        self.ask(name, [write], len(content))

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

        self.ask(name, [delete])


def _publish_local(place: Path, content: bytes | memoryview) -> None:
    draft = place.with_name(f"{DRAFT}{place.name}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
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
