import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1jax.data import bounded
from r1jax.data.parquet import ParquetStore
from r1jax.data.schema import Field
from r1jax.data.shards import write_shards
from r1jax.errors import UserError
from tests.data.parquet_sets import ORIGIN, SCHEMA, assert_rows, read_everything, refused, row, write


@pytest.fixture(params=["disk", "hdfs", "s3"])
def place(request, tmp_path) -> str:
    """URL of a folder that is not there yet."""
    if request.param == "disk":
        return str(tmp_path / "folder")
    base = request.getfixturevalue("hdfs").url if request.param == "hdfs" else request.getfixturevalue("s3_url")
    return f"{base}/{tmp_path.name}"


def test_rows_come_back_from_every_place_as_they_were_written(place, tmp_path):
    write(place)
    store = pickle.loads(pickle.dumps(ParquetStore.open(place)))
    assert store.schema == SCHEMA and len(store) == 50 and store.remarks == ()
    assert store.starts.tolist() == [0, 8, 16, 24, 32, 40, 48, 50]
    assert_rows(read_everything(place), range(50))
    blocks = [5, 0, 5, 6]
    for batch, block in zip(store.read_blocks(blocks), blocks, strict=True):
        assert_rows(batch, range(*store.starts[block : block + 2]))
    ages = store.read_columns(["age", "target.size"])
    assert list(ages) == ["age", "target.size"] and ages["target.size"].tolist() == list(range(50))
    write(tmp_path / "twin")
    assert ParquetStore.open(str(tmp_path / "twin")).fingerprint == store.fingerprint  # wherever the files lie


def test_only_the_columns_asked_for_are_read(tmp_path, monkeypatch):
    write(tmp_path / "x")
    whole = ParquetStore.open(str(tmp_path / "x"))
    store = ParquetStore.open(str(tmp_path / "x"), ["age", "case_id"])
    assert store.schema.names == ("case_id", "age")
    assert whole.select(["age", "case_id"]).schema == store.schema
    assert len({store.fingerprint, whole.fingerprint, whole.select(["age"]).fingerprint}) == 3
    seen = []
    read = store.files.read_many
    monkeypatch.setattr(store.files, "read_many", lambda wanted: seen.extend(wanted) or read(wanted))
    assert_rows(store.read_blocks([1])[0], range(8, 16), store.schema)
    tested = ParquetStore.open(str(tmp_path / "x"), lambda name: name.startswith("t"))
    assert tested.schema.names == ("text", "target.size")
    refused(lambda: ParquetStore.open(str(tmp_path / "x"), ["agee"]), "'agee'", "did you mean 'age'")
    refused(lambda: store.select(["volume"]), "volume")


def test_bytes_of_a_file_are_asked_for_together(tmp_path, monkeypatch):
    write(tmp_path / "x")
    store = ParquetStore.open(str(tmp_path / "x"))
    seen = []
    read = store.files.read_many
    monkeypatch.setattr(store.files, "read_many", lambda wanted: seen.extend(wanted) or read(wanted))
    store.read_blocks(range(7))
    assert [(name, len(ranges)) for name, ranges in seen] == [(f"part-0000{n}.parquet", 1) for n in range(3)]


def test_threads_read_the_same_rows(place):
    write(place)
    store = ParquetStore.open(place)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: store.read_blocks([n % 7, 3])[0], range(40)))
    for number, batch in enumerate(answers):
        assert_rows(batch, range(*store.starts[number % 7 : number % 7 + 2]))


def test_a_single_file_is_a_data_set_too(tmp_path):
    write(tmp_path / "x")
    store = ParquetStore.open(str(tmp_path / "x/part-00001.parquet"))
    assert len(store) == 24 and store.remarks == ()
    assert_rows(store.read_blocks([0])[0], range(24, 32))


def test_any_flipped_bit_is_seen(tmp_path):
    """Anywhere in what is read: pages, their heads (which Parquet's own sums leave out), the footer."""
    write(tmp_path / "x", 16, group_rows=8, shard_rows=8)
    path = tmp_path / "x/part-00001.parquet"
    good, draw = path.read_bytes(), np.random.default_rng(0)
    metadata = pq.read_metadata(path)
    group = metadata.row_group(0)
    pages = group.column(0).dictionary_page_offset
    end = pages + sum(group.column(column).total_compressed_size for column in range(group.num_columns))
    read = np.r_[pages:end, len(good) - metadata.serialized_size - 8 : len(good)]
    seen = 0
    for place in np.concatenate([draw.choice(np.arange(pages, end), 150), draw.choice(read, 100)]).tolist():
        bad = bytearray(good)
        bad[place] ^= 1 << draw.integers(8)
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"part-00001\.parquet.*(row group 0 is damaged|footer|no Parquet file)"):
            read_everything(tmp_path / "x")
        seen += 1
    assert seen == 250
    path.write_bytes(good)
    assert_rows(read_everything(tmp_path / "x"), range(16))


