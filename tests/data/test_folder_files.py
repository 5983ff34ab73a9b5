"""Damaged files and wrong values: one sentence that names file, array and row."""

import zipfile

import numpy as np
import pytest

from r1jax.data.folder import FolderCases
from r1jax.errors import UserError
from tests.data.folders import images, read_all, refused, write


def test_missing_folder_file_instead_of_folder_and_no_archive(tmp_path):
    refused(tmp_path / "nowhere", "no folder", "nowhere")
    (tmp_path / "notes.csv").write_text("age\n3\n")
    refused(tmp_path, "no .npz")
    refused(tmp_path / "notes.csv", "is a file", "folder that holds it")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all" * 9])
def test_file_that_is_no_archive(tmp_path, content):
    (tmp_path / "cases.npz").write_bytes(content)
    refused(tmp_path, "cases.npz", "damaged, cut short or no .npz")


def test_bare_array_named_npz(tmp_path):
    with (tmp_path / "cases.npz").open("wb") as file:
        np.save(file, images())
    refused(tmp_path, "cases.npz", "no .npz")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_archive(tmp_path, share):
    path = write(tmp_path, image=images(20)) / "cases.npz"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(tmp_path, "cases.npz", "cut short")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_flipped_bit_is_found_or_harmless(tmp_path, save):
    path = tmp_path / "cases.npz"
    save(path, image=images(3), label=np.array([0, 1, 1]))
    content, before = path.read_bytes(), read_all(tmp_path)
    found = losses = 0
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        try:
            after = read_all(tmp_path)
        except UserError as error:
            assert "cases.npz" in str(error)
            found += 1
        else:  # a time stamp, say, or a length in the archive's list of contents that swallows the next entry
            lost = np.isnan(after["target.nodule_present"]).all()
            assert after.keys() == before.keys()
            for name in before:
                assert lost or np.array_equal(after[name], before[name], equal_nan=name[0] == "t"), (position, name)
            losses += lost
    assert losses < 5
    assert found > 0.4 * len(content) / 3


def test_array_in_damaged_data_is_named(tmp_path):
    path = tmp_path / "cases.npz"
    np.savez(path, image=images(20), label=np.zeros(20))
    content = bytearray(path.read_bytes())
    content[content.index(images(20).tobytes()) + 99] ^= 1
    path.write_bytes(content)
    refused(tmp_path, "'image'", "damaged", "CRC")


def test_objects_are_never_unpickled(tmp_path):
    write(tmp_path, image=images(2), case_id=np.array(["a", None], dtype=object))
    refused(tmp_path, "'case_id'", "Python objects")
    np.savez(tmp_path / "cases.npz", image=images(2), notes=np.array([{}, None], dtype=object))
    assert FolderCases.open(tmp_path).ignored == ("notes",)


