"""Two hundred random damages to a file of each format: it is refused, or read as an independent reader reads it."""

import io
import warnings
import wave

import numpy as np
import pytest
from PIL import Image

from r1jax.data.formats import open_format
from r1jax.errors import UserError

DAMAGES = 200
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-1000, 1000, (3, 4, 5)).astype(np.int16)


def damaged(good, seed, head):
    """Flips, overwrites, cuts out, doubles or cuts off bytes, half of the time in the header."""
    rng = np.random.default_rng(seed)
    data = bytearray(good)
    place = int(rng.integers(head if rng.random() < 0.5 else len(data)))
    run = int(rng.integers(1, 9))
    kind = int(rng.integers(6))
    if kind == 0:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[place : place + run] = rng.bytes(len(data[place : place + run]))
    elif kind == 2:
        del data[place : place + run]
    elif kind == 3:
        data[place:place] = data[place : place + run]
    elif kind == 4:
        data[place : place + run] = bytes(len(data[place : place + run]))
    else:
        del data[place:]
    return bytes(data)


def read_damaged(name, folder, file, head, check):
    """Damages a file again and again, and holds what is read of it against an independent reader.

    Returns how often it was refused.
    """
    good, refused = file.read_bytes(), 0
    for seed in range(DAMAGES):
        data = damaged(good, seed, head)
        file.write_bytes(data)
        with warnings.catch_warnings():
            # Half of the time as in production, where what the libraries warn of goes on.
            warnings.simplefilter("ignore" if seed % 2 else "error")
            try:
                options = {"form": "pixels"} if name == "images" else {}
                source = open_format(name, folder, **options)
                batch = source.read_batch(np.arange(len(source)))
            except UserError as error:
                assert file.name in str(error) or str(folder) in str(error)
                refused += data != good
                continue
            warnings.simplefilter("ignore")
            check(batch, data)
    file.write_bytes(good)
    return refused


def same_volume(sitk, path, batch):
    """Compares with SimpleITK: size, spacing and every place (the voxels too)."""
    want = sitk.DICOMOrient(sitk.ReadImage(path), "LPS")
    assert np.array_equal(batch["volume"][0], sitk.GetArrayFromImage(want).reshape(batch["volume"][0].shape))
    np.testing.assert_allclose(batch["volume_spacing"][0], want.GetSpacing()[2::-1], rtol=1e-4)
    place = want.TransformIndexToPhysicalPoint((1, 1, 1))
    np.testing.assert_allclose((batch["volume_affine"][0] @ (1, 1, 1, 1.0))[:3], place, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["x.mhd", "x.mha"])
def test_mhd(tmp_path, name):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((0.7, 0.75, 1.25))
    image.SetOrigin((-12.5, 3.0, 100.0))
    sitk.WriteImage(image, str(tmp_path / name))
    head = (tmp_path / name).read_bytes().index(b"ElementDataFile") + 20
    refused = read_damaged(
        "mhd", tmp_path, tmp_path / name, head, lambda batch, data: same_volume(sitk, str(tmp_path / name), batch)
    )
    assert refused > DAMAGES / 2


@pytest.mark.parametrize("name", ["x.raw", "x.zraw"])
def test_voxels_beside_their_header(tmp_path, name):
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(tmp_path / "x.mhd"), useCompression=name == "x.zraw")

    def check(batch, data):
        want = np.frombuffer(data, "<i2").reshape(VOXELS.shape) if name == "x.raw" else VOXELS
        np.testing.assert_array_equal(batch["volume"][0], want)

    assert read_damaged("mhd", tmp_path, tmp_path / name, 2, check) > DAMAGES / 4


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_nifti(tmp_path, name):
    nibabel = pytest.importorskip("nibabel")
    affine = np.array([[-0.7, 0, 0, 9], [0, -0.75, 0, 8], [0, 0, 1.25, 7], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(VOXELS.transpose(), affine), tmp_path / name)

    def check(batch, data):
        image = nibabel.load(tmp_path / name)
        turned = nibabel.as_closest_canonical(nibabel.squeeze_image(image))
        want = np.asanyarray(turned.dataobj)[::-1, ::-1].transpose()
        np.testing.assert_allclose(batch["volume"][0], want, rtol=1e-6)
        scale = {"mm": 1, "unknown": 1, "meter": 1e3, "micron": 1e-3}[image.header.get_xyzt_units()[0]]
        spacing = np.linalg.norm(turned.affine[:3, :3], axis=0)[::-1] * scale
        np.testing.assert_allclose(batch["volume_spacing"][0], spacing, rtol=1e-5)

    refused = read_damaged("nifti", tmp_path, tmp_path / name, 352 if name == "x.nii" else 20, check)
    assert refused > DAMAGES / (4 if name == "x.nii" else 1.1)


def test_dicom(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from tests.data.formats.dicom_files import save, slice_of

    planes = [save(slice_of(plane, (0, 0, 1.25 * k)), tmp_path / f"{k}.dcm") for k, plane in enumerate(VOXELS)]

    def check(batch, data):
        damaged = pydicom.dcmread(io.BytesIO(data))
        pixels = np.frombuffer(damaged.PixelData, np.int16)[: VOXELS[1].size].astype(float).reshape(VOXELS[1].shape)
        want = pixels * float(damaged.RescaleSlope) + float(damaged.RescaleIntercept)
        np.testing.assert_array_equal(batch["volume"][0][1], want)
        spacing = (1.25, *map(float, damaged.PixelSpacing))
        np.testing.assert_allclose(batch["volume_spacing"][0], spacing, rtol=1e-3)
        np.testing.assert_allclose(batch["volume_spacing"][0], (1.25, 0.7, 0.75), rtol=1e-3)

    head = planes[1].read_bytes().index(b"\xe0\x7f\x10\0")
    assert read_damaged("dicom", tmp_path, planes[1], head, check) > DAMAGES / 4


def test_wav(tmp_path):
    with wave.open(str(tmp_path / "x.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(VOXELS.tobytes())

    def check(batch, data):
        assert batch["rate"].tolist() == [8000]
        want = np.frombuffer(data[data.index(b"data") + 8 :], "<i2")[: VOXELS.size] / 2.0**15
        assert len(batch["audio"][0]) == VOXELS.size
        np.testing.assert_array_equal(batch["audio"][0], want.astype(np.float32))

    assert read_damaged("audio", tmp_path, tmp_path / "x.wav", 44, check) > DAMAGES / 2


def test_png(tmp_path):
    pixels = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    refused = read_damaged(
        "images",
        tmp_path,
        tmp_path / "x.png",
        60,
        lambda batch, _: np.testing.assert_array_equal(batch["image"][0], pixels),
    )
    assert refused > DAMAGES * 0.9


def test_npz(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", volume=VOXELS, label=np.arange(3))

    def check(batch, data):
        np.testing.assert_array_equal(batch["volume"], VOXELS)
        np.testing.assert_array_equal(batch["label"], np.arange(3))

    assert read_damaged("npz", tmp_path, tmp_path / "x.npz", 128, check) > DAMAGES / 2
