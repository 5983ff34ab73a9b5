"""The event file, beside what tensorboardX writes."""

import time

import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from r1jax.train.tensorboard import EventFile


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.5e9)
    values = [Summary.Value(tag="loss", simple_value=0.25), Summary.Value(tag="validation/auc", simple_value=1e-3)]
    return [Event(wall_time=2.0, step=7, summary=Summary(value=values)), Event(wall_time=3.0, step=8)]


def test_the_file_is_that_of_tensorboardx(tmp_path, events):
    theirs, ours = EventsWriter(str(tmp_path / "events"), filename_suffix=".5"), EventFile(tmp_path / "board", 5)
    for event in events:
        theirs.write_event(event)
        ours.write(event)
    theirs.close()
    ours.close()
    (theirs,), (ours,) = tmp_path.glob("events*"), (tmp_path / "board").iterdir()
    assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()


def test_an_event_is_in_the_file_at_once(tmp_path, events):
    file, sizes = EventFile(tmp_path, 0), []
    for event in events:
        file.write(event)
        sizes.append(next(tmp_path.iterdir()).stat().st_size)
    file.close()
    assert 0 < sizes[0] < sizes[1] == next(tmp_path.iterdir()).stat().st_size
