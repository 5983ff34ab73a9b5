"""What is known of all payments so far, kept on disk: a sealed file that is replaced as a whole, and a journal.

The journal has every row since the file was written, before anyone is answered; so a process that is killed loses no
row. Both hold what `LiveHistory` holds, names of customers and terminals included, and nothing else.
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from r1jax.data.transaction_live import COLUMNS, LiveHistory, Payment, Ring
from r1jax.data.transaction_rows import Row, take
from r1jax.data.transactions import HORIZON
from r1jax.disk import flush
from r1jax.errors import UserError

KIND = "r1jax transactions 1"
"""Begins the first line of a file; the sum of all that follows ends it."""
Arrays = dict[str, np.ndarray]


class KeptHistory:
    """A `LiveHistory` that outlives the process; one process at a time may hold it."""

    def __init__(self, path: Path, delay: int, events: int) -> None:
        """Locks the files and reads what is there.

        Args:
          path: The file; its journal lies beside it.
          delay: As of `LiveHistory`.
          events: As of `LiveHistory`.

        Raises:
          UserError: Another process has them, they are damaged or of another kind of history, or cannot be written.
        """
        self.path, self.live, self.extra = path, LiveHistory(delay, events), Arrays()
        self.found = path.exists()
        """Whether there was such a file."""
        self.rows = 0
        """Rows taken since the beginning."""
        try:
            self._journal: IO[bytes] = path.with_name(f"{path.name}.journal").open("ab+")
        except OSError as error:
            raise UserError(f"--state {path} cannot be written ({error.strerror}): name another file") from None
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.found:
                self._read(path.read_bytes())
            self._replay()
        except BlockingIOError:
            self.close()
            raise UserError(f"--state {path} is in use by another process: wait for it, or name another file") from None
        except BaseException:
            self.close()
            raise

    def _read(self, data: bytes) -> None:
        first, _, payload = data.partition(b"\n")
        if first.decode("ascii", "replace") != f"{KIND} {hashlib.sha256(payload).hexdigest()}":
            raise UserError(
                f"--state {self.path} is damaged or not written by this version: remove it and its journal, and begin "
                "again from --history"
            )
        with np.load(io.BytesIO(payload), allow_pickle=False) as file:
            arrays = dict(file)
        head, wanted = json.loads(arrays.pop("head").tobytes()), _head(self.live)
        for name, value in wanted.items():
            if head[name] != value:
                raise UserError(
                    f"--state {self.path} was made with {name} {head[name]}, but the checkpoint has {value}: name "
                    "another file, and begin again from --history"
                )
        self.rows, self.live = head["rows"], _unpack(arrays, self.live, head["last"])
        self.extra = {name.removeprefix("extra."): x for name, x in arrays.items() if name.startswith("extra.")}

    def _replay(self) -> None:
        """Takes the rows that came after the file was written; one that was cut off was not answered either."""
        self._journal.seek(0)
        data = self._journal.read()
        whole = data.rfind(b"\n") + 1
        self._journal.truncate(whole)
        for line in data[:whole].splitlines():
            number, *row = json.loads(line)
            if number > self.rows + 1:
                raise UserError(
                    f"--state {self.path} is not what its journal goes on from, which begins at row {number}: bring it "
                    "back, or remove the journal too and begin again from --history"
                )
            if number > self.rows:
                take(self.live, _row(*row))
                self.rows = number

    def note(self, rows: Sequence[Row]) -> None:
        """Puts rows on record that the history has taken; they survive the process, and a power loss after `save`.

        Args:
          rows: In their order.

        Raises:
          UserError: The disk does not take them.
        """
        lines = []
        for row in rows:
            self.rows += 1
            told = [self.rows, row.id, row.fraud, *(row.payment[1:] if row.payment else ())]
            lines.append(json.dumps(told, ensure_ascii=False) + "\n")
        try:
            self._journal.write("".join(lines).encode())
            self._journal.flush()
        except OSError as error:
            raise UserError(
                f"--state {self.path}: its journal cannot be written ({error.strerror}): all rows that were answered "
                "are on record; make room, and go on with the row that was not answered"
            ) from None

    def save(self) -> None:
        """Replaces the file by one of what is known now, and empties the journal.

        Raises:
          UserError: The disk does not take it; what was there stays.
        """
        buffer, head = io.BytesIO(), _head(self.live) | {"rows": self.rows, "last": self.live.last}
        extra = {f"extra.{name}": x for name, x in self.extra.items()}
        np.savez(buffer, head=_bytes(json.dumps(head)), **_pack(self.live), **extra)
        payload, draft = buffer.getvalue(), self.path.with_name(f".{self.path.name}.draft")
        try:
            draft.write_bytes(f"{KIND} {hashlib.sha256(payload).hexdigest()}\n".encode() + payload)
            flush(draft)
            os.replace(draft, self.path)
            flush(self.path.absolute().parent)
            self._journal.truncate(0)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise UserError(
                f"--state {self.path} cannot be written ({error.strerror}): the rows since the last save are in its "
                "journal; make room, and run the same command again"
            ) from None
        self.found = True

    def close(self) -> None:
        """Lets another process have the files."""
        with contextlib.suppress(OSError):  # what a full disk has not taken was told by `note`
            self._journal.close()


def _head(live: LiveHistory) -> dict[str, Any]:
    """What a file must agree with."""
    return {"label delay": live.delay, "events": live.events, "horizon": HORIZON}


def _row(name: str, fraud: bool | None, *payment: Any) -> Row:
    return Row(name, Payment(name, *payment) if payment else None, "", fraud)


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _pack(live: LiveHistory) -> Arrays:
    """All rings as a few arrays, one ring after another."""
    found = {}
    for kind, rings in (("customer", live.customers), ("terminal", live.terminals)):
        words = {"names": list(rings), "ids": [name for ring in rings.values() for name in ring.ids]}
        for what, texts in words.items():
            found[f"{kind}.{what}"] = _bytes("".join(texts))
            found[f"{kind}.{what}.ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
        found[f"{kind}.counts"] = np.array([ring.count for ring in rings.values()], np.int64)
        for name in COLUMNS:
            parts = [getattr(ring, name)[: ring.count] for ring in rings.values()]
            found[f"{kind}.{name}"] = np.concatenate([getattr(Ring(), name)[:0], *parts])
    return found


def _unpack(arrays: Arrays, like: LiveHistory, last: int | float) -> LiveHistory:
    """The history that `_pack` took apart."""
    live = LiveHistory(like.delay, like.events)
    live.last = last
    for kind, rings in (("customer", live.customers), ("terminal", live.terminals)):
        words = {}
        for what in ("names", "ids"):
            text, ends = arrays[f"{kind}.{what}"].tobytes().decode(), arrays[f"{kind}.{what}.ends"].tolist()
            words[what] = [text[begin:end] for begin, end in itertools.pairwise([0, *ends])]
        begin = 0
        for name, count in zip(words["names"], arrays[f"{kind}.counts"].tolist(), strict=True):
            ring, held = Ring(), slice(begin, begin + count)
            for column in COLUMNS:
                setattr(ring, column, arrays[f"{kind}.{column}"][held].copy())
            ring.ids, ring.count, begin = words["ids"][held], count, begin + count
            rings[name] = ring
    live.index()
    return live
