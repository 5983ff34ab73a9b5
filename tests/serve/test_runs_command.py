import json
import os
import shutil

import pytest

from r1jax.config import Config, TrainConfig
from r1jax.errors import UserError
from r1jax.fields import to_json
from r1jax.serve.runs_command import compare_runs, list_runs
from r1jax.train.history import History


def make(path, event=None, steps=100, loss=0.5, rate=1e-3, **told):
    """A run with one checkpoint at step 50, whose last event is given."""
    config = Config(name=path.name, train=TrainConfig(steps=steps, learning_rate=rate))
    checkpoint = path / "checkpoints/00000050"
    checkpoint.mkdir(parents=True)
    (path / "config.json").write_text(to_json(config))
    validation = {"score": 0.75, "figures": {"both": {"auc.malignancy": 0.75}}}
    (checkpoint / "meta.json").write_text(json.dumps({"validation": validation}))
    (checkpoint / "manifest.json").write_text("{}")
    rows = [{"step": s, "loss": loss + 1 / s} for s in range(1, 51)] + [{"step": 50, "validation.both.auc": 0.75}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = History(path)
    history.start(step=0, git="a" * 40, dirty=True)
    if event:
        history.note(event, **told)
    return path


def listed(folder, capsys):
    assert list_runs([str(folder), "--json"]) == 0
    return {os.path.basename(run["run"]): run for run in json.loads(capsys.readouterr().out)}


def test_states(tmp_path, capsys):
    make(tmp_path / "done", "ended", steps=50, step=50)
    make(tmp_path / "group/asked", "stopped", step=50, signal="SIGTERM")
    make(tmp_path / "broke", "failed", step=7, message="no room")
    make(tmp_path / "hung", "hung", step=7, message="stuck")
    make(tmp_path / "alive")
    killed = make(tmp_path / "killed")
    history = (killed / "history.jsonl").read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194305')
    (killed / "history.jsonl").write_text(history)
    found = listed(tmp_path, capsys)
    expected = dict(done="finished", asked="stopped", broke="failed", hung="hung", alive="training", killed="killed")
    assert {name: run["state"] for name, run in found.items()} == expected
    assert "SIGTERM" in found["asked"]["detail"] and "no room" in found["broke"]["detail"]
    one = found["done"]
    assert (one["step"], one["steps"], one["best_score"], one["headline"]) == (50, 50, 0.75, "auc.malignancy 0.75")
    assert one["loss"] == 0.52 and one["dirty"] is True and one["problems"] == []


def test_whatever_lies_there_is_listed(tmp_path, capsys):
    for name, file, content in (
        ("a", "config.json", b"[1]"),
        ("b", "config.json", b"\xff"),
        ("c", "metrics.jsonl", b'{"step": "x"}\nnothing\n{}'),
        ("d", "heartbeat.json", b"{"),
        ("e", "history.jsonl", b"{}\n"),
        ("f", "checkpoints/00000050/meta.json", b"{"),
    ):
        (make(tmp_path / name) / file).write_bytes(content)
    shutil.rmtree(make(tmp_path / "g") / "checkpoints")
    (tmp_path / "g" / "checkpoints").write_text("a file")
    (tmp_path / "strange").mkdir()
    found = listed(tmp_path, capsys)
    assert len(found) == 8 and found["strange"]["state"] == "foreign"
    assert [name for name in "abcdef" if not found[name]["problems"]] == []
    assert list_runs([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run ") and "strange: no run" in out and "\x1b" not in out


def test_checkpoints_that_were_set_aside_are_named(tmp_path, capsys):
    run = make(tmp_path / "back")
    for name in ("damaged-00000060", "left-00000070"):
        (run / "checkpoints" / name).mkdir()
    damaged, left = listed(tmp_path, capsys)["back"]["problems"]
    assert damaged.endswith("damaged-00000060: set aside as damaged")
    assert left.endswith("left-00000070: set aside when the run went further back")


def test_nothing_there(tmp_path, capsys):
    assert list_runs([str(tmp_path)]) == 0 and "holds no runs" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no folder"):
        list_runs([str(tmp_path / "nowhere")])


def test_comparison_names_what_differs(tmp_path, capsys):
    a, b = make(tmp_path / "a", loss=0.5), make(tmp_path / "b", loss=0.25, rate=2e-3)
    assert compare_runs([str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == {"name": ["a", "b"], "train.learning_rate": [1e-3, 2e-3]} and found["made"] == {}
    assert found["figures"]["loss"] == [0.52, 0.27] and found["figures"]["best.both.auc.malignancy"] == [0.75, 0.75]
    for name, sign in (("x.svg", b"<?xml"), ("x.png", b"\x89PNG"), ("x.html", b"<!doctype html>")):
        assert compare_runs([str(a), str(b), "--output", str(tmp_path / name)]) == 0
        content = (tmp_path / name).read_bytes()
        assert content.startswith(sign) and (name == "x.png" or b"validation.both.auc" in content)
    assert "train.learning_rate" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_compared(tmp_path):
    a = str(make(tmp_path / "a"))
    with pytest.raises(UserError, match="must end in .svg, .png or .html"):
        compare_runs([a, "--output", str(tmp_path / "x.gif")])
    with pytest.raises(UserError, match="cannot be written"):
        compare_runs([a, "--output", str(tmp_path / "no" / "x.svg")])
    with pytest.raises(UserError, match="does not exist"):
        compare_runs([str(tmp_path / "nowhere")])


def test_a_run_of_another_machine_is_judged_by_its_heartbeat(tmp_path, capsys):
    path = make(tmp_path / "far") / "history.jsonl"
    event = json.loads(path.read_text())
    path.write_text(json.dumps(event | {"host": "far"}) + "\n")
    assert listed(tmp_path, capsys)["far"]["state"] == "training"
    path.write_text(json.dumps(event | {"host": "far", "time": "2020-01-01T00:00:00+00:00"}) + "\n")
    assert listed(tmp_path, capsys)["far"]["state"] == "silent"
