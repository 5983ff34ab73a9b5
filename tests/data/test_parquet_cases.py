import pickle
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1jax.data.card import CARD
from r1jax.data.folder import FolderCases, folder_fingerprint
from r1jax.data.loader import training_batches
from r1jax.data.order import GlobalOrder
from r1jax.data.parquet import ParquetStore
from r1jax.data.parquet_cases import stored_rows, stored_schema
from r1jax.data.shards import write_shards
from tests.data.folders import images, refused
from tests.data.folders import write as write_folder
from tests.data.parquet_sets import ORIGIN


def volumes(total: int, dtype: type = np.int16) -> np.ndarray:
    draw = np.random.default_rng(total)
    return draw.integers(0, 255, (total, 4, 5, 6)).astype(dtype)


FOLDERS = {
    "everything": dict(
        image=images(12) / 255.0,
        volume=volumes(12),
        mask=np.packbits(np.random.default_rng(2).integers(0, 2, (12, 120)), axis=1),
        spacing=np.array([1.25, 0.7, 0.7]),
        has_image=np.arange(12) % 2,
        case_id=[f"病例 {n}" for n in range(12)],
        group=np.arange(12) // 2,
        split=np.arange(12) % 3,
        label=np.where(np.arange(12) % 4, 1.0, np.nan),
        center_mm=np.random.default_rng(0).random((12, 3)),
        age=np.where(np.arange(12) % 3, 50.0, np.nan),
        text=[f"咳嗽 {n}" if n % 2 else "" for n in range(12)],
    ),
    "pictures alone": dict(image=images(9)),
    "records alone": dict(age=np.arange(20, 30), malignancy=np.arange(10) % 2, case_id=np.arange(10)),
    "plain masks": dict(volume=volumes(6, np.uint8), mask=volumes(6) > 100, malignancy_rating=np.arange(6) % 5 + 1),
}


def convert(folder: Path, url: str | Path, hold: bool = False) -> str:
    """Writes a folder as Parquet, with files of several row groups."""
    cases = FolderCases.open(folder, hold=hold).cases
    total = len(cases.case_id)
    schema = stored_schema(cases)
    write_shards(str(url), schema, lambda n: stored_rows(cases, n), total, ORIGIN, group_rows=2, shard_rows=6)
    return str(url)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert type(values) is type(other[name])
        if isinstance(values, np.ndarray):
            assert values.dtype == other[name].dtype
        np.testing.assert_array_equal(values, other[name])


@pytest.mark.parametrize("name", FOLDERS)
def test_batches_are_the_same_as_those_of_the_folder(tmp_path, name):
    folder = write_folder(tmp_path / "cases", **FOLDERS[name])
    url = convert(folder, tmp_path / "parquet")
    for split in ("train", "val", "all"):
        wanted, found = FolderCases.open(folder, split), FolderCases.open(url, split)
        assert found.schema == wanted.schema and found.splits == wanted.splits
        assert found.known_findings() == wanted.known_findings()
        assert found.rows.tolist() == wanted.rows.tolist()
        indices = np.random.default_rng(0).integers(0, len(wanted), 2 * len(wanted))
        assert_same(wanted.read_batch(indices), pickle.loads(pickle.dumps(found)).read_batch(indices))
    for fold in (0, 2):
        wanted, found = (FolderCases.open(path, "val", fold=fold, folds=3, seed=7) for path in (folder, url))
        assert found.rows.tolist() == wanted.rows.tolist()


def test_several_archives_and_a_table_are_converted_one_archive_at_a_time(tmp_path):
    folder = write_folder(tmp_path / "cases", name="a.npz", volume=volumes(5), case_id=list("abcde"), label=[0] * 5)
    write_folder(folder, name="b.npz", volume=volumes(7, np.uint8), case_id=list("fghijkl"))
    write_folder(folder, "case_id,age\nf,50\na,60\n", name="c.npz", volume=volumes(3) / 255.0, case_id=list("mno"))
    streamed = FolderCases.open(folder, hold=False).cases
    for rows in (range(15), [14, 0, 6], [5]):
        for found, wanted in zip(
            streamed.pictures.read(np.array(rows)).items(),
            FolderCases.open(folder).cases.pictures.read(np.array(rows)).items(),
            strict=True,
        ):
            assert found[0] == wanted[0] and found[1].dtype == wanted[1].dtype
            np.testing.assert_array_equal(found[1], wanted[1])
        assert len(streamed.pictures.latest) == 1  # type: ignore[attr-defined]
    for hold in (True, False):
        url = convert(folder, tmp_path / f"parquet-{hold}", hold)
        everything = [FolderCases.open(path).read_batch(np.arange(15)) for path in (folder, url)]
        assert_same(*everything)
    one, other = (ParquetStore.open(str(tmp_path / f"parquet-{hold}")).fingerprint for hold in (True, False))
    assert one == other == folder_fingerprint(url)


