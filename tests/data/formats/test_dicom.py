"""A DICOM series becomes one volume in HU in its true order; series that make no volume are refused by file."""

import pickle
import sys

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from r1jax.data.formats import dicom_slice  # noqa: E402
from r1jax.data.formats.dicom import open_dicom  # noqa: E402
from r1jax.data.schema import Field  # noqa: E402
from r1jax.errors import UserError  # noqa: E402
from tests.data.formats.dicom_files import save, slice_of  # noqa: E402

RNG = np.random.default_rng(0)
STORED = RNG.integers(0, 4096, (5, 6, 7)).astype(np.uint16)
ALONG = (1.0, -2.5, 3.25)


def series(folder, stored=STORED, step=1.25, shuffle=True, **options):
    """Slices whose file names are not in their order; gives the datasets in it."""
    data = [slice_of(plane, (10.0, -20.0, -300.0 + step * k), **options) for k, plane in enumerate(stored)]
    for item in data:
        item.BitsStored, item.HighBit = 12, 11
    names = RNG.permutation(len(data)) if shuffle else range(len(data))
    return {folder / f"{name}.dcm": item for name, item in zip(names, data, strict=True)}


def write(files):
    for path, data in files.items():
        save(data, path)
    return list(files)


def everything(source):
    return source.read_batch(np.arange(len(source)))


def test_slices_are_sorted_and_rescaled(tmp_path):
    write(series(tmp_path / "a"))
    write(series(tmp_path / "b/deep", STORED[:3]))
    (tmp_path / "b/LICENSE").write_text("text")
    (tmp_path / "a/notes.txt").write_text("text")
    source = pickle.loads(pickle.dumps(open_dicom(tmp_path)))
    assert source.schema.names == ("case_id", "modality", "volume_spacing", "volume_affine", "volume")
    assert source.schema.fields[-1] == Field("volume", "volume", "int16", (None, 6, 7))
    batch = everything(source)
    assert batch["case_id"] == ["a", "b/deep"] and batch["modality"] == ["CT", "CT"]
    np.testing.assert_array_equal(batch["volume"][0], STORED.astype(int) - 1024)
    np.testing.assert_array_equal(batch["volume"][1], STORED[:3].astype(int) - 1024)
    np.testing.assert_allclose(batch["volume_spacing"], [(1.25, 0.7, 0.75)] * 2)
    np.testing.assert_allclose(batch["volume_affine"][0] @ (2, 1, 3, 1), (10 + 3 * 0.75, -20 + 0.7, -300 + 2.5, 1))
    assert "Doe" not in repr(batch) and "12345" not in repr(source.schema)


def test_places_and_values_are_those_of_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    rows, columns = (0.0, 0.8, -0.6), (0.0, -0.6, -0.8)  # sagittal, tilted; the normal runs to the right
    normal = np.cross(rows, columns)
    data = {}
    for k, plane in enumerate(STORED):
        place = tuple(np.round(np.array([10.0, -20.0, -300.0]) + 1.5 * k * normal, 6).tolist())
        data[tmp_path / f"{k:02d}.dcm"] = slice_of(plane, place, (*rows, *columns))
    write(data)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    want = sitk.DICOMOrient(reader.Execute(), "LPS")
    batch = everything(open_dicom(tmp_path))
    np.testing.assert_array_equal(batch["volume"][0], sitk.GetArrayFromImage(want))
    np.testing.assert_allclose(batch["volume_spacing"][0], want.GetSpacing()[::-1], rtol=1e-5)
    for index in ((0, 0, 0), (3, 2, 1)):
        place = want.TransformIndexToPhysicalPoint(index[::-1])
        np.testing.assert_allclose((batch["volume_affine"][0] @ (*index, 1.0))[:3], place, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "bits", "slope", "intercept", "dtype"),
    [
        (STORED, 16, 1, -1024, "int32"),
        (STORED.astype(np.int16) - 2048, 12, 1, 0, "int16"),
        (STORED, 12, 0.25, 3, "float32"),
        ((STORED % 256).astype(np.uint8), 8, 2, 0, "int16"),
    ],
)
def test_the_type_holds_every_value_that_headers_allow(tmp_path, stored, bits, slope, intercept, dtype):
    files = series(tmp_path, stored)
    for data in files.values():
        data.BitsStored, data.HighBit, data.RescaleSlope, data.RescaleIntercept = bits, bits - 1, slope, intercept
    write(files)
    found = everything(open_dicom(tmp_path))["volume"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[0], stored.astype(float) * slope + intercept)


