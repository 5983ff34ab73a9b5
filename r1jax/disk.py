"""What makes files last: their bytes on the disk, and a sum that shows whether they changed."""

import hashlib
import os
from pathlib import Path


def flush(path: Path) -> None:
    """Has a file or the names in a folder written to the disk: after a power loss, what is published must be there.

    Args:
      path: A file or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Sums up a file.

    Args:
      path: The file.

    Returns:
      SHA-256 in hex.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
