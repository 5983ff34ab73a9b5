"""One picture file: what its header says, and its pixels, by Pillow and never in silence."""

import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps

from r1jax.errors import UserError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
"""Decoders that may run; Pillow has many more, for formats that nobody expects in a data set."""
MAX_PIXELS = 2**26
"""Larger pictures are refused before they are decoded: a file of a few bytes can claim any size."""
MODES = {
    "1": (1, "uint8"),
    "L": (1, "uint8"),
    "LA": (4, "uint8"),
    "P": (3, "uint8"),
    "RGB": (3, "uint8"),
    "RGBA": (4, "uint8"),
    "CMYK": (3, "uint8"),
    "YCbCr": (3, "uint8"),
    "I;16": (1, "uint16"),
    "I;16B": (1, "uint16"),
}
"""Pillow's modes that are read: channels and type of one; inks and video colours become RGB, as everywhere."""
TURNED = frozenset((5, 6, 7, 8))
"""Values of the EXIF orientation that exchange height and width."""
ORIENTATION = 0x0112
PHOTOS = ("JPEG", "MPO")
"""Formats that cameras turn by a mark; Pillow itself turns TIFF, and viewers do not turn PNG."""


@dataclass(frozen=True)
class Header:
    """What a picture holds.

    Attributes:
      height: Pixels, upright.
      width: Pixels, upright.
      channels: 1 grey, 3 colours, 4 colours and opacity.
      dtype: uint8, or uint16 where grey has 16 bits.
    """

    height: int
    width: int
    channels: int
    dtype: str


def read_header(data: bytes, where: str) -> Header:
    """Reads what the header of a picture says.

    Args:
      data: The file.
      where: Its name, for the error message.

    Returns:
      Size and channels.

    Raises:
      UserError: It is no picture, too large, of several frames, or of a kind that cannot be read without loss.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _check(image, where)
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything: struct, syntax, key and memory errors
        raise _broken(error, where) from error


def read_pixels(data: bytes, channels: int, where: str) -> Shaped[np.ndarray, "H W *C"]:
    """Decodes a picture, upright.

    Args:
      data: The file.
      channels: 1, 3 or 4; grey is repeated in the colours, and pictures without opacity are opaque.
      where: Its name, for the error message.

    Returns:
      [H, W] for one channel, else [H, W, channels].

    Raises:
      UserError: As `read_header`; or it is damaged or cut short.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, where)
            image.verify()  # the checksums of a PNG, which decoding does not compare
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image) if image.format in PHOTOS else image
            if channels == 1:
                return np.array(upright.convert("L") if upright.mode == "1" else upright).astype(MODES[image.mode][1])
            return np.array(upright.convert("RGB" if channels == 3 else "RGBA"))
    except UserError:
        raise
    except Exception as error:  # see read_header
        raise _broken(error, where) from error


def check_decodes(data: bytes, where: str) -> None:
    """Makes sure that the bytes of a picture are whole; JPEGs are decoded at an eighth of their size.

    Args:
      data: The file.
      where: Its name, for the error message.

    Raises:
      UserError: As `read_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, where)
            image.verify()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft(None, (image.width // 8, image.height // 8))
            image.load()
    except UserError:
        raise
    except Exception as error:  # see read_header
        raise _broken(error, where) from error


def _check(image: Image.Image, where: str) -> Header:
    """Refuses what cannot be read as one picture without loss."""
    if image.width * image.height > MAX_PIXELS:
        raise _large(where)
    # The further pictures of a JPEG (MPO) are previews and depth maps; all readers show the first.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames != 1:
        raise UserError(f"{where} holds {frames} pictures: save each as a file of its own")
    if image.mode not in MODES:
        raise UserError(f"{where} has pixels of mode {image.mode}: save it in grey (8 or 16 bits), RGB or RGBA")
    channels, dtype = MODES[image.mode]
    if dtype == "uint8" and "transparency" in image.info:
        channels = 4
    turned = image.format in PHOTOS and image.getexif().get(ORIENTATION) in TURNED
    height, width = (image.width, image.height) if turned else (image.height, image.width)
    if not height or not width:
        raise UserError(f"{where} has no pixels: remove it or save it again")
    return Header(height, width, channels, dtype)


def _large(where: str) -> UserError:
    return UserError(f"{where} has more than {MAX_PIXELS} pixels: cut or scale it first")


def _broken(error: Exception, where: str) -> UserError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _large(where)
    formats = ", ".join(FORMATS)
    return UserError(f"{where} is damaged, cut short or none of {formats} ({error}): write or copy it again")
