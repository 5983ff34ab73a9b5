"""Decoding and resizing of pictures."""

import io
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from r1jax.data.plugins import Case, Preprocessor
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
"""Formats without code, scripts or references to other files."""
LARGEST = 1 << 27
"""Pixels of a picture: a small file can claim many more than memory holds."""


@dataclass
class DecodeImage(Preprocessor):
    """Turns the bytes of an image file into grey or colour values of one size.

    Attributes:
      height: Of the result.
      width: Of the result.
      channels: 1 for grey ([H, W]) or 3 for red, green and blue ([H, W, 3]).
      field: Name of the bytes; the picture takes their place.
    """

    height: int
    width: int
    channels: int = 1
    field: str = "image"
    modality: ClassVar[str] = "bytes"

    def __post_init__(self) -> None:
        """Refuses sizes that are none.

        Raises:
          UserError: Names them.
        """
        if self.height < 1 or self.width < 1 or self.channels not in (1, 3):
            raise UserError("height and width must be at least 1, and channels 1 or 3")

    def output(self, schema: Schema) -> Schema:
        """The bytes become a picture.

        Raises:
          UserError: There is no such field of bytes.
        """
        if schema.select([self.field]).fields[0].kind != "bytes":
            raise UserError(f"{self.field!r} is no field of bytes")
        shape = (self.height, self.width) + (() if self.channels == 1 else (3,))
        image = Field(self.field, "image", "uint8", shape)
        return Schema(tuple(image if f.name == self.field else f for f in schema.fields))

    def process(self, case: Case) -> Case:
        """Decodes the picture of a case; one that is missing becomes black."""
        stored, shape = case[self.field], (self.height, self.width) + (() if self.channels == 1 else (3,))
        if stored is None:
            return {**case, self.field: np.zeros(shape, np.uint8)}
        picture = PIL.Image.fromarray(decode(stored, self.channels))
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), PIL.Image.Resampling.BILINEAR)
        return {**case, self.field: np.asarray(picture)}


def decode(stored: bytes, channels: int = 1) -> UInt8[np.ndarray, "H W *C"]:
    """Decodes an image file.

    Args:
      stored: The file.
      channels: 1 for grey, 3 for red, green and blue.

    Returns:
      uint8, [H, W] or [H, W, 3]; 16-bit grey is divided by 256.

    Raises:
      UserError: The file is damaged, of another format, or claims to be too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit follows
            with PIL.Image.open(io.BytesIO(stored), formats=FORMATS) as picture:
                if picture.width * picture.height > LARGEST:
                    raise UserError(f"the image claims {picture.width} x {picture.height} pixels: more than {LARGEST}")
                if picture.mode.startswith("I"):
                    picture = PIL.Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
                return np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"the image cannot be read as {', '.join(FORMATS)} ({error})") from error
