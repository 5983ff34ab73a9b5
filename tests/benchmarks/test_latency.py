"""The benchmark of scoring one payment: what its processes are given, and the tables of what they took."""

import json
from dataclasses import replace

import numpy as np

from benchmarks import latency_child
from benchmarks.latency import TITLES, part, table, write_rows
from r1jax.data.transaction_history import History
from r1jax.data.transaction_rows import parse, records, take
from r1jax.data.transaction_state import KeptHistory
from r1jax.data.transactions import DAY, Names
from tests.data.streams import draw_table


def test_a_process_goes_on_from_the_history_that_it_is_left(tmp_path):
    stream = draw_table(rows=40, unknown=0.0)
    for name, rows in (("earlier.jsonl", slice(0, 30)), ("rows.jsonl", slice(30, 40))):
        write_rows(part(stream, rows), tmp_path / name)
    kept = KeptHistory(tmp_path / "history.state", 7 * DAY, 64)
    with (tmp_path / "earlier.jsonl").open() as lines:
        for record, fraud in zip(records(lines), stream.fraud, strict=False):
            take(kept.live, parse(record, Names())._replace(fraud=bool(fraud)))
    kept.save()
    kept.close()
    (tmp_path / "history.json").write_text(json.dumps({"delay": 7 * DAY, "events": 64}))
    predict, _ = latency_child.WAYS["history"](str(tmp_path), "a run")
    known = np.where(np.arange(40) < 30, stream.fraud, np.float32(np.nan))  # no label comes later
    wanted = History(replace(stream, fraud=known), 7 * DAY, 64)
    for row in range(30, 40):
        features, streams = predict()
        np.testing.assert_array_equal(features[0], wanted.features[row])
        np.testing.assert_array_equal(streams.states[0], wanted.streams(np.array([row])).states[0])


def test_the_tables_have_a_row_for_each_way_and_a_column_for_each_size():
    row = {"ms": {"p50": 1.5, "p99": 3.0, "best": 1.0, "mean": 1.6}, "per_second": 625.0, "peak_bytes": 4e8}
    report = {"ways": {TITLES["model"]: row}, "throughput": {"1": 700.0, "4096": 123456.0}}
    lines = table(report).splitlines()
    assert lines[2] == "| r1jax | 1.500 | 3.000 | 1.000 | 625 | 400 |"
    assert lines[4:] == ["| batch of the model alone | 1 | 4096 |", "|---|---|---|", "| payments/s | 700 | 123,456 |"]
    assert table(report | {"ways": {}}).splitlines() == lines[4:]
    assert set(TITLES) == set(latency_child.WAYS)
