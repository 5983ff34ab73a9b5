"""Files of real data sets are read as they are: the numbers of their descriptions come out."""

import wave
import zipfile

import numpy as np
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
from PIL import Image

from r1jax.data.formats import open_format


def test_class_folders_of_photographs(shared_data, tmp_path):
    with zipfile.ZipFile(shared_data / "tiny_imagenet_30/images.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")]
        archive.extractall(tmp_path, names[::100])
    source = open_format("auto", tmp_path / "train", form="pixels")
    assert len(source) == len(names[::100]) == 150
    batch = source.read_batch(np.arange(150))
    assert batch["image"].shape == (150, 64, 64, 3) and len(set(batch["label"])) == 30
    with Image.open(tmp_path / "train" / batch["case_id"][7]) as image:
        np.testing.assert_array_equal(batch["image"][7], np.asarray(image.convert("RGB")))
    whole = open_format("images", tmp_path / "train").read_batch(np.array([7]))["image"][0]
    assert whole == (tmp_path / "train" / batch["case_id"][7]).read_bytes()


def test_an_archive_of_several_parts(shared_data):
    source = open_format(
        "npz", shared_data / "pneumoniamnist/pneumoniamnist.npz", arrays=["train_images", "train_labels"]
    )
    batch = source.read_batch(np.arange(len(source)))
    assert batch["train_images"].shape == (4708, 28, 28)
    assert np.bincount(batch["train_labels"]).tolist() == [1214, 3494]


def test_recordings(shared_data, tmp_path):
    with np.load(shared_data / "fsdd/fsdd.npz") as stored:
        audio, offset, digit, speaker = (stored[name] for name in ("audio", "offset", "digit", "speaker"))
    chosen = range(0, 2500, 77)
    for k in chosen:
        with wave.open(str(tmp_path / f"{digit[k]}_{speaker[k]}_{k}.wav"), "wb") as out:
            out.setparams((1, 2, 8000, 0, "NONE", ""))
            out.writeframes(audio[offset[k] : offset[k + 1]].tobytes())
    source = open_format("auto", tmp_path, pattern=r"(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<row>\d+)")
    batch = source.read_batch(np.arange(len(source)))
    assert len(source) == len(chosen) and set(batch["speaker"]) == set(speaker[list(chosen)].tolist())
    for row, samples in zip(map(int, batch["row"]), batch["audio"], strict=True):
        np.testing.assert_array_equal(samples, audio[offset[row] : offset[row + 1]] / np.float32(2**15))


def test_a_table_of_customers(shared_data, tmp_path):
    table = pq.read_table(shared_data / "uci_default/uci_default.parquet")
    arrow_csv.write_csv(table, tmp_path / "uci.csv")
    source = open_format("auto", tmp_path / "uci.csv", case_id="ID")
    assert len(source) == 24_084 and {field.kind for field in source.schema.fields[1:]} == {"number"}
    batch = source.read_batch(np.arange(len(source)))
    for name in source.schema.names[1:]:
        np.testing.assert_array_equal(batch[name], table.column(name).to_numpy())


def test_reports_of_radiologists(shared_data):
    source = open_format("csv", shared_data / "indiana_reports/reports.csv", case_id="uid")
    kinds = {field.name: field.kind for field in source.schema.fields}
    assert len(source) == 3082 and kinds["findings"] == kinds["impression"] == "text"
    findings = source.read_batch(np.arange(3082))["findings"]
    assert sum(text != "" for text in findings) == 2662


def test_runs_of_a_testbed(shared_data, tmp_path):
    table = pq.read_table(shared_data / "skab/skab.parquet").to_pandas()
    table.to_csv(tmp_path / "skab.csv", index=False)
    channels = [name for name in table.columns if name not in ("file", "datetime", "anomaly", "changepoint")]
    source = open_format("series", tmp_path / "skab.csv", unit="file", time="datetime", channels=channels)
    assert source.channels["series"] == tuple(channels) and len(source) == table.file.nunique()
    batch = source.read_batch(np.arange(len(source)))
    for unit, values, times in zip(batch["case_id"], batch["series"], batch["time"], strict=True):
        want = table[table.file == unit].sort_values("datetime", kind="stable")
        np.testing.assert_array_equal(values, want[channels].to_numpy(np.float32))
        assert len(times) == len(want) and (np.diff(times) > 0).all()


def test_engines_until_they_fail(shared_data, tmp_path):
    table = pq.read_table(shared_data / "cmapss/train_FD001.parquet")
    arrow_csv.write_csv(table, tmp_path / "fd001.csv")
    source = open_format("series", tmp_path / "fd001.csv", time="cycle")
    assert len(source) == 100
    batch = source.read_batch(np.arange(100))
    assert sum(map(len, batch["series"])) == table.num_rows == 20_631
    assert all(values.shape[1] == 25 for values in batch["series"])  # settings, sensors and remaining life