def test_bits_above_the_sign_may_be_empty_and_others_must(tmp_path):
    signed = STORED.astype(np.int16) - 2048
    files = series(tmp_path, signed)
    for data in files.values():
        data.PixelData = (np.frombuffer(data.PixelData, np.uint16) & 0x0FFF).tobytes()
    write(files)
    np.testing.assert_array_equal(everything(open_dicom(tmp_path))["volume"][0], signed.astype(int) - 1024)
    file, data = next(iter(files.items()))
    data.PixelRepresentation, data.PixelData = 1, (np.frombuffer(data.PixelData, np.uint16) | 0x1000).tobytes()
    save(data, file)
    with pytest.raises(UserError, match="beyond its 12 stored bits"):
        everything(open_dicom(tmp_path))


def test_packed_slices_are_unpacked(tmp_path):
    files = series(tmp_path)
    for data in files.values():
        data.compress(RLELossless, generate_instance_uid=False)
    write(files)
    np.testing.assert_array_equal(everything(open_dicom(tmp_path))["volume"][0], STORED.astype(int) - 1024)


def drop(name):
    return lambda data: delattr(data, name)


def put(name, value):
    return lambda data: setattr(data, name, value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("SeriesInstanceUID", generate_uid(entropy_srcs=["other"])), "different series"),
        (put("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]), "differ in orientation: .*localizer"),
        (put("PixelSpacing", [0.7, 0.8]), "differ in spacing"),
        (put("ImagePositionPatient", [10, -20, -300 + 1.6]), "uneven"),
        (put("ImagePositionPatient", [10, -20, -300]), "at the same place"),
        (put("ImagePositionPatient", [10, -10, -300 + 1.25]), "gantry tilt"),
        (put("Modality", "MR"), "differ in modality"),
        (put("NumberOfFrames", 3), "3 frames"),
        (put("PhotometricInterpretation", "MONOCHROME1"), "MONOCHROME1"),
        (put("BitsStored", 13), "high bit 11 of 13"),
        (drop("ImagePositionPatient"), "lacks ImagePositionPatient"),
        (drop("RescaleIntercept"), "no HU"),
        (put("RescaleSlope", 0), "RescaleSlope 0"),
        (put("Rows", 5), "differ in shape"),
        (put("PixelData", b"\0" * 80), "80 bytes, where the header says 84"),
        (drop("PixelData"), "pixels of .* are damaged"),
    ],
)
def test_a_slice_that_does_not_fit_is_named(tmp_path, change, said):
    files = series(tmp_path, shuffle=False)
    change(files[tmp_path / "1.dcm"])
    write(files)
    with pytest.raises(UserError, match=said) as caught:
        everything(open_dicom(tmp_path))
    assert "1.dcm" in str(caught.value)


def test_slices_that_are_missing_or_there_twice_are_named(tmp_path):
    paths = write(series(tmp_path, shuffle=False))
    (tmp_path / "copy.dcm").write_bytes(paths[3].read_bytes())
    with pytest.raises(UserError, match=r"(3|copy)\.dcm and .*(3|copy)\.dcm"):
        open_dicom(tmp_path)
    (tmp_path / "copy.dcm").unlink()
    paths[2].unlink()
    with pytest.raises(UserError, match=r"missing between .*1\.dcm and .*3\.dcm"):
        open_dicom(tmp_path)
    for path in paths[:2] + paths[3:4]:
        path.unlink()
    with pytest.raises(UserError, match="alone"):
        open_dicom(tmp_path)


def test_positions_may_be_rounded(tmp_path):
    files = series(tmp_path, step=0.625)
    for data in files.values():
        data.ImagePositionPatient = [round(float(x), 1) for x in data.ImagePositionPatient]
    write(files)
    np.testing.assert_allclose(open_dicom(tmp_path).read_batch(np.array([0]))["volume_spacing"][0, 0], 0.625, atol=0.01)


def test_what_cannot_be_unpacked_names_the_package(tmp_path, monkeypatch):
    paths = write(series(tmp_path))
    data = pydicom.dcmread(paths[0])
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
    save(data, paths[0])
    if not pydicom.pixels.get_decoder(JPEGLosslessSV1).is_available:
        with pytest.raises(UserError, match="pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"):
            open_dicom(tmp_path)
    data = pydicom.dcmread(paths[1])
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(data, paths[0])
    with pytest.raises(UserError, match="deflated"):
        open_dicom(tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"r1jax\[medical\]"):
        open_dicom(tmp_path)


def test_files_that_are_no_slices(tmp_path):
    paths = write(series(tmp_path))
    good = paths[0].read_bytes()
    for data in (b"", b"text", good[:200], good[:-20], good[:128] + b"DICX" + good[132:]):
        paths[0].write_bytes(data)
        with pytest.raises(UserError, match=paths[0].name):
            everything(open_dicom(tmp_path))
    for path in paths:
        path.unlink()
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(UserError, match="no DICOM file"):
        open_dicom(tmp_path)


def test_no_value_of_a_patient_is_asked_for():
    assert not [tag for tag in (*dicom_slice.NEEDED, *dicom_slice.OPTIONAL) if "Patient" in tag[:7] or "Date" in tag]