def test_flipped_pages_of_other_writers_are_seen_by_their_own_sums(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"a": np.random.default_rng(0).random(5000)})
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False)
    store = ParquetStore.open(str(path))
    assert store.remarks == () and len(store) == 5000
    good, column = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0)
    first = column.data_page_offset + 64  # behind the head
    for place in np.random.default_rng(1).integers(first, first + column.total_compressed_size - 200, 100).tolist():
        bad = bytearray(good)
        bad[place] ^= 4
        path.write_bytes(bad)
        refused(lambda: read_everything(path), "x.parquet", "row group 0 is damaged")


def test_files_without_sums_are_remarked_upon(tmp_path):
    for name in "abc":
        pq.write_table(pa.table({"a": [1.0, 2.0]}), tmp_path / f"{name}.parquet", write_page_checksum=name == "a")
    (remark,) = ParquetStore.open(str(tmp_path)).remarks
    assert "no page checksums in b.parquet and 1 more" in remark


@pytest.mark.parametrize("left", [0, 3, 11, 200, -9, -1])
def test_files_cut_short_are_named(tmp_path, left):
    write(tmp_path / "x")
    path = tmp_path / "x/part-00001.parquet"
    content = path.read_bytes()[:left]
    path.write_bytes(content)
    refused(lambda: ParquetStore.open(str(tmp_path / "x")), "part-00001.parquet", "bytes where dataset.json says")
    (tmp_path / "x/dataset.json").unlink()
    refused(lambda: ParquetStore.open(str(tmp_path / "x")), "part-00001.parquet", "cut short or no Parquet file")


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path):
    write(tmp_path / "x")
    store = ParquetStore.open(str(tmp_path / "x"))
    path = tmp_path / "x/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    refused(lambda: store.read_blocks([4]), "part-00001.parquet", "row group 1 is damaged", "copy the file again")


