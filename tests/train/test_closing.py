import json
import re

import pytest

from r1jax.config import Config, ModelConfig
from r1jax.data.synthetic import SyntheticCases
from r1jax.errors import UserError
from r1jax.fields import to_json
from r1jax.tasks.medical.closing import WIDTH
from r1jax.tasks.medical.task import Medical
from r1jax.train.closing import closing_table
from r1jax.train.run import Run, open_run

FIGURES = {
    "both": {"auc.nodule_present": 0.98, "auc.malignancy": 0.841, "kappa.malignancy_rating": -0.0001},
    "image_only": {"auc.nodule_present": 0.97, "auc.malignancy": 0.731, "kappa.malignancy_rating": 0.5},
    "record_only": {"auc.malignancy": 0.621},
}


def run_of(path, config: Config, validation: dict | None) -> Run:
    """A run with one checkpoint, as far as the table reads it."""
    checkpoint = path / "checkpoints/00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(to_json(config))
    (checkpoint / "meta.json").write_text(json.dumps({"validation": validation}))
    return left(path)


def left(path) -> Run:
    """A run that was opened and left."""
    with open_run(Config(workdir=str(path))) as run:
        return run


def cells(text: str, finding: str) -> list[str]:
    line = next(line for line in text.splitlines() if finding in line)
    return [cell.strip() for cell in re.split("[│|]", line[1:-1])][1:]


def test_findings_are_rows_and_modes_are_columns(tmp_path):
    source = SyntheticCases(0, 64, "val")
    text = closing_table(
        run_of(tmp_path, Config(), {"score": 0.9, "cases": 64, "figures": FIGURES}), Medical(Config()), source
    )
    assert text.splitlines()[0].startswith("synthetic") and "step 7" in text.splitlines()[0]
    table = [line for line in text.splitlines() if set(line) & set("│┃|")]
    assert max(map(len, table)) <= WIDTH and len(table) == 4
    ceilings = source.ceilings()
    best = " / ".join(f"{ceilings[name]:.3f}" for name in ("both", "image", "record"))
    assert cells(text, "malignancy: AUC") == ["0.841", "0.731", "0.621", best]
    assert cells(text, "nodule present: AUC") == ["0.980", "0.970", "-", ""]
    assert cells(text, "malignancy rating: kappa") == ["0.000", "0.500", "-", ""]
    assert f"next             python eval.py --checkpoint {tmp_path}" in text


def test_a_model_of_pictures_alone_has_one_column(tmp_path):
    figures = {"both": FIGURES["both"]}
    config = Config(model=ModelConfig(modalities=("volume",)))
    run = run_of(tmp_path, config, {"cases": 64, "figures": figures})
    text = closing_table(run, Medical(config), SyntheticCases(0, 64, "val"))
    assert "image only" in text and "record" not in text.split("best checkpoint")[0]
    assert cells(text, "malignancy: AUC") == ["0.841", f"{SyntheticCases(0, 64, 'val').ceilings()['image']:.3f}"]


def test_without_figures_the_paths_are_left(tmp_path):
    text = closing_table(run_of(tmp_path, Config(), None), Medical(Config()), SyntheticCases(0, 64, "val"))
    assert text.startswith("best checkpoint")


def test_a_run_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        closing_table(left(tmp_path), Medical(Config()), SyntheticCases(0, 4, "val"))
