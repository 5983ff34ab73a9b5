"""Files of every format become Parquet whose rows are those of the files."""

import wave

import numpy as np
import pytest
from PIL import Image

from r1jax.__main__ import dispatch
from r1jax.config import CacheConfig
from r1jax.data.formats import FORMATS, open_format
from r1jax.data.parquet import ParquetStore
from r1jax.data.tiered import TieredStore
from r1jax.errors import UserError

RNG = np.random.default_rng(0)
MHA = "ObjectType = Image\nNDims = 3\nElementSpacing = 0.7 0.8 {}\nDimSize = 4 3 2\nElementType = MET_SHORT\n"


def write_images(folder):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (5, 7), np.uint8)).save(folder / name)


def write_csv(folder):
    (folder / "x.csv").write_text("age,site,note,label\n61,A,早期,1\n,B,,0\n55,A,stable,\n", "utf-8")


def write_npz(folder):
    np.savez(folder / "x.npz", x=RNG.random((3, 4), np.float32), picture=RNG.integers(0, 9, (3, 8, 8), np.uint8))


def write_mhd(folder):
    for step in (1.25, 2.5, 3.0):
        voxels = RNG.integers(-1000, 400, 24).astype("<i2").tobytes()
        (folder / f"{step}.mha").write_bytes(MHA.format(step).encode() + b"ElementDataFile = LOCAL\n" + voxels)


def write_nifti(folder):
    nibabel = pytest.importorskip("nibabel")
    for number in range(3):
        image = nibabel.Nifti1Image(RNG.integers(-9, 9, (3, 4, 5 + number)).astype(np.int16), np.diag([1, 2, 3, 1]))
        image.header.set_xyzt_units("mm")
        nibabel.save(image, folder / f"{number}.nii.gz")


def write_dicom(folder):
    pytest.importorskip("pydicom")
    from tests.data.formats.dicom_files import save, slice_of

    for case in ("one", "two"):
        for k in range(3):
            pixels = RNG.integers(0, 4096, (4, 5)).astype(np.uint16)
            save(
                slice_of(pixels, (0.0, 0.0, 1.25 * k), series=f"1.2.{len(case)}.{ord(case[0])}"), folder / f"{case}/{k}"
            )


def write_audio(folder):
    for number in range(3):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(RNG.integers(-(2**15), 2**15, 40 + number).astype("<i2").tobytes())


def write_series(folder):
    for name, rows in (("a", 3), ("b", 2)):
        lines = [f"2024-03-0{9 - k} 12:00:00,{k},{k / 3}" for k in range(rows)]
        (folder / f"{name}.csv").write_text("\n".join(["when,flow,heat", *lines]), "utf-8")


WRITERS = {
    "images": (write_images, {}),
    "images as pixels": (write_images, {"form": "pixels"}),
    "csv": (write_csv, {}),
    "npz": (write_npz, {}),
    "mhd": (write_mhd, {}),
    "nifti": (write_nifti, {}),
    "dicom": (write_dicom, {}),
    "audio": (write_audio, {"pattern": r"(?P<digit>\d)"}),
    "series": (write_series, {"time": "when", "channels": ["heat", "flow"]}),
}


def same(left, right):
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        np.testing.assert_array_equal(left, right, strict=True)
    else:
        assert left == right


@pytest.mark.parametrize("case", WRITERS)
def test_rows_come_back_as_the_reader_gave_them(tmp_path, case):
    kind, (write, options) = case.partition(" ")[0], WRITERS[case]
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder)
    path = next(folder.iterdir()) if kind in ("csv", "npz") else folder
    words = ["data", "convert", str(path), str(tmp_path / "out"), "--format", kind, "--group-rows", "2"]
    if options:
        words += ["--options", ", ".join(f"{name}={value!r}" for name, value in options.items())]
    assert dispatch(words) == 0
    source = open_format(kind, path, **options)
    store = ParquetStore.open(str(tmp_path / "out"))
    assert store.schema == source.schema
    order = RNG.permutation(len(source))
    found = store.schema.decode(TieredStore(store, CacheConfig()).read_rows(order))
    wanted = source.read_batch(order)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        if isinstance(values, np.ndarray):
            same(found[name], values)
            continue
        for one, other in zip(found[name], values, strict=True):
            same(one, other)


def test_every_format_is_converted():
    assert {case.partition(" ")[0] for case in WRITERS} == set(FORMATS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("time", "name=value"),
        ("time=when", "in quotes"),
        ("time='when'", "no option 'time'"),
        ("**{'form': 'pixels'}", "name=value"),
        ("form=__import__('os')", "in quotes"),
        ("form='pixels') or (1", "name=value"),
    ],
)
def test_options_are_literals_of_the_reader(tmp_path, options, said):
    write_images(tmp_path)
    with pytest.raises(UserError, match=said):
        dispatch(["data", "convert", str(tmp_path), str(tmp_path / "out"), "--format", "images", "--options", options])
    with pytest.raises(UserError, match="leave it out"):
        dispatch(["data", "convert", str(tmp_path), str(tmp_path / "out"), "--format", "cases", "--options", "x=1"])
