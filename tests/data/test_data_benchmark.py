"""The benchmark of reading runs, compares what was read with the cases, and the documents claim what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, data_readers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return data.make(tmp_path_factory.mktemp("cases") / "set", "image", 96)


def test_a_wrong_batch_ends_the_benchmark(cases):
    check = data.checker(cases)
    rows = [data_readers.ParquetRows(cases)[index] for index in (5, 95, 0)]
    check(data_readers.stacked(rows))
    for name, wrong in (("picture", rows[0]["picture"] + np.int16(1)), ("text", "else")):
        with pytest.raises(SystemExit, match="read wrong"):
            check(data_readers.stacked([rows[0] | {name: wrong}]))
    with pytest.raises(AssertionError):
        check(data_readers.stacked([rows[0] | {"table": rows[1]["table"]}]))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # WebDataset leaves its files open
def test_a_pass_of_every_reader_gives_each_case_at_most_once(cases):
    known = data.variants(cases, None, None)
    for name, open_ in known.items():
        if "2 workers" in name:
            continue  # forking a process with JAX in it is warned of
        with data.ExitStack() as stack:
            batches = list(open_(stack, {})())
        seen = [case for batch in batches for case in batch["case_id"]]
        assert len(seen) == len(set(seen)) == 96, name
        for batch in batches:
            data.checker(cases)(batch)


@pytest.mark.slow
def test_the_benchmark_runs_and_its_report_becomes_a_table(tmp_path):
    words = ["--scale", "0.02", "--repeats", "1", "--seconds", "0.1", "--training", "0"]
    words += ["--output", str(tmp_path / "data.json")]
    subprocess.run([sys.executable, "benchmarks/data.py", *words], cwd=ROOT, check=True, capture_output=True)
    report = json.loads((tmp_path / "data.json").read_text("utf-8"))
    assert set(report["sets"]) == {"image", "volume"}
    told = data.table(report)
    for part in report["sets"].values():
        for name in part["readers"]:
            assert f"| {name} |" in told


def test_what_the_documents_claim_was_measured():
    report = json.loads((ROOT / "benchmarks/results/data.json").read_text("utf-8"))
    assert report["sets"].keys() == data.ROWS.keys() and not report["absent"]
    for part in report["sets"].values():
        later = {name: figures["later"]["median"] for name, figures in part["readers"].items()}
        for place in ("local", "HDFS"):
            for room in ("all fits", "a third fits"):
                ours = later[f"r1jax, window, {room}, {place}"]
                assert ours >= 10 * later[f"grain, one element at a time, {place}"]
        peers = [rate for name, rate in later.items() if not name.startswith("r1jax")]
        assert later["r1jax, global, all fits, in the asking thread, local"] > max(peers)
        assert later["r1jax, window, all fits, in the asking thread, local"] > max(peers)
    for name, figures in report["training"]["runs"].items():
        assert figures["waited"] < 0.02, name
