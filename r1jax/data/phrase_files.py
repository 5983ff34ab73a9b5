"""Sentences of financial news with their sentiment (Financial PhraseBank, Malo et al. 2014)."""

import numpy as np

from r1jax.data.filesystem import open_filesystem
from r1jax.data.record_files import is_file
from r1jax.data.records import UNKNOWN, Records
from r1jax.errors import UserError

CLASSES = ("negative", "neutral", "positive")


def read_phrases(path: str) -> Records:
    """Reads `sentence@label` lines, such as Sentences_50Agree.txt.

    Args:
      path: A .txt file in UTF-8 or Latin-1; a label is negative, neutral or positive, or empty where nobody knows. The
        last @ of a line divides it.

    Returns:
      One case a sentence, in the order of the file and named by its line; a sentence that comes again is left out, as
      it could be learned from and judged on.

    Raises:
      UserError: There is no such file, or a line is wrong.
    """
    if not is_file(path):
        raise UserError(f"{path} does not exist, or is no file: name a file of sentences by --data.path")
    system, root = open_filesystem(path)
    try:
        with system.open_input_stream(root) as stream:
            raw = stream.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): name a file of sentences by --data.path") from error
    try:
        written = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        written = raw.decode("latin-1")
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(written.split("\n"), 1):
        if not line.strip():
            continue
        sentence, at, label = line.rpartition("@")
        sentence, label = sentence.strip(), label.strip()
        if not at or not sentence or (label and label not in CLASSES):
            raise UserError(
                f"{path}: line {number} is {line.strip()[-60:]!r}, but it must end in @negative, @neutral or @positive "
                "after a sentence (docs/records.md)"
            )
        case = (str(number), CLASSES.index(label) if label else UNKNOWN)
        if found.setdefault(sentence, case)[1] == UNKNOWN:
            found[sentence] = case
    if not found:
        raise UserError(f"{path} has no sentence: name a file of `sentence@label` lines by --data.path")
    ids, labels = zip(*found.values(), strict=True)
    return Records(ids=list(ids), label=np.array(labels, np.int32), text=list(found))
