"""FolderCases against folders that the tests write themselves, and the two real sets where they are."""

import csv
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.config import CacheConfig
from r1jax.data.folder import FolderCases
from r1jax.tasks.medical.schema import FINDING, FINDINGS, RECORD_FIELDS
from tests.data.folders import images, read_all, refused, write

RATINGS = [finding.name for finding in FINDINGS if finding.kind == "rating"]
FIELDS = [field.name for field in RECORD_FIELDS]


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_image_folder(tmp_path):
    label = np.array([0, 1, 1, 0, 0, 1], np.uint8)
    write(tmp_path, image=images(), label=label, candidate_row=np.arange(6), spacing=np.array([0.7, 0.8]))
    source = FolderCases.open(tmp_path)
    batch = source.read_batch(np.array([4, 1]))
    assert len(source) == 6
    assert source.schema.modalities == {"image"}
    assert source.ignored == ("candidate_row",)
    assert "candidate_row" in source.name and tmp_path.name in source.name
    assert batch["case_id"] == ["000004", "000001"]
    np.testing.assert_array_equal(batch["image"], images()[[4, 1]])
    assert batch["image"].dtype == np.uint8
    np.testing.assert_array_equal(batch["image_spacing"], np.float32([[0.7, 0.8]] * 2))
    np.testing.assert_array_equal(batch["target.nodule_present"], np.float32([0, 1]))
    assert {key for key in batch if key.startswith("target.")} == {f"target.{name}" for name in FINDING}
    assert all(np.isnan(batch[f"target.{name}"]).all() for name in FINDING if name != "nodule_present")
    assert batch["target.center_mm"].shape == (2, 3)
    assert all(value.dtype == np.float32 for key, value in batch.items() if key.startswith("target."))


