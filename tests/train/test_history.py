import pytest

from r1jax.train.history import History, read_history


def events(workdir):
    return [event["event"] for event in read_history(workdir)[0]]


def test_events_come_back_in_order(tmp_path):
    history = History(tmp_path)
    history.start(step=3, config={"seed": 1})
    history.note("stopped", step=5, signal="SIGTERM")
    (start, stop), damaged = read_history(tmp_path)
    assert damaged == 0
    assert start["event"] == "started" and start["config"] == {"seed": 1} and start["pid"] and start["host"]
    assert (stop["event"], stop["step"], stop["signal"]) == ("stopped", 5, "SIGTERM")


def test_a_refused_start_leaves_no_trace(tmp_path):
    History(tmp_path).note("failed", message="other config")
    assert list(tmp_path.iterdir()) == [] and read_history(tmp_path) == ([], 0)


def test_a_kill_loses_at_most_the_last_line(tmp_path):
    history = History(tmp_path)
    history.start(step=0)
    history.note("stopped", step=1)
    whole = history.path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        history.path.write_bytes(whole[:length])
        history.note("ended", step=2)  # goes on in a line of its own
        found = events(tmp_path)
        assert found in (["started", "ended"], ["started", "stopped", "ended"])
        assert read_history(tmp_path)[1] == (length > first and len(found) == 2)


@pytest.mark.parametrize("row", [b"[]", b"\xff\xfe", b'{"event": "started"}', b'{"time": "yesterday", "event": "x"}'])
def test_foreign_lines_are_counted(tmp_path, row):
    history = History(tmp_path)
    history.path.write_bytes(row + b"\n")
    history.start(step=0)
    assert events(tmp_path) == ["started"] and read_history(tmp_path)[1] == 1


def test_a_full_disk_is_said(tmp_path, capsys):
    history = History(tmp_path / "run")
    history.started = True
    history.note("ended", step=2)
    assert "history.jsonl could not be written (No such file" in capsys.readouterr().err
