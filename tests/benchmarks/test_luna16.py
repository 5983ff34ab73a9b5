"""The benchmark of luna16_fpr_2d: seeds that train side by side join."""

import json
import sys

import pytest

from benchmarks import luna16
from benchmarks.luna16_peers import FIGURES


def test_seeds_that_are_there_are_kept_and_the_rest_joined_in_order(tmp_path, monkeypatch, capsys):
    def seed(number):
        figures = dict.fromkeys(FIGURES, 0.9 + number / 100)
        return {"seed": number, "seconds": 1.0, "views": {"8": figures}}

    def children(commands, *, jobs, timeout, devices):
        assert (jobs, devices) == (2, 4)
        for name, words in reversed(commands.items()):
            assert words[1:3] == ["--child", name]
            failed = {"error": "exit code 1"}
            yield name, failed if name == "4" else {"run": seed(int(name)), "environment": environment}

    environment = {"arguments": {"overrides": ["--x=1"]}, "hardware": "one"}
    output = tmp_path / "luna16.json"
    output.write_text(json.dumps({"models": {"r1jax": {"runs": [seed(1)]}}}))
    monkeypatch.setattr(luna16, "run_at_once", children)
    words = ["luna16.py", "--data", "set", "--output", str(output), "--seeds", "5", "--jobs", "2", "--resume"]
    monkeypatch.setattr(sys, "argv", [*words, "--devices", "4", "--", "--x=1"])
    with pytest.raises(SystemExit, match=r"^without seed 4 \(above\)"):
        luna16.main()
    told = json.loads(output.read_text())["models"]["r1jax"]
    assert [run["seed"] for run in told["runs"]] == [0, 1, 2, 3] and told["settings"] == {"overrides": ["--x=1"]}
    assert told["summary"]["8"]["auc"]["mean"] == pytest.approx(0.915)
    assert "seed 4: exit code 1" in capsys.readouterr().out
