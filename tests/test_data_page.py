"""docs/data.md does what it says: its code runs as it stands, and its commands do on the servers of the tests."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from r1jax.__main__ import dispatch
from r1jax.data.folder import FolderCases
from tests.test_train import ROOT, command

PAGE = (ROOT / "docs/data.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def scans(folder: Path) -> None:
    """Two small MHD files."""
    folder.mkdir()
    for name in ("a", "b"):
        header = "NDims = 3\nDimSize = 4 5 6\nElementType = MET_SHORT\nElementSpacing = 0.7 0.7 1.25\n"
        (folder / f"{name}.mhd").write_text(f"ObjectType = Image\n{header}ElementDataFile = {name}.raw\n")
        (folder / f"{name}.raw").write_bytes(np.arange(120, dtype="<i2").tobytes())


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder where the Python of the page has run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    scans(tmp_path / "scans")
    for code in blocks("python"):
        exec(compile(code, "docs/data.md", "exec"), {})
    return tmp_path


def test_the_code_makes_folders_of_cases(here):
    assert len(blocks("python")) == 2
    for name, shape in (("my_cases", (51, 51, 51)), ("scan_cases", (6, 5, 4))):
        source = FolderCases.open(here / name, "all")
        batch = source.read_batch(np.arange(2))
        assert batch["volume"].shape == (2, *shape) and not source.ignored
        np.testing.assert_allclose(batch["volume_spacing"][0], [1.25, 0.7, 0.7])
        assert batch["target.nodule_present"].tolist() == [0, 1]


@pytest.mark.slow
def test_the_commands_run(here, hdfs, redis_server, monkeypatch, capsys):
    """Training is only planned, which opens the data; what it then does is the matter of other tests."""
    monkeypatch.setenv("REDIS_PASSWORD", "")
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert sum(line.startswith("r1jax data") for line in lines) == 4 and len(lines) >= 8
    for line in lines:
        text = line.replace("hdfs://namenode:8020", hdfs.url + "/page").replace("redis://HOST:6379", redis_server.url)
        text = text.replace("redis://trainer:$REDIS_PASSWORD@HOST:6379", redis_server.url)
        words = [word for word in shlex.split(text, comments=True) if not word.startswith("REDIS_PASSWORD=")]
        words = ["configs/medical.py:smoke" if word == "FILE.py" else word for word in words]
        if words[0] == "r1jax":
            assert dispatch(words[1:]) == 0, line
        elif words[1] == "train.py":
            with jax.numpy_dtype_promotion("standard"):  # optax promotes
                code, out, err = command(monkeypatch, capsys, *words[2:], "--dry-run")
            assert code == 0 and "parameters" in out and (here / "runs").exists() is False, (line, err)
        else:
            assert words[1] == "eval.py" and words[2] == "--checkpoint", line


def test_every_place_that_the_page_names_is_there():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        page, _, mark = link.partition("#")
        path = ROOT / "docs" / page if page else ROOT / "docs/data.md"
        assert path.exists(), link
        heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE) if path.suffix == ".md" else []
        marks = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not mark or mark in marks, link