def test_files_must_be_those_of_the_card(tmp_path):
    write(tmp_path / "x")
    folder = tmp_path / "x"
    shutil.copy(folder / "part-00000.parquet", folder / "more.parquet")
    refused(lambda: ParquetStore.open(str(folder)), "more.parquet is not in dataset.json")
    (folder / "more.parquet").unlink()
    (folder / "part-00002.parquet").rename(tmp_path / "elsewhere")
    refused(lambda: ParquetStore.open(str(folder)), "part-00002.parquet is missing")
    (folder / "dataset.json").write_text("{}")
    refused(lambda: ParquetStore.open(str(folder)), "dataset.json is damaged")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": pa.array([1])}, ("b.parquet has no column 'w'", "a.parquet has")),
        ({"a": pa.array([1]), "w": pa.array(["x"]), "z": pa.array([1])}, ("a.parquet has no column 'z'",)),
        (
            {"a": pa.array(["1"]), "w": pa.array(["x"])},
            ("b.parquet", "column 'a' is text", "number int64 in a.parquet"),
        ),
        ({"a": pa.array([1]), "w": pa.array([[1]])}, ("b.parquet", "column 'w' is list<", "numbers, strings")),
    ],
)
def test_files_that_do_not_fit_together_are_named_with_the_column(tmp_path, other, words):
    pq.write_table(pa.table({"a": [1], "w": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table(other), tmp_path / "b.parquet")
    refused(lambda: ParquetStore.open(str(tmp_path)), *words)


def test_folders_that_say_a_value_become_a_column(tmp_path):
    for value, numbers in (("train", [1, 2]), ("a%20b", [3]), ("__HIVE_DEFAULT_PARTITION__", [4])):
        folder = tmp_path / f"split={value}"
        folder.mkdir()
        pq.write_table(pa.table({"n": numbers}), folder / "x.parquet")
    store = ParquetStore.open(str(tmp_path))
    assert store.schema.fields[1] == Field("split", "category")
    assert store.read_columns(["n", "split"])["split"] == ["", "a b", "train", "train"]
    assert ParquetStore.open(str(tmp_path), ["split"]).schema.names == ("split",)
    pq.write_table(pa.table({"n": [1], "split": ["x"]}), tmp_path / "split=train/x.parquet")
    refused(lambda: ParquetStore.open(str(tmp_path)), "split=train/x.parquet", "'split' is in the file and in the name")


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    compression=st.sampled_from(["zstd", "snappy", "none"]),
    dictionary=st.booleans(),
)
def test_files_of_other_writers_are_read_as_pyarrow_reads_them(tmp_path_factory, groups, compression, dictionary):
    folder = tmp_path_factory.mktemp("foreign")
    draw = np.random.default_rng(len(groups))
    tables = [
        pa.table(
            {
                "f": draw.random(rows).astype(np.float32),
                "n": pa.array([None if n == 1 else n for n in range(rows)], pa.int16()),
                "t": pa.array([f"t{n}" for n in range(rows)], pa.large_string()),
                "b": pa.array([bytes([n]) for n in range(rows)], pa.binary()),
                "c": pa.array(["x", "y", None, "x", "z"][:rows], pa.string()).dictionary_encode(),
                "on": pa.array([n % 2 == 0 for n in range(rows)], pa.bool_()),
            }
        )
        for rows in groups
    ]
    with pq.ParquetWriter(
        folder / "x.parquet", tables[0].schema, compression=compression, use_dictionary=dictionary
    ) as out:
        for table in tables:
            out.write_table(table)
    store = ParquetStore.open(str(folder))
    assert len(store) == sum(groups)
    found = store.schema.decode(pa.Table.from_batches(store.read_blocks(range(len(store.groups))), store.schema.arrow))
    wanted = pq.read_table(folder / "x.parquet").to_pydict()
    for name in ("f", "on"):
        assert np.asarray(found[name]).tolist() == wanted[name]
    assert found["b"] == wanted["b"] and found["t"] == wanted["t"]
    assert found["c"] == [value or "" for value in wanted["c"]]
    assert [None if np.isnan(n) else int(n) for n in found["n"]] == wanted["n"]


def test_a_file_written_again_changes_the_fingerprint(place):
    write(place, 30, shard_rows=16)
    store = ParquetStore.open(place)
    twin = [dict(row(number), age=np.float32(3)) for number in range(30)]
    store.files.remove("dataset.json")
    bare = ParquetStore.open(place)
    assert bare.fingerprint != store.fingerprint
    assert ParquetStore.open(place).fingerprint == bare.fingerprint
    content = store.files.read_all("part-00001.parquet")
    store.files.publish("part-00001.parquet", content)
    if not place.startswith("s3:"):  # there the mark is the sum of the content
        assert ParquetStore.open(place).fingerprint != bare.fingerprint
    for name in ("part-00000.parquet", "part-00001.parquet"):
        store.files.remove(name)
    write_shards(place, SCHEMA, lambda start: iter(twin[start:]), 30, ORIGIN, group_rows=8, shard_rows=16)
    assert ParquetStore.open(place).fingerprint not in (store.fingerprint, bare.fingerprint)


def test_a_dead_datanode_is_an_error_in_time_and_its_return_is_enough(hdfs, tmp_path, monkeypatch, capsys):
    place = f"{hdfs.url}/{tmp_path.name}"
    write(place)
    store = ParquetStore.open(place)
    monkeypatch.setattr(bounded, "TIMEOUT_S", 1.5)
    hdfs.kill_datanode()
    try:
        refused(lambda: store.read_blocks([4]), f"{place}/part-00001.parquet", "check the server")
        assert "trying again" in capsys.readouterr().err
    finally:
        hdfs.start_datanode()
    assert_rows(store.read_blocks([4])[0], range(32, 40))
    node = hdfs.nodes["datanode.DataNode"]
    node.send_signal(signal.SIGSTOP)
    try:
        refused(lambda: store.read_blocks([1]), f"{place}/part-00000.parquet", "no answer within 1.5 s")
    finally:
        node.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    assert_rows(store.read_blocks([1])[0], range(8, 16))


def test_reading_waits_for_a_datanode_that_restarts(hdfs, tmp_path):
    place = f"{hdfs.url}/{tmp_path.name}"
    write(place)
    store = ParquetStore.open(place)
    hdfs.kill_datanode()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(store.read_blocks, [4])
        hdfs.start_datanode()
        assert_rows(answer.result(timeout=200)[0], range(32, 40))


def test_a_server_that_takes_connections_and_says_nothing_is_an_error_in_time(monkeypatch, s3_url):
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(4)
        monkeypatch.setattr(bounded, "TIMEOUT_S", 1.0)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        refused(lambda: ParquetStore.open("s3://bucket/x"), "s3://bucket/x", "within 1 s", "check the server")
