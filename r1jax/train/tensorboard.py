"""The event file that TensorBoard draws from."""

import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c


class EventFile:
    """Appends events, each by one write and without waiting for the disk, so that a kill cuts none but the last.

    tensorboardX's `SummaryWriter` has a thread for that, which ends where the clock is set back by weeks and fills a
    queue that then blocks the training; its `EventsWriter` has every row synced, which takes a slow disk longer than a
    step may take.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Begins a file.

        Args:
          folder: Is made if absent.
          start: Steps done; a part of the file's name.
        """
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{start}"
        self.file = (folder / name).open("ab", buffering=0)
        self.write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, event: Event) -> None:
        """Appends an event as a record of TensorFlow's format: length, its sum, the event, its sum (masked CRC-32C)."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        self.file.write(b"".join((length, next(sums), content, next(sums))))

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
