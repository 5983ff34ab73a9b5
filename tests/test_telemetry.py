import json
import struct
import time

import pytest
from tensorboardX.proto.event_pb2 import Event

from r1jax.telemetry import Load, Telemetry
from r1jax.train.goodput import Clock


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, start, steps, total=20, extra=0.0):
    telemetry = Telemetry(folder, steps=total, start=start, batch_size=4, clock=Clock(folder))
    for step in steps:
        telemetry.log(step, {"loss": step + extra, "validation.both.auc": 0.5})
        telemetry.advance(step, "loss 1")
    telemetry.close()


def events(folder):
    """Events of all TensorBoard files, read by the format: length, its checksum, data, its checksum."""
    found = []
    for path in sorted((folder / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            assert len(data) >= 16 + length, "the file is cut short"
            data = data[16 + length :]
    return found


def test_rows_and_events(tmp_path):
    write(tmp_path, 0, [1, 2])
    assert rows(tmp_path) == [{"step": s, "loss": s, "validation.both.auc": 0.5} for s in (1, 2)]
    scalars = {(e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert scalars == {(s, tag): v for s in (1, 2) for tag, v in (("loss", s), ("validation/both.auc", 0.5))}


@pytest.mark.parametrize("days", [-40, 40])
def test_a_clock_that_is_set_anew_stops_nothing(tmp_path, monkeypatch, days):
    telemetry, now = Telemetry(tmp_path, steps=100, start=0, batch_size=4, clock=Clock(tmp_path)), time.time()
    for step in range(1, 61):
        if step == 20:
            monkeypatch.setattr("time.time", lambda: now + days * 86400)
        telemetry.log(step, {"loss": float(step)})
        assert [e.step for e in events(tmp_path)][-1] == step, "a row reaches TensorBoard's file before the next step"
    telemetry.close()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 61))


def test_lists_go_to_the_rows_alone(tmp_path):
    telemetry = Telemetry(tmp_path, steps=3, start=0, batch_size=4, clock=Clock(tmp_path))
    telemetry.log(1, {"loss": 2.0, "load": [3.0, 4.0]})
    telemetry.close()
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0, "load": [3.0, 4.0]}]
    assert [v.tag for e in events(tmp_path) for v in e.summary.value] == ["loss"]


def test_rows_after_the_restored_step_are_dropped(tmp_path):
    write(tmp_path, 0, range(1, 10))
    write(tmp_path, 6, [7], extra=0.25)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [*((s, s) for s in range(1, 7)), (7, 7.25)]
    starts = [e for e in events(tmp_path) if e.HasField("session_log")]
    assert [e.step for e in starts][-1] == 7, "TensorBoard is not told to drop what came after step 6"


@pytest.mark.parametrize("cut", [1, 5, 14, 30])
def test_half_written_row_is_dropped(tmp_path, cut):
    write(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut] if cut < 30 else path.read_text() + '{"step": 3, "lo')
    write(tmp_path, 3, [4])
    kept = [r["step"] for r in rows(tmp_path)]
    assert kept == ([1, 2, 3, 4] if cut in (1, 30) else [1, 2, 4])  # without its line end a row is still whole


def test_kill_while_opening_loses_no_row(tmp_path, monkeypatch):
    write(tmp_path, 0, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Telemetry(tmp_path, steps=20, start=3, batch_size=4, clock=Clock(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == before


def speeds(telemetry, step):
    return {k: v for k, v in telemetry.rates(step).items() if k in ("examples_per_second", "data_wait")}


def test_rates_count_examples_and_waiting_since_the_last_row(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    telemetry = Telemetry(tmp_path, steps=100, start=10, batch_size=4, clock=Clock(tmp_path))
    for step in range(11, 15):
        now[0] += 1.5
        with telemetry.waiting():
            now[0] += 0.5
        if step == 14:
            assert speeds(telemetry, 14) == pytest.approx({"examples_per_second": 4 * 4 / 8, "data_wait": 0.25})
        telemetry.advance(step, "")
    with telemetry.aside(14):
        now[0] += 1000  # an evaluation
    now[0] += 4
    assert speeds(telemetry, 15) == pytest.approx({"examples_per_second": 1 * 4 / 4, "data_wait": 0.0})
    now[0] += 3  # another step has begun meanwhile, and counts once it is logged
    telemetry.advance(16, "")
    assert speeds(telemetry, 16) == pytest.approx({"examples_per_second": 1 * 4 / 3, "data_wait": 0.0})
    assert (telemetry.starved, telemetry.rated) == (2, 8 + 4 + 3)  # of the whole run, evaluation apart
    telemetry.close()


def test_log_file_gets_plain_lines(tmp_path, capsys):
    write(tmp_path, 0, [1, 2], total=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("step 2/2  0:00 left") and lines[0].endswith("loss 1")


@pytest.mark.parametrize("peak", [None, 1000.0])
def test_tokens_and_utilisation(tmp_path, monkeypatch, capsys, peak):
    now = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    load = Load(tokens=30, flops=600.0, peak=peak)
    telemetry = Telemetry(tmp_path, steps=1, start=0, batch_size=4, load=load, clock=Clock(tmp_path))
    now[0] += 2
    found = telemetry.rates(1)
    assert found["tokens_per_second"] == pytest.approx(15)
    assert found.get("mfu") == (None if peak is None else pytest.approx(0.3))
    assert found["host_memory_peak_bytes"] > 2**20
    telemetry.advance(1, "loss 1")
    telemetry.close()
    line = capsys.readouterr().err
    assert "15 tokens/s" in line and ("MFU 30.0%" in line) == (peak is not None)


def test_goodput_counts_steps_alone(tmp_path, monkeypatch):
    now = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(tmp_path)
    now[0] += 10  # compiling
    telemetry = Telemetry(tmp_path, steps=9, start=0, batch_size=4, clock=clock)
    with telemetry.waiting():
        now[0] += 5
    now[0] += 20
    telemetry.advance(1, "")
    with telemetry.aside(1):
        now[0] += 65
    assert clock.useful == pytest.approx(20) and clock.goodput == pytest.approx(0.2)
    telemetry.close()