def test_pixels_are_checked_when_they_are_converted(tmp_path):
    bad = volumes(4).astype(np.float32)
    bad[2, 0, 0, 0] = np.nan
    folder = write_folder(tmp_path / "cases", volume=bad)
    refused(folder, "row 2", "not finite", hold=False)


def test_small_columns_are_checked_with_the_words_of_a_folder(tmp_path):
    def open_with(**columns) -> None:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table(columns), path, write_page_checksum=True)

    url = tmp_path / "x.parquet"
    open_with(age=[50, 60], case_id=["a", "a"])
    refused(url, "array 'case_id' of x.parquet at row 1", "repeats the case 'a'")
    open_with(age=[50, 600])
    refused(url, "array 'age' of x.parquet at row 1 is 600", "age takes 0 to")
    open_with(age=["fifty", "60"])
    refused(url, "'age' of x.parquet", "numbers are needed")
    open_with(text=[0.5, 1.0])
    refused(url, "'text' of x.parquet", "strings or whole numbers are needed")
    open_with(age=[None, 50.0], case_id=["a", "b"])
    refused(url, "case 'a' (row 0 of x.parquet) has neither a picture nor a record")
    open_with(label=[0], nodule_present=[1])
    refused(url, "nodule_present twice")
    open_with(colour=[1])
    refused(url, "none of the columns", "colour")
    open_with(image=[b"abc"])
    refused(url, "column 'image' of x.parquet is bytes", "r1jax data convert")
    open_with(age=[50], when=pa.array([1], pa.timestamp("s")), colour=["red"])
    source = FolderCases.open(url)
    assert source.ignored == ("when", "colour") and "not used: when, colour" in source.name
    assert source.read_batch(np.array([0]))["table"][0, 0] == 50


def test_folders_of_partitions_mark_the_parts(tmp_path):
    for split, age in (("train", 50), ("val", 60)):
        (tmp_path / f"split={split}").mkdir()
        pq.write_table(pa.table({"age": [age, age]}), tmp_path / f"split={split}" / "x.parquet")
    source = FolderCases.open(tmp_path, "val")
    assert len(source) == 2 and source.read_batch(np.array([1]))["table"][0, 0] == 60
    assert "no page checksums in split=train/x.parquet and 1 more" in source.name


def test_a_picture_that_is_not_there_is_never_a_black_one(tmp_path):
    folder = write_folder(tmp_path / "cases", image=images(4))
    url = convert(folder, tmp_path / "parquet")
    path = Path(url) / "part-00000.parquet"
    table = pq.read_table(path)
    column = pa.array([None, *table.column("image").to_pylist()[1:]], pa.binary())
    pq.write_table(table.set_column(1, table.schema.field("image"), column), path)
    (Path(url) / CARD).unlink()
    source = FolderCases.open(url)
    refused_read = pytest.raises(Exception, match="row 0 has no image.*has_image")
    with refused_read:
        source.read_batch(np.array([1, 0]))
    assert source.read_batch(np.array([1]))["image"].any()


def test_a_folder_with_both_kinds_of_files_is_refused(tmp_path):
    folder = write_folder(tmp_path / "cases", image=images(4))
    convert(folder, folder / "parquet")
    assert len(FolderCases.open(folder)) == 4  # folders below do not count
    (folder / "parquet/part-00000.parquet").rename(folder / "part-00000.parquet")
    refused(folder, "holds .npz and .parquet files")


def test_training_reads_the_same_batches_from_hdfs(tmp_path, hdfs):
    folder = write_folder(tmp_path / "cases", **FOLDERS["everything"])
    url = convert(folder, f"{hdfs.url}/{tmp_path.name}")

    def collate(raw: dict) -> dict[str, np.ndarray]:
        return {name: np.asarray(values) for name, values in raw.items()}

    def batches(path, start: int) -> list[dict]:
        source = FolderCases.open(path, "train")
        order = GlobalOrder(len(source), 3, seed=1)
        with closing(training_batches(source, collate, order, start=start, threads=2)) as found:
            return [next(found) for _ in range(4)]

    wanted = batches(folder, 0) + batches(folder, 4)
    hdfs.kill_datanode()
    hdfs.start_datanode()
    for one, other in zip(wanted, batches(url, 0) + batches(url, 4), strict=True):
        assert_same(one, other)
