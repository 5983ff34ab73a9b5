"""A table is joined to cases by their names, and every name that does not fit is said."""

import numpy as np
import pytest
from PIL import Image

from r1jax.__main__ import dispatch
from r1jax.data.folder import FolderCases
from r1jax.data.parquet import ParquetStore
from tests.data.parquet_sets import read_everything, refused

PIXELS = ("--format", "images", "--options", "form='pixels'")
NAMES = ("b.png", "a.png", "c.png")


@pytest.fixture
def pictures(tmp_path):
    draw = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), np.uint8)).save(path)
    return tmp_path / "pictures"


def join(tmp_path, source, rows, *more, header="scan,age,nodule_present,split"):
    (tmp_path / "records.csv").write_text("\n".join([header, *rows]), "utf-8")
    words = [str(source), str(tmp_path / "out"), *PIXELS, "--join", str(tmp_path / "records.csv"), "--key", "scan"]
    return dispatch(["data", "convert", *words, *map(str, more)])


@pytest.mark.parametrize("cut", [0, 4], ids=["whole names", "names without suffix"])
def test_pictures_and_records_become_cases_to_train_on(pictures, tmp_path, cut):
    given = {"c.png": ("61", "1", "train"), "a.png": ("", "0", "train"), "b.png": ("55", "", "val")}
    rows = [",".join((name[: len(name) - cut], *values)) for name, values in given.items()]
    assert join(tmp_path, pictures, rows, "--group-rows", 1, "--shard-rows", 2) == 0
    store = ParquetStore.open(str(tmp_path / "out"))
    assert set(store.schema.names) == {"case_id", "image", "age", "nodule_present", "split"}  # and nothing is missing
    stored = store.schema.decode(read_everything(tmp_path / "out"))
    for place, name in enumerate(stored["case_id"]):
        age, present, split = given[name]
        np.testing.assert_array_equal(stored["image"][place], np.asarray(Image.open(pictures / name)))
        assert stored["split"][place] == split
        for found, wanted in ((stored["age"][place], age), (stored["nodule_present"][place], present)):
            np.testing.assert_array_equal(found, float(wanted or "nan"))


def test_joined_cases_are_opened_like_any_other(tmp_path):
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "scans.npz", case_id=np.array(["x", "y", "z"]), image=draw.integers(0, 9, (3, 8, 8), np.uint8))
    (tmp_path / "records.csv").write_text(
        "scan,age,nodule_present,split\nz,61,1,train\nx,40,0,train\ny,,1,val\n", "utf-8"
    )
    words = [str(tmp_path / "scans.npz"), str(tmp_path / "out"), "--format", "npz"]
    assert dispatch(["data", "convert", *words, "--join", str(tmp_path / "records.csv"), "--key", "scan"]) == 0
    cases = FolderCases.open(str(tmp_path / "out"), "train")
    batch = cases.read_batch(np.arange(len(cases)))
    assert batch["case_id"] == ["x", "z"] and batch["target.nodule_present"].tolist() == [0, 1]
    assert cases.known_findings() == {"nodule_present"} and "not used" not in cases.name


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a,1", "b.png,2"], ("pictures", "'c.png'", "records.csv", "lacks")),
        (["a,1", "b,2", "c,3", "d,4", "e,5"], ("records.csv", "'d', 'e'", "pictures", "lacks")),
        (["a,1", "b,2", "c,3", "a,4"], ("lines 2 and 5", "records.csv", "'a'")),
        (["a,1", "b,2", "c,3", "a.png,4"], ("records.csv", "'a.png' more than once")),
        (["a,1", ",2", "c,3"], ("line 3", "'scan'", "is empty")),
    ],
    ids=["no record", "no picture", "one record twice", "one record twice, once with its suffix", "no name"],
)
def test_names_that_do_not_fit_are_said(pictures, tmp_path, rows, words):
    refused(lambda: join(tmp_path, pictures, rows, header="scan,age"), *words)
    assert not (tmp_path / "out").exists()


def test_other_things_that_cannot_be_joined_are_said(pictures, tmp_path):
    rows = ["a,1", "b,2", "c,3"]
    refused(lambda: join(tmp_path, pictures, rows, header="name,age"), "no column 'scan'", "records.csv")
    refused(lambda: join(tmp_path, pictures, rows, header="scan,image"), "has a column 'image'", "rename it")
    (pictures / "cases.npz").touch()
    words = ["data", "convert", str(pictures), str(tmp_path / "out"), "--join", "records.csv"]
    refused(lambda: dispatch(words), "put records.csv into", str(pictures))
    refused(lambda: dispatch([*words[:-2], *PIXELS, "--key", "scan"]), "--key", "--join")
