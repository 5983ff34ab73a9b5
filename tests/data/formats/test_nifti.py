"""NIfTI volumes are those that nibabel and SimpleITK read, turned to one orientation; others are refused."""

import gzip
import pickle

import numpy as np
import pytest

from r1jax.data.formats.nifti import open_nifti
from r1jax.data.schema import Field
from r1jax.errors import UserError

nibabel = pytest.importorskip("nibabel")
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-1000, 1000, (6, 5, 4)).astype(np.int16)
# Voxel axes run to the patient's back, head and left, with a small turn.
C, S = np.cos(0.2), np.sin(0.2)
AFFINE = np.array([[0, 0, -1.25, 10.0], [-0.7 * C, 0.75 * S, 0, 20], [0.7 * S, 0.75 * C, 0, -30], [0, 0, 0, 1]])


def save(path, voxels=VOXELS, affine=AFFINE, kind=nibabel.Nifti1Image, **header):
    image = kind(voxels, affine)
    image.header.set_xyzt_units(header.pop("units", "mm"))
    if "slope" in header:
        image.header.set_slope_inter(header.pop("slope"), header.pop("inter"))
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def everything(source):
    return source.read_batch(np.arange(len(source)))


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_voxels_are_those_of_nibabel(tmp_path, name, kind, order):
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    image = kind(VOXELS, AFFINE, header)
    nibabel.save(image, tmp_path / name)
    source = pickle.loads(pickle.dumps(open_nifti(tmp_path)))
    assert source.schema.fields[-1] == Field("volume", "volume", "int16", (5, 6, 4))
    batch = everything(source)
    turned = nibabel.as_closest_canonical(nibabel.load(tmp_path / name))  # [x, y, z] to right, front, head
    np.testing.assert_array_equal(batch["volume"][0], np.asanyarray(turned.dataobj)[::-1, ::-1].transpose())
    np.testing.assert_allclose(batch["volume_spacing"][0], turned.header.get_zooms()[::-1], rtol=1e-6)
    np.testing.assert_allclose(batch["volume_spacing"][0], (0.75, 0.7, 1.25), rtol=1e-6)


def test_places_are_those_of_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    want = sitk.DICOMOrient(sitk.ReadImage(str(save(tmp_path / "x.nii.gz"))), "LPS")
    batch = everything(open_nifti(tmp_path))
    np.testing.assert_array_equal(batch["volume"][0], sitk.GetArrayFromImage(want))
    for index in ((0, 0, 0), (4, 5, 3), (1, 3, 0)):
        place = want.TransformIndexToPhysicalPoint(index[::-1])
        np.testing.assert_allclose((batch["volume_affine"][0] @ (*index, 1.0))[:3], place, atol=1e-4)


def test_values_are_scaled_as_the_header_says(tmp_path):
    save(tmp_path / "x.nii", slope=0.5, inter=-1024.0)
    batch = everything(open_nifti(tmp_path))
    assert batch["volume"].dtype == np.float32
    want = nibabel.as_closest_canonical(nibabel.load(tmp_path / "x.nii")).get_fdata()
    np.testing.assert_array_equal(batch["volume"][0], want[::-1, ::-1].transpose())


def test_lengths_are_in_mm_and_a_last_axis_of_one_is_no_axis(tmp_path):
    metres = AFFINE @ np.diag([1e-3, 1e-3, 1e-3, 1])
    metres[:3, 3] /= 1e3
    save(tmp_path / "x.nii", VOXELS[..., None], metres, units="meter")
    batch = everything(open_nifti(tmp_path))
    np.testing.assert_allclose(batch["volume_spacing"][0], (0.75, 0.7, 1.25), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"voxels": np.zeros((6, 5, 4, 2), np.int16)}, "volume a file of its own"),
        ({"voxels": np.zeros((6, 5), np.int16)}, "volume a file of its own"),
        ({"voxels": np.zeros((6, 5, 4), np.complex64)}, "complex64"),
        ({"affine": AFFINE @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])}, "right angles"),
    ],
)
def test_volumes_without_a_clear_place_are_refused(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        open_nifti(save(tmp_path / "x.nii", **options))


def test_headers_that_contradict_themselves_are_refused(tmp_path):
    file = save(tmp_path / "x.nii")
    good = file.read_bytes()

    def patched(place, value, kind):
        data = bytearray(good)
        new = np.array(value, kind).tobytes()
        data[place : place + len(new)] = new
        return bytes(data)

    bad = {
        "dim": patched(42, 7, "<i2"),
        "a negative dim": patched(42, -6, "<i2"),
        "datatype": patched(70, 16, "<i2"),
        "bitpix": patched(72, 8, "<i2"),
        "pixdim": patched(80, 0.9, "<f4"),
        "vox_offset": patched(108, 0, "<f4"),
        "slope": patched(112, np.inf, "<f4"),
        "srow": patched(280 + 8, np.nan, "<f4"),
        "magic": patched(344, 0, "<i4"),
        "qform_code and sform_code": patched(252, [0, 0], "<i2"),
        "size": patched(0, 999, "<i4"),
        "less": good[:-1],
        "more": good + b"\0",
        "half a header": good[:200],
        "nothing": b"",
    }
    for data in bad.values():
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.nii"):
            everything(open_nifti(file))


def test_packed_files_are_counted_and_summed(tmp_path):
    file = tmp_path / "x.nii.gz"
    plain = save(tmp_path / "x.nii").read_bytes()
    (tmp_path / "x.nii").unlink()
    good = gzip.compress(plain)
    broken = good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]
    for data in (
        good[:-9],
        good[: len(good) // 2],
        broken,
        good + b"x",
        gzip.compress(plain + bytes(2**24)),
        plain,
        b"",
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.nii\.gz"):
            everything(open_nifti(file))
    file.write_bytes(good)
    assert len(everything(open_nifti(file))["volume"]) == 1