def test_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "cases.npz", "w") as archive:
        archive.writestr("image", "text")
    refused(tmp_path, "'image'", "damaged")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": images()[..., None]}, ["'image'", "[6, 5, 7, 1]", "[n, H, W]"]),
        ({"volume": images()}, ["'volume'", "[n, Z, Y, X]"]),
        ({"image": images()[:, :0]}, ["'image'", "without pixels"]),
        ({"image": images()[:0]}, ["'image'", "no cases"]),
        ({"image": images().astype(np.int32)}, ["'image'", "int32", "uint8"]),
        ({"image": images().astype(complex)}, ["'image'", "complex128"]),
        ({"slices": images()}, ["'slices'", "docs/data.md"]),
        ({"image": images(), "label": np.zeros(5)}, ["'label'", "[5]", "'image'", "6 cases"]),
        ({"image": images(), "label": np.float64(1)}, ["'label'", "[]"]),
        ({"image": images(), "label": np.zeros((6, 1))}, ["'label'", "[6, 1]", ": [6] is needed"]),
        ({"image": images(), "label": np.array(list("010101"))}, ["'label'", "numbers"]),
        ({"image": images(), "label": np.array([0, 1, 2, 0, 0, 0])}, ["'label'", "row 2", "2.0", "0 or 1"]),
        ({"image": images(), "label": np.zeros(6), "nodule_present": np.zeros(6)}, ["twice", "'label'"]),
        ({"image": images(), "texture": np.array([1, 2, 3, 4, 5, 6])}, ["'texture'", "row 5", "1 to 5"]),
        ({"image": images(), "calcification": np.array([1, 2, 3, 4, 6, 7])}, ["row 5", "1 to 6"]),
        ({"image": images(), "margin": np.array([1, 2.5, 3, 4, 5, 1])}, ["'margin'", "row 1", "whole numbers"]),
        ({"image": images(), "subtlety": np.array([1, np.inf, 3, 4, 5, 1])}, ["'subtlety'", "row 1", "inf"]),
        ({"image": images(), "malignancy": np.array([1, 0, 3, 4, 5, 1])}, ["'malignancy'", "row 1", "1 to 5"]),
        ({"image": images(), "malignancy": np.full(6, 2), "malignancy_rating": np.full(6, 2)}, ["keep one"]),
        ({"image": images(), "long_axis_mm": np.array([1, 2, 3, 0, 5, 6])}, ["row 3", "positive"]),
        ({"image": images(), "center_mm": np.zeros((6, 2))}, ["'center_mm'", "[6, 3]"]),
        ({"image": images(), "center_mm": np.full((6, 3), np.inf)}, ["'center_mm'", "row 0"]),
        ({"image": images(), "age": np.array([1, 2, -3, 4, 5, 6])}, ["'age'", "row 2", "0 to 120"]),
        ({"image": images(), "texture": np.zeros(6, "datetime64[s]")}, ["'texture'", "datetime64", "numbers"]),
        ({"image": images(), "spacing": np.array([0.7, -0.7])}, ["'spacing'", "positive"]),
        ({"image": images(), "spacing": np.full((6, 2), [[0.7, np.nan]])}, ["'spacing'", "positive"]),
        ({"image": images(), "spacing": np.ones((6, 4))}, ["'spacing'", "[6, 4]"]),
        ({"image": images(), "spacing": np.ones((5, 2))}, ["'spacing'", "[5, 2]"]),
        ({"image": images(), "case_id": np.array(list("abcdea"))}, ["'case_id'", "row 5", "'a'", "repeats"]),
        ({"image": images(), "case_id": np.array([*"abcde", "../f"])}, ["'case_id'", "row 5", "../f", "slashes"]),
        ({"image": images(), "case_id": np.array([*"abcde", ""])}, ["'case_id'", "row 5"]),
        ({"image": images(), "case_id": np.array([b"\xff"] * 6)}, ["'case_id'", "UTF-8"]),
        ({"image": images(), "case_id": np.ones((6, 2), int)}, ["'case_id'", "per case"]),
        ({"image": images(), "split": np.zeros(6)}, ["'split'", "whole number"]),
        ({"image": images(), "mask": np.zeros((6, 7, 5), bool)}, ["'mask'", "[6, 7, 5]", "[6, 5, 7]"]),
        ({"image": images(), "mask": np.zeros((6, 6), np.uint8)}, ["'mask'", "[6, 6]"]),
        ({"image": images(), "mask": np.zeros((6, 5, 7))}, ["'mask'", "float64"]),
        ({"image": images(), "has_image": np.array([1, 0, np.nan, 1, 1, 1])}, ["'has_image'", "row 2"]),
        (
            {"image": images(), "has_image": np.array([1, 1, 0, 1, 0, 1])},
            ["'000002'", "neither a picture nor a record"],
        ),
        ({"label": np.array([0, 1])}, ["'000000'", "neither a picture nor a record"]),
        ({"age": np.array([50, np.nan, 3])}, ["'000001'", "has neither a picture nor a record: leave"]),
    ],
)
def test_bad_arrays(tmp_path, arrays, words):
    refused(write(tmp_path, **arrays), *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_picture_with_values_that_are_not_finite(tmp_path, value, dtype):
    picture = np.random.default_rng(0).random((4, 5, 7)).astype(dtype)
    picture[2, 1, 1:4] = value
    write(tmp_path, image=picture, case_id=np.array(["a", "b", "c", "d"]))
    refused(tmp_path, "'image'", "row 2", "'c'", "3 values", "NaN or Inf")


def test_float_pictures_of_an_unknown_scale(tmp_path):
    standardised = np.random.default_rng(0).normal(size=(4, 5, 7))
    refused(write(tmp_path, image=standardised), "'image'", "neither 0..1 nor Hounsfield")


def test_constant_picture_is_allowed(tmp_path):
    write(tmp_path, image=np.zeros((2, 3, 3), np.float32))
    np.testing.assert_array_equal(read_all(tmp_path)["image"], np.full((2, 3, 3), -1000, np.int16))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("age\n1\n2\n", ["record.csv", "2 rows", "3 cases"]),
        ("age\n1\n2\n3\n4\n", ["record.csv", "4 rows", "3 cases"]),
        ("age,crp\n1,2\n1\n1,2\n", ["line 3", "1 cells", "2"]),
        ("age\n1\nold\n3\n", ["'age'", "line 3", "'old'"]),
        ('text,age\n"a\nb",1\nc,old\nd,2\n', ["'age'", "line 4", "'old'"]),
        ("texture\n1\n9\n3\n", ["'texture'", "line 3", "1 to 5"]),
        ("age,age\n1,1\n2,2\n3,3\n", ["twice", "'age'"]),
        ("center_mm\n1\n2\n3\n", ["'center_mm'", "array"]),
        ("label\n1\n0\n1\n", ["nodule_present", "keep one"]),
        ("case_id,age\na,1\nb,2\nq,3\n", ["'q'", "line 4"]),
        ("case_id,age\na,1\nb,2\nb,3\n", ["'b'", "line 4", "repeats"]),
        ("", ["record.csv", "empty"]),
        (b"age\n1\n2\n\xff\n", ["record.csv", "UTF-8"]),
        ("age,text\n1,a\n2,b\n3,c".encode("utf-16"), ["record.csv", "UTF-8"]),
        (b'text,age\n"a,1\nb,2\nc,3\n', ["record.csv", "valid table"]),
    ],
)
def test_bad_tables(tmp_path, table, words):
    write(tmp_path, table, image=images(3), case_id=np.array(["a", "b", "c"]), label=np.array([0, 1, 1]))
    refused(tmp_path, *words)


def test_table_of_unknown_columns_is_only_listed(tmp_path):
    write(tmp_path, "centre,reader\nx,1\n", image=images(3))
    assert FolderCases.open(tmp_path).ignored == ("centre", "reader")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"image": images(2)[:, :4]}, ["'image'", "[5, 7] in a.npz", "[4, 7] in b.npz"]),
        ({"volume": np.zeros((2, 3, 3, 3), np.uint8)}, ["1 of 2", "'image'"]),
        ({"image": images(2), "case_id": np.array(["a", "b"])}, ["1 of 2", "'case_id'"]),
        ({"image": images(2), "texture": np.array([3, 8])}, ["'texture'", "b.npz at row 1"]),
        ({"image": images(2), "texture": np.ones((2, 2))}, ["'texture'", "b.npz", "[5, 2]"]),
    ],
)
def test_archives_that_do_not_fit_together(tmp_path, other, words):
    write(tmp_path, name="a.npz", image=images(3))
    refused(write(tmp_path, name="b.npz", **other), *words)
