"""MetaImage volumes are those that SimpleITK reads, in one orientation, and headers that lie are refused."""

import pickle
import zlib

import numpy as np
import pytest

from r1jax.data.formats.mhd import open_mhd
from r1jax.data.schema import Field
from r1jax.errors import UserError

sitk = pytest.importorskip("SimpleITK")
RNG = np.random.default_rng(0)
STRAIGHT = (1, 0, 0, 0, 1, 0, 0, 0, 1)
TURNED = (0.0, 0.6, 0.8, 0.0, -0.8, 0.6, 1.0, 0.0, 0.0)  # x points to z, with a tilt


def picture(dtype="int16", direction=STRAIGHT, size=(4, 5, 6)):
    info = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None
    values = (
        RNG.normal(size=size) if info is None else RNG.integers(info.min, info.max, size, endpoint=True, dtype=dtype)
    )
    image = sitk.GetImageFromArray(values.astype(dtype))
    image.SetSpacing((0.7, 0.75, 1.25))
    image.SetOrigin((-12.5, 3.0, 100.0))
    image.SetDirection(np.asarray(direction, float).ravel().tolist())
    return image


def check(batch, row, image):
    """Holds a case against what SimpleITK gives after it has turned the volume to LPS."""
    want = sitk.DICOMOrient(image, "LPS")
    np.testing.assert_array_equal(batch["volume"][row], sitk.GetArrayFromImage(want))
    np.testing.assert_allclose(batch["volume_spacing"][row], want.GetSpacing()[::-1], rtol=1e-6)
    for index in ((0, 0, 0), (1, 2, 3), (3, 0, 2)):
        place = want.TransformIndexToPhysicalPoint(index[::-1])
        np.testing.assert_allclose((batch["volume_affine"][row] @ (*index, 1.0))[:3], place, atol=1e-4)


def everything(source):
    return source.read_batch(np.arange(len(source)))


@pytest.mark.parametrize("name", ["x.mhd", "x.mha"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
def test_voxels_and_places_are_those_of_simpleitk(tmp_path, name, packed, dtype):
    image = picture(dtype)
    sitk.WriteImage(image, str(tmp_path / name), useCompression=packed)
    source = pickle.loads(pickle.dumps(open_mhd(tmp_path)))
    assert source.schema.fields[-1] == Field("volume", "volume", dtype, (4, 5, 6))
    batch = everything(source)
    assert batch["case_id"] == [name]
    check(batch, 0, image)


@pytest.mark.parametrize("direction", [TURNED, (-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0)])
def test_every_orientation_is_turned_to_one(tmp_path, direction):
    image = picture(direction=direction)
    sitk.WriteImage(image, str(tmp_path / "x.mhd"))
    check(everything(open_mhd(tmp_path)), 0, image)


def test_volumes_of_several_sizes_and_types_share_a_type(tmp_path):
    first, second = picture("int16"), picture("uint16", size=(7, 5, 6))
    sitk.WriteImage(first, str(tmp_path / "a.mhd"))
    sitk.WriteImage(second, str(tmp_path / "b.mha"))
    source = open_mhd(tmp_path)
    assert source.schema.fields[-1] == Field("volume", "volume", "int32", (None, 5, 6))
    batch = everything(source)
    check(batch, 0, first)
    check(batch, 1, second)


HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = True
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1 1
DimSize = 3 2 1
ElementType = MET_SHORT
ElementDataFile = x.raw
"""


def write(tmp_path, old="", new="", data=bytes(range(12)), name="x.raw"):
    (tmp_path / "x.mhd").write_text(HEADER.replace(old, new) if old else HEADER)
    (tmp_path / name).write_bytes(data)
    return everything(open_mhd(tmp_path))["volume"]


def test_bytes_in_the_other_order_and_behind_a_foreign_header(tmp_path):
    want = np.arange(0, 12, 2).reshape(1, 1, 2, 3) * 257 + 1
    np.testing.assert_array_equal(write(tmp_path), want)
    np.testing.assert_array_equal(write(tmp_path, "NDims", "HeaderSize = 5\nNDims", b"12345" + bytes(range(12))), want)
    np.testing.assert_array_equal(write(tmp_path, "NDims", "HeaderSize = -1\nNDims", b"12345" + bytes(range(12))), want)
    packed = zlib.compress(bytes(range(12)))
    np.testing.assert_array_equal(write(tmp_path, "edData = False", "edData = True", packed), want)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("DimSize = 3 2 1", "DimSize = 3 2 2", "x.raw has 12 bytes but x.mhd says 24"),
        ("DimSize = 3 2 1", "DimSize = 3 2", "give 3 numbers"),
        ("DimSize = 3 2 1", "DimSize = 3 2 0", "none of them empty"),
        ("DimSize = 3 2 1", "DimSize = 3 2 1.5", "whole numbers"),
        ("DimSize = 3 2 1", "DimSize = 99999 99999 99999", "more than"),
        ("DimSize = 3 2 1\n", "", "DimSize is missing"),
        ("ElementSpacing", "ElementSpacjng", "did you mean 'ElementSpacing'"),
        ("Offset = 0 0 0\nElement", "OffsetElement", "the key 'OffsetElementSpacing'"),
        ("Offset", "Ofset", "did you mean 'Offset'"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 nan 1", "give 3 numbers"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 -1 1", "above 0"),
        ("NDims = 3", "NDims = 2", "volumes have 3"),
        ("NDims = 3", "NDims = 3\nNDims = 3", "'NDims' twice"),
        ("NDims = 3", "NDims = 3\nElementNumberOfChannels = 3", "several channels"),
        ("NDims = 3", "NDims = 3\nDistanceUnits = cm", "in mm"),
        ("BinaryData = True", "BinaryData = False", "text"),
        ("MSB = True", "MSB = Yes", "True or False"),
        ("MET_SHORT", "MET_LONG", "MET_LONG"),
        ("1 0 0 0 1 0 0 0 1", "1 0 0 0.5 1 0 0 0 1", "lengths"),
        ("1 0 0 0 1 0 0 0 1", "1 0 0 0.6 0.8 0 0 0 1", "right angles"),
        ("x.raw", "../x.raw", "leads out"),
        ("x.raw", "/etc/passwd", "leads out"),
        ("x.raw", "gone.raw", "gone.raw cannot be read"),
        ("x.raw", "LIST", "several files"),
        ("x.raw", "%03d.raw 1 2 1", "several files"),
        ("CompressedData = False", "CompressedData = True", "damaged"),
        ("ObjectType = Image", "ObjectType = Tube", "'Tube'"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, old, new, said):
    with pytest.raises(UserError, match=said):
        write(tmp_path, old, new)


def test_packed_voxels_are_counted_and_summed(tmp_path):
    bad = [
        zlib.compress(bytes(11)),
        zlib.compress(bytes(2**24)),
        zlib.compress(bytes(12))[:-2],
        zlib.compress(bytes(12)),
    ]
    bad[3] = bad[3][:-1] + bytes([bad[3][-1] ^ 1])
    for data in (*bad, zlib.compress(bytes(12)) + b"x", b""):
        with pytest.raises(UserError, match=r"x\.(raw|mhd)"):
            write(tmp_path, "edData = False", "edData = True", data)