def test_volume_folder_with_table(tmp_path):
    rng = np.random.default_rng(1)
    volume = rng.integers(-1000, 400, (4, 3, 5, 6), np.int16)
    mask = rng.random((4, 3, 5, 6)) < 0.3
    center = rng.normal(size=(4, 3))
    table = (
        "Filename,texture,malignancy,age,text,text_note\n"
        'a,1,5,61,"smoker, cough",x\n'
        "b,,1,,,x\n"
        'c,5,2,NA,"two\nlines",x\n'
        "d,3,nan,0,吸烟二十年,x\n"
    )
    write(tmp_path, table, volume=volume, mask=np.packbits(mask.reshape(4, -1), axis=1), **{"target.center_mm": center})
    batch = read_all(tmp_path)
    source = FolderCases.open(tmp_path)
    assert source.schema.modalities == {"volume", "table", "text"}
    assert source.ignored == ("Filename", "text_note")
    np.testing.assert_array_equal(batch["volume"], volume)
    assert batch["volume"].dtype == np.int16
    np.testing.assert_array_equal(batch["mask"], mask)
    assert batch["mask"].dtype == bool
    np.testing.assert_array_equal(batch["volume_spacing"], np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(batch["target.texture"], np.float32([1, np.nan, 5, 3]))
    np.testing.assert_array_equal(batch["target.malignancy_rating"], np.float32([5, 1, 2, np.nan]))
    assert np.isnan(batch["target.malignancy"]).all()
    np.testing.assert_array_equal(batch["target.center_mm"], center.astype(np.float32))
    assert batch["text"] == ["smoker, cough", "", "two\nlines", "吸烟二十年"]
    assert batch["table"].shape == (4, len(FIELDS)) and batch["table"].dtype == np.float32
    np.testing.assert_array_equal(batch["table"][:, FIELDS.index("age")], np.float32([61, np.nan, np.nan, 0]))
    assert np.isnan(np.delete(batch["table"], FIELDS.index("age"), axis=1)).all()


def test_malignancy_without_values_above_one_is_an_outcome(tmp_path):
    write(tmp_path, image=images(), malignancy=np.array([0, 1, 1, 0, np.nan, 1]))
    batch = read_all(tmp_path)
    np.testing.assert_array_equal(batch["target.malignancy"], np.float32([0, 1, 1, 0, np.nan, 1]))
    assert np.isnan(batch["target.malignancy_rating"]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_pictures(tmp_path, dtype):
    grey = np.linspace(0, 1, 4 * 35).reshape(4, 5, 7).astype(dtype)
    window = read_all(write(tmp_path / "window", image=grey))["image"]
    assert window.dtype == np.int16
    np.testing.assert_allclose(window, -1000 + 1400 * grey.astype(np.float64), atol=0.51)
    units = np.linspace(-1000, 700, 4 * 35).reshape(4, 5, 7).astype(dtype)
    np.testing.assert_allclose(read_all(write(tmp_path / "hu", image=units))["image"], units.astype(float), atol=0.51)
    # beyond int16 the value is cut, not wrapped around
    assert (
        read_all(write(tmp_path / "cut", image=np.float32(4e4) * np.eye(3, dtype=np.float32)[None]))["image"].max()
        == 32767
    )


def test_several_archives_follow_each_other(tmp_path):
    rng = np.random.default_rng(2)
    units = rng.integers(-1000, 1000, (3, 5, 7), np.int16)
    write(tmp_path, name="b.npz", image=units, age=np.array([40, 50, 60]), spacing=np.array([[0.5, 0.5]]))
    table = "subtlety\n" + "".join(f"{1 + row % 5}\n" for row in range(5))
    write(tmp_path, table, name="a.npz", image=images(2), label=np.array([1, 0]), spacing=np.array([0.7, 0.8]))
    batch = read_all(tmp_path)
    assert batch["image"].dtype == np.int16
    np.testing.assert_array_equal(batch["image"][2:], units)
    np.testing.assert_allclose(batch["image"][:2], images(2) / 255 * 1400 - 1000, atol=0.51)
    np.testing.assert_array_equal(batch["image_spacing"], np.float32([[0.7, 0.8]] * 2 + [[0.5, 0.5]] * 3))
    np.testing.assert_array_equal(batch["target.nodule_present"], np.float32([1, 0, np.nan, np.nan, np.nan]))
    np.testing.assert_array_equal(batch["table"][:, 0], np.float32([np.nan, np.nan, 40, 50, 60]))
    np.testing.assert_array_equal(batch["target.subtlety"], np.float32([1, 2, 3, 4, 5]))


def test_table_is_joined_by_case_id_in_any_order(tmp_path):
    ids = np.array(["p1", "p2", "p3"])
    write(tmp_path, "age,case_id\n30,p3\n10,p1\n", image=images(3), case_id=ids)
    batch = read_all(tmp_path)
    assert batch["case_id"] == ids.tolist()
    np.testing.assert_array_equal(batch["table"][:, 0], np.float32([10, np.nan, 30]))


def test_table_names_the_cases_and_cuts_the_folder(tmp_path):
    table = "case_id;split;group\nx;training;1\ny;2;1\nz;Val;2\n"  # as a German spreadsheet writes it
    write(tmp_path, "﻿" + table, image=images(3))
    assert read_all(tmp_path, split="train")["case_id"] == ["x"]
    assert read_all(tmp_path, split="val")["case_id"] == ["z"]
    assert read_all(tmp_path, split="test")["case_id"] == ["y"]


def test_a_picture_may_be_missing_for_one_case(tmp_path):
    write(tmp_path, "age\n50\n60\n70\n", image=images(3), has_image=np.array([True, False, True]))
    np.testing.assert_array_equal(read_all(tmp_path)["has_image"], [True, False, True])


def test_both_pictures_and_a_mask_of_the_volume(tmp_path):
    volume, mask = np.zeros((2, 3, 4, 5), np.uint8), np.eye(5, dtype=np.uint8)[None, None, :4].repeat(2, 0).repeat(3, 1)
    write(tmp_path, volume=volume, image=images(2), mask=mask, spacing=np.array([2.5, 0.7, 0.8]))
    batch = read_all(tmp_path)
    assert FolderCases.open(tmp_path).schema.modalities == {"volume", "image"}
    np.testing.assert_array_equal(batch["mask"], mask == 1)
    np.testing.assert_array_equal(batch["volume_spacing"][0], np.float32([2.5, 0.7, 0.8]))
    np.testing.assert_array_equal(batch["image_spacing"][0], np.float32([0.7, 0.8]))


def test_records_without_pictures(tmp_path):
    write(tmp_path, age=np.array([50.0, 60.0]), crp=np.array([np.nan, 3.0]))
    assert FolderCases.open(tmp_path).schema.modalities == {"table"}
    assert set(read_all(tmp_path)) == {"case_id", "table", *(f"target.{name}" for name in FINDING)}


def test_fingerprint_depends_on_every_byte_and_on_nothing_else(tmp_path):
    first, second = (write(tmp_path / name, "age\n1\n2\n", image=images(2)) for name in ("one", "two"))
    (second / "cases.npz").write_bytes((first / "cases.npz").read_bytes())
    prints = [FolderCases.open(folder).fingerprint for folder in (first, second)]
    digests = [hashlib.sha256((first / name).read_bytes()).digest() for name in ("cases.npz", "record.csv")]
    assert prints == [hashlib.sha256(b"".join(digests)).hexdigest()] * 2
    (second / "record.csv").write_text("age\n1\n3\n")
    assert FolderCases.open(second).fingerprint != prints[0]


def test_example_of_the_documentation(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    example = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/data.md", "exec"), {})
    source = FolderCases.open("my_cases", split="val")
    assert source.ignored == () and source.splits == {"train": 16, "val": 4}
    batch = source.read_batch(np.arange(4))
    assert batch["case_id"] == ["p16", "p17", "p18", "p19"]
    assert batch["volume"].shape == (4, 51, 51, 51)
    np.testing.assert_array_equal(batch["volume_spacing"][3], np.float32([1.25, 0.7, 0.7]))
    np.testing.assert_array_equal(batch["target.nodule_present"], np.float32([0, 1, 0, 1]))
    assert all(f"`{name}`" in page for name in [*FINDING, *FIELDS]), "every name of the schema is in the table"


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_marked_parts(tmp_path, capsys):
    write(tmp_path, image=images(7), split=np.array([0, 0, 1, 2, 0, 1, 0], np.int8))
    rows = {split: read_all(tmp_path, split=split)["case_id"] for split in ("train", "val", "test", "all")}
    assert rows["train"] == ["000000", "000001", "000004", "000006"]
    assert rows["val"] == ["000002", "000005"]
    assert rows["test"] == ["000003"]
    assert len(rows["all"]) == 7
    assert FolderCases.open(tmp_path).splits == {"train": 4, "val": 2, "test": 1}
    assert capsys.readouterr() == ("", "")


def test_folds_partition_the_folder(tmp_path):
    write(tmp_path, image=images(23))
    held_out = [read_all(tmp_path, split="val", fold=fold)["case_id"] for fold in range(5)]
    for fold, names in enumerate(held_out):
        assert len(names) in (4, 5)
        train = read_all(tmp_path, split="train", fold=fold)["case_id"]
        assert sorted(train + names) == [f"{row:06d}" for row in range(23)]
    assert len({name for names in held_out for name in names}) == 23
    assert read_all(tmp_path, split="val")["case_id"] == held_out[0]
    assert read_all(tmp_path, split="val", fold=0, seed=1)["case_id"] != held_out[0]
    assert held_out[0] not in ([f"{row:06d}" for row in range(5)], [f"{row:06d}" for row in range(0, 23, 5)])  # drawn


def test_folds_keep_groups_together_and_sizes_even(tmp_path):
    group = np.repeat(np.arange(12), [9, 1, 1, 1, 2, 2, 3, 1, 1, 4, 1, 4])
    write(tmp_path, image=images(30), group=group)
    sizes = []
    for fold in range(3):
        rows = [int(name) for name in read_all(tmp_path, split="val", fold=fold, folds=3)["case_id"]]
        assert not set(group[rows]) & set(np.delete(group, rows))
        sizes.append(len(rows))
    assert sum(sizes) == 30 and max(sizes) - min(sizes) <= 9


def test_fold_instead_of_the_marks_never_touches_the_test_part(tmp_path):
    mark = np.array(["train", "val", "test", "train", "val", "train", "test", "train"])
    write(tmp_path, image=images(8), split=mark)
    seen = [read_all(tmp_path, split=split, fold=1, folds=3)["case_id"] for split in ("train", "val")]
    assert sorted(seen[0] + seen[1]) == ["000000", "000001", "000003", "000004", "000005", "000007"]
    assert read_all(tmp_path, split="test", fold=1)["case_id"] == ["000002", "000006"]


def test_a_cache_that_a_folder_of_arrays_does_not_use_is_said(tmp_path, capsys):
    write(tmp_path, image=images(), label=np.array([0, 1, 1, 0, 0, 1], np.uint8))
    for url in (None, "memory"):
        FolderCases.open(tmp_path, cache=CacheConfig(url=url))
    assert capsys.readouterr().err == ""
    FolderCases.open(tmp_path, cache=CacheConfig(url="lmdb:/nowhere"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"note: data.cache.url is 'lmdb:/nowhere', but {tmp_path} holds .npz files, which go through no"
    )


def test_test_part_of_an_unmarked_folder_is_everything_with_a_note(tmp_path, capsys):
    write(tmp_path, image=images(4))
    assert len(FolderCases.open(tmp_path, split="test")) == 4
    assert re.search("note: .*no case train, val or test.* all 4", capsys.readouterr().err)
    assert len(FolderCases.open(tmp_path, split="all")) == 4
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("mark", [np.full(4, 7), np.full(4, "holdout"), np.full(4, 2), np.full(4, "")])
def test_kept_back_folder_is_scored_whole(tmp_path, mark):
    write(tmp_path, image=images(4), split=mark)
    assert len(FolderCases.open(tmp_path, split="all")) == 4
    assert len(FolderCases.open(tmp_path, split="test")) == 4


def test_own_mark_is_a_part_too(tmp_path):
    write(tmp_path, image=images(4), split=np.array(["holdout", "train", "train", "holdout"]))
    assert read_all(tmp_path, split="holdout")["case_id"] == ["000000", "000003"]


def test_part_without_cases_lists_what_there_is(tmp_path):
    write(tmp_path, image=images(5), split=np.array([0, 0, 1, 0, 5]))
    refused(tmp_path, "'test'", "train 3", "val 1", "5 1", "--data.split", split="test")
    refused(tmp_path, "'vall'", "train 3", split="vall")
    refused(tmp_path, "''", split="")


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5), (0, 1), (0, 0)])
def test_fold_that_does_not_exist(tmp_path, fold, folds):
    refused(write(tmp_path, image=images()), "data.fold", str(folds), split="val", fold=fold, folds=folds)


def test_too_few_cases_for_the_folds(tmp_path):
    refused(
        write(tmp_path, image=images(), group=np.repeat([1, 2], 3)),
        "2 cases or groups",
        "3 folds",
        split="val",
        folds=3,
    )


# ---- random valid folders -------------------------------------------------------------------------------------------


@st.composite
def folders(draw):
    """Arrays, table and expectation of a valid folder of one or two archives."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(2, 7))
    kind = draw(st.sampled_from(["image", "volume"]))
    shape = (n, *rng.integers(1, 6, {"image": 2, "volume": 3}[kind]))
    if draw(st.booleans()):
        picture = rng.integers(0, 256, shape, np.uint8)
    else:
        picture = rng.integers(-2000, 3000, shape, np.int16)
    names = draw(
        st.lists(
            st.text("abcXYZ09._- 结节", min_size=1, max_size=8)
            .map(str.strip)
            .filter(lambda name: name not in ("", ".", "..")),
            min_size=n,
            max_size=n,
            unique=True,
        )
    )
    expected = {kind: picture, "case_id": names}
    arrays = {kind: picture, "case_id": np.array(names)}
    if draw(st.booleans()):
        expected["mask"] = rng.random(shape) < 0.5
        packed = np.packbits(expected["mask"].reshape(n, -1), axis=1)
        arrays["mask"] = packed if draw(st.booleans()) else expected["mask"].astype(rng.choice([np.uint8, bool]))
    columns = {}
    for name in draw(st.lists(st.sampled_from([*RATINGS, "age", "long_axis_mm", "nodule_present"]), unique=True)):
        top = len(FINDING[name].levels) if name in RATINGS else {"age": 120, "nodule_present": 1}.get(name, 50)
        values = rng.integers(0 if name in ("age", "nodule_present") else 1, top + 1, n).astype(np.float32)
        values[rng.random(n) < 0.3] = np.nan
        expected[f"target.{name}" if name in FINDING else name] = values
        if draw(st.booleans()):
            arrays[draw(st.sampled_from([name, f"target.{name}"])) if name in FINDING else name] = values
        else:
            columns[name] = ["" if np.isnan(value) else f"{value:g}" for value in values]
    if draw(st.booleans()):
        alphabet = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))
        expected["text"] = [text.strip() for text in draw(st.lists(st.text(alphabet), min_size=n, max_size=n))]
        columns["text"] = expected["text"]
    by_name, order = draw(st.booleans()), np.arange(n)
    if by_name:
        order = rng.permutation(n)
        columns["case_id"] = names
    cut = draw(st.integers(1, n))
    return arrays, columns, order, cut, expected


@settings(max_examples=60)
@given(folders())
def test_round_trip(tmp_path_factory, made):
    arrays, columns, order, cut, expected = made
    folder = tmp_path_factory.mktemp("folder")
    n = len(expected["case_id"])
    write(folder, name="1.npz", **{name: array[:cut] for name, array in arrays.items()})
    if cut < n:
        write(folder, name="2.npz", **{name: array[cut:] for name, array in arrays.items()})
    if any(name != "case_id" for name in columns):
        with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([values[row] for values in columns.values()] for row in order)
    batch = read_all(folder)
    for name, values in expected.items():
        found = batch["table"][:, FIELDS.index(name)] if name in FIELDS else batch[name]
        np.testing.assert_array_equal(found, values)
    backwards = FolderCases.open(folder).read_batch(np.arange(n)[::-1].copy())
    for name, values in batch.items():
        np.testing.assert_array_equal(backwards[name], values[::-1])


# ---- the real sets --------------------------------------------------------------------------------------------------


def test_luna16(shared_data):
    folder = shared_data / "luna16_fpr_2d"
    for split, cases, nodules in (("train", 5757, 989), ("val", 745, 114), ("all", 6502, 1103)):
        source = FolderCases.open(folder, split=split)
        batch = source.read_batch(np.arange(len(source)))
        assert (len(source), batch["target.nodule_present"].sum()) == (cases, nodules)
        assert batch["image"].shape == (cases, 50, 50) and batch["image"].dtype == np.uint8
    refused(folder, "train 5757, val 745", split="test")


def test_lidc(shared_data):
    source = FolderCases.open(shared_data / "lidc_3d_134")
    batch = source.read_batch(np.arange(len(source)))
    assert len(source) == 108 and batch["volume"].shape == (108, 51, 51, 51)
    voxels = batch["mask"].sum(axis=(1, 2, 3))
    assert (voxels.min(), voxels.max(), np.median(voxels)) == (87, 13240, 536.5)
    known = [name for name in FINDING if not np.isnan(batch[f"target.{name}"]).any()]
    assert sorted(known) == sorted(set(RATINGS) - {"calcification"}) and len(known) == 7
    with (shared_data / "lidc_3d_134" / "ratings.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in known:
        column = "malignancy" if name == "malignancy_rating" else name
        np.testing.assert_array_equal(batch[f"target.{name}"], [float(row[column]) for row in rows])
    parts = [FolderCases.open(shared_data / "lidc_3d_134", split="val", fold=fold) for fold in range(5)]
    assert sorted(len(part) for part in parts) == [21, 21, 22, 22, 22]


def test_parts_share_pixels_and_cache(tmp_path):
    folder = write(tmp_path / "cases", image=images(8), split=np.arange(8) % 2)
    train = FolderCases.open(folder, "train")
    val = train.part("val")
    opened = FolderCases.open(folder, "val")
    assert val.cases is train.cases and val.name == opened.name and val.fingerprint == opened.fingerprint
    np.testing.assert_array_equal(val.read_batch(np.arange(4))["image"], opened.read_batch(np.arange(4))["image"])
    assert val.part("all").rows.tolist() == list(range(8))
