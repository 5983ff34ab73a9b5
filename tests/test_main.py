"""The command `r1jax`: its table of subcommands, and every subcommand's help."""

import subprocess
import sys
from pathlib import Path

import pytest

from r1jax.__main__ import COMMANDS, dispatch
from r1jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["hf"], ["hf", "--help"]])
def test_listing(words, capsys):
    assert dispatch(words) == 0
    out = capsys.readouterr().out
    shown = [name for name, command in COMMANDS.items() if f"r1jax {name} " in out and command.summary in out]
    assert shown == [name for name in COMMANDS if not words or words[0] != "hf" or name.startswith("hf ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_wants_its_arguments(name, capsys):
    with pytest.raises(SystemExit) as left:
        dispatch([*name.split(), "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "Examples:" in out and f"usage: r1jax {name}" in out
    if name == "runs list":  # which lists runs/
        return
    with pytest.raises(UserError, match=r"^no \w+ was named; add .*, for example: r1jax "):
        dispatch(name.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hf", "imprt", "x"], "no command 'hf imprt' (did you mean 'hf import'?)"),
        (["train"], "no command 'train'"),
        (["import", "hf"], "no command 'import'"),
    ],
)
def test_unknown_commands(words, told):
    with pytest.raises(UserError) as caught:
        dispatch(words)
    assert told in str(caught.value)


def test_python_m_r1jax_leaves_with_2_and_one_line():
    call = [sys.executable, "-m", "r1jax", "hf", "verify", "nowhere"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (2, "")
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: nowhere/config.json does not exist")
    assert "Traceback" not in done.stderr
