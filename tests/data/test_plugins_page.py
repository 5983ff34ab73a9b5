"""docs/plugins.md does what it says: its plug-in is written to a file and trained with, resumed and evaluated."""

import re
from pathlib import Path

import numpy as np
import pytest

from r1jax.data.folder import FolderCases
from r1jax.data.pipeline import Preprocessed, open_pipeline
from r1jax.tasks.medical.schema import RECORD_FIELDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"


@pytest.fixture
def folder(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "age.py").write_text(code)
    return str(tmp_path / "plugins")


def test_the_plug_in_of_the_page(folder, tmp_path):
    (text,) = re.findall(r'--data.preprocess "(cap_age.*?)"', PAGE.read_text("utf-8"))
    (tmp_path / "cases").mkdir()
    np.savez(tmp_path / "cases" / "cases.npz", image=np.zeros((3, 5, 5), np.uint8), age=[30.0, 95.0, np.nan])
    source = Preprocessed(FolderCases.open(str(tmp_path / "cases"), "all"), open_pipeline(text, (folder,)), 0)
    batch = source.read_batch(np.arange(3))
    assert list(RECORD_FIELDS)[0].name == "age"
    np.testing.assert_array_equal(batch["table"][:, 0], np.array([30, 89, np.nan], np.float32))


def test_all_steps_of_the_page_exist():
    table = PAGE.read_text("utf-8").partition("## What comes with r1jax")[2]
    steps = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert len(steps) == 7
    for step in steps:
        known = step.replace("spacing,", "1.0,").replace("height, width", "8, 8")
        assert len(open_pipeline(known).steps) == 1
