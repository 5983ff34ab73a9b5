"""Cleaning of text."""

import re
import unicodedata
from dataclasses import dataclass
from typing import ClassVar

from r1jax.data.plugins import Case, Preprocessor
from r1jax.errors import UserError

# Control and format characters except tab, newline, and the two joiners that scripts and emoji are written with.
CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
SPACES = re.compile("[ \t\xa0\u1680\u2000-\u200a\u202f\u205f]+")
LINES = re.compile("\n{3,}")


@dataclass
class TextClean(Preprocessor):
    """One spelling for what looks alike, without control characters and with single spaces.

    "NFC" composes accents and leaves Chinese text as it is; full-width punctuation and the ideographic space stay.
    "NFKC" also replaces full-width letters, digits and punctuation, which loses the difference between them.

    Attributes:
      form: Unicode normalisation form.
      field: Name of the text.
    """

    form: str = "NFC"
    field: str = "text"
    modality: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        """Refuses a form that is none.

        Raises:
          UserError: Names what is possible.
        """
        if self.form not in ("NFC", "NFKC"):
            raise UserError(f"form is {self.form!r}, but it must be 'NFC' or 'NFKC'")

    def process(self, case: Case) -> Case:
        """Cleans the text of a case."""
        return {**case, self.field: clean(case[self.field], self.form)}


def clean(text: str, form: str = "NFC") -> str:
    """Normalises text.

    Args:
      text: Any.
      form: "NFC" or "NFKC".

    Returns:
      Text with newlines only as ends of lines, at most one blank line at a time, no space at the ends of lines and
      of the text. Cleaning it again changes nothing.
    """
    text = unicodedata.normalize(form, text)
    text = CONTROL.sub(
        "", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    )
    lines = (SPACES.sub(" ", line).strip(" ") for line in text.split("\n"))
    return unicodedata.normalize(form, LINES.sub("\n\n", "\n".join(lines)).strip("\n"))
