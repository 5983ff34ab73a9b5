import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from r1jax.data.pipeline import Preprocessed, open_pipeline
from r1jax.data.preprocess.picture import decode
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

GREY = np.random.default_rng(0).integers(0, 256, (12, 9)).astype(np.uint8)


def stored(array, kind="PNG"):
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, kind)
    return file.getvalue()


class Files:
    name, fingerprint = "files", "0"
    schema = Schema((Field("case_id", "category"), Field("image", "bytes")))

    def __init__(self, *files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def read_batch(self, indices):
        return {"case_id": [str(i) for i in indices], "image": [self.files[i] for i in indices]}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_lossless_formats_are_read_exactly(kind):
    assert np.array_equal(decode(stored(GREY, kind)), GREY)
    colour = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
    assert np.array_equal(decode(stored(colour, kind), 3), colour)


def test_sixteen_bits_are_divided():
    deep = (GREY.astype(np.uint16) << 8) + 255
    assert np.array_equal(decode(stored(deep)), GREY)


def test_pictures_become_one_size_and_missing_ones_black():
    pipeline = open_pipeline(["decode_image(6, 4)", "window(0, 255)"][0])
    source = Preprocessed(Files(stored(np.full((40, 20), 77, np.uint8)), None, stored(GREY[:6, :4])), pipeline, 0)
    image = source.read_batch(np.arange(3))["image"]
    assert image.shape == (3, 6, 4) and image.dtype == np.uint8 and source.schema.modalities == {"image"}
    assert (image[0] == 77).all() and (image[1] == 0).all() and np.array_equal(image[2], GREY[:6, :4])


def bomb():
    """A PNG of a few bytes that claims to be 60000 x 60000."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (bomb(), "60000 x 60000 pixels|exceeds limit"),
        (stored(GREY)[:80], "cannot be read"),
        (b"", "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as PNG"),
    ],
)
def test_bad_files_are_refused(file, words):
    with pytest.raises(UserError, match=f"decode_image.*case '0' failed: .*({words})"):
        Preprocessed(Files(file), open_pipeline("decode_image(6, 4)"), 0).read_batch(np.array([0]))
