"""Arrays of an archive become columns by name, rank and type; archives that lie are refused."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from r1jax.data.formats.npz import open_npz
from r1jax.data.schema import Field
from r1jax.errors import UserError

RNG = np.random.default_rng(0)


def save(tmp_path, **arrays):
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz"


def everything(source):
    return source.read_batch(np.arange(len(source)))


def test_columns_are_the_arrays(tmp_path):
    arrays = {
        "image": RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8),
        "ct": RNG.integers(-99, 99, (3, 2, 4, 5)).astype(">i2"),
        "photo": RNG.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8),
        "sensors": np.asfortranarray(RNG.normal(size=(3, 6, 2)).astype(np.float32)),
        "features": RNG.normal(size=(3, 7)),
        "label": np.array([[1], [0], [1]], np.uint8),
        "word": np.array(["a", "bb", "好"]),
        "code": np.array([b"x", b"y", b"z"]),
    }
    source = pickle.loads(pickle.dumps(open_npz(save(tmp_path, **arrays))))
    assert source.schema.fields == (
        Field("case_id", "category"),
        Field("image", "image", "uint8", (4, 5)),
        Field("ct", "volume", "int16", (2, 4, 5)),
        Field("photo", "image", "uint8", (4, 5, 3)),
        Field("sensors", "series", "float32", (6, 2)),
        Field("features", "table", "float64", (7,)),
        Field("label", "number", "uint8"),
        Field("word", "category"),
        Field("code", "category"),
    )
    batch = source.read_batch(np.array([2, 0]))
    assert batch["case_id"] == ["2", "0"] and batch["word"] == ["好", "a"] and batch["code"] == ["z", "x"]
    np.testing.assert_array_equal(batch["label"], [1, 1])
    for name in ("image", "ct", "photo", "sensors", "features"):
        np.testing.assert_array_equal(batch[name], arrays[name][[2, 0]])
        assert batch[name].dtype.isnative


def test_ids_kinds_and_a_choice_of_arrays(tmp_path):
    file = save(tmp_path, case_id=np.array([7, 8]), x=np.zeros((2, 3, 4), np.uint8), rest=np.zeros(5))
    with pytest.raises(UserError, match=r"rest \[5\]"):
        open_npz(file)
    source = open_npz(file, arrays=["case_id", "x"], kinds={"x": "series"})
    assert source.schema.fields[1].kind == "series" and everything(source)["case_id"] == ["7", "8"]
    with pytest.raises(UserError, match="did you mean 'rest'"):
        open_npz(file, arrays=["rset"])
    with pytest.raises(UserError, match="choose among"):
        open_npz(file, arrays=["x"], kinds={"x": "tensor"})


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([{}, {}], object), "Python objects"),
        (np.zeros(2, complex), "complex128"),
        (np.zeros(2, "datetime64[s]"), "datetime64"),
        (np.zeros(2, np.longdouble), "longdouble|float128"),
        (np.zeros((2, 0)), "none of them empty"),
        (np.zeros(()), "number of cases"),
        (np.zeros((0, 3)), "no cases"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, said):
    with pytest.raises(UserError, match=said):
        open_npz(save(tmp_path, x=array))


def test_twice_the_same_id_is_refused(tmp_path):
    with pytest.raises(UserError, match="'1' is there twice"):
        open_npz(save(tmp_path, case_id=np.array([1, 1])))


def test_damage_is_noticed(tmp_path):
    file = save(tmp_path, x=RNG.normal(size=(4, 50)))
    good = file.read_bytes()
    for data in (b"", b"PK", good[: len(good) // 2], good[:300] + bytes([good[300] ^ 1]) + good[301:]):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.npz"):
            everything(open_npz(file))


def test_an_archive_that_claims_too_much_is_refused(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", head.getvalue())
    with pytest.raises(UserError, match="more than"):
        open_npz(tmp_path / "x.npz")
