"""The page is one safe, complete file that shows the figures it was given, whatever is missing."""

import base64
import hashlib
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.serve.page import write_page
from r1jax.serve.page_charts import Scores
from r1jax.serve.page_slices import Marker, Picture
from r1jax.tasks.intervals import figure_text
from r1jax.tasks.medical.evaluation import evaluate, evaluate_modalities
from r1jax.tasks.medical.schema import FINDINGS
from r1jax.tasks.medical.summary import rows
from tests.serve.structure import Structure

N = 60


def predictions(seed):
    rng = np.random.default_rng(seed)
    made = {}
    for finding in FINDINGS:
        if finding.kind == "rating":
            made[finding.name] = rng.dirichlet(np.ones(finding.width), N)
        else:
            made[finding.name] = rng.random((N, 3) if finding.kind == "vector" else N)
    return made


def targets():
    rng = np.random.default_rng(9)
    made = {}
    for finding in FINDINGS:
        if finding.kind == "rating":
            made[finding.name] = rng.integers(1, finding.width + 1, N).astype(np.float32)
        elif finding.kind == "binary":
            made[finding.name] = (np.arange(N) % 3 == 0).astype(np.float32)
        else:
            made[finding.name] = rng.uniform(1, 9, (N, 3) if finding.kind == "vector" else N)
    return made


def pictures(n=2, size=16):
    rng = np.random.default_rng(5)
    return [
        Picture(
            f"case-{i}",
            ("false negative", "false positive")[i % 2],
            rng.integers(-1000, 400, (size,) * 3).astype(np.int16),
            (1.0, 1.0, 1.0),
            Marker((8.0, 8.0, 8.0), 5.0),
            Marker((7.0, 8.0, 9.0), 6.0),
            rng.random((size,) * 3).astype(np.float32),
            report="FINDINGS: a nodule.\n结论:随访。",
            facts=(("Long axis", "5.0 mm", "6.0 mm"),),
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def everything():
    truth = targets()
    made = {mode: predictions(k) for k, mode in enumerate(("both", "image_only", "record_only"))}
    metrics = evaluate_modalities(made, truth, ceilings={"both": {"malignancy": 0.9}}, resamples=20)
    curves = [
        Scores(name, mode, truth[name], values[name], 0.6)
        for name in ("nodule_present", "malignancy")
        for mode, values in made.items()
    ]
    return {
        "title": "Chest CT",
        "metrics": metrics,
        "curves": curves,
        "pictures": pictures(),
        "provenance": {"Checkpoint sha256": "ab" * 32},
        "synthetic": True,
    }


def written(folder, **arguments):
    write_page(folder / "index.html", **arguments)
    return (folder / "index.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(everything, tmp_path_factory):
    return written(tmp_path_factory.mktemp("page"), **everything)


def test_elements_nest_and_ids_are_unique(page):
    ids = Structure(page).values("id")
    assert len(ids) == len(set(ids))
    assert {"headline", "nodule-present", "malignancy", "cases", "all-figures", "provenance"} <= set(ids)


def test_references_inside_charts_have_their_targets(page):
    """Clipping, hatching and markers refer to ids, which must exist in this very page."""
    structure = Structure(page)
    used = re.findall(r"url\(#(\w+)\)", page) + [tag["href"][1:] for name, tag in structure.tags if name == "use"]
    assert used
    assert set(used) <= set(structure.values("id"))


def test_nothing_is_loaded_from_anywhere(page):
    structure = Structure(page)
    sources = structure.values("src") + structure.values("href")
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "link" not in {tag for tag, _ in structure.tags}


def test_only_the_pages_own_script_may_run(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert not [name for _, attributes in Structure(page).tags for name in attributes if name.startswith("on")]


def test_every_chart_and_slice_is_well_formed(page):
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawn) > 2 * 4 + 2 * 6
    for svg in drawn:
        ElementTree.fromstring(svg)


def test_every_figure_is_on_the_page(page, everything):
    text = re.sub(r"\s+", " ", Structure(page).text)
    for mode in ("both", "image_only", "record_only"):
        for name, entry in everything["metrics"][mode]["findings"].items():
            for row in rows(entry):
                value, interval = figure_text(row.figure, row.unit)
                assert f"{value}{interval}" in text, (mode, name, row.text)
    gain = everything["metrics"]["differences"]["record_only"]["malignancy"]["auc"]
    assert "".join(figure_text(gain, "1")) in text


def test_cases_are_shown_with_report_and_facts(page):
    structure = Structure(page)
    assert structure.values("data-outcome") == ["false negative", "false positive"]
    for expected in ("case-0", "case-1", "结论:随访。", "5.0 mm", "axial + saliency", "ab" * 32):
        assert expected in structure.text


def test_synthetic_data_are_called_so_and_only_they(page, everything, tmp_path):
    assert "SYNTHETIC DATA" in Structure(page).text
    real = Structure(written(tmp_path, **{**everything, "synthetic": False})).text
    assert "synthetic" not in real.lower()
    for text in (Structure(page).text, real):
        assert "not a medical device" in text


def test_the_same_input_gives_the_same_file(page, everything, tmp_path):
    assert written(tmp_path, **everything) == page


def test_words_of_users_are_escaped(everything, tmp_path):
    nasty = '<script>alert("x")</script>$title & more'
    case = Picture(nasty, nasty, np.zeros((8, 8), np.uint8), (1.0, 1.0), report=nasty, facts=((nasty, nasty, nasty),))
    arguments = {**everything, "title": nasty, "provenance": {nasty: nasty}, "pictures": [case]}
    page = written(tmp_path, **arguments)
    structure = Structure(page)
    assert [tag for tag, _ in structure.tags].count("script") == 1
    assert structure.text.count(nasty) >= 8
    assert structure.values("data-outcome") == [nasty]


def test_one_finding_of_images_in_one_mode(tmp_path):
    truth, scores = targets()["nodule_present"], predictions(0)["nodule_present"]
    image = Picture("a", "false positive", np.zeros((20, 30), np.uint8), (1.0, 1.0))
    page = written(
        tmp_path,
        title="LUNA16",
        metrics=evaluate_modalities(
            {"image_only": {"nodule_present": scores}}, {"nodule_present": truth}, resamples=10
        ),
        curves=[Scores("nodule_present", "image_only", truth, scores)],
        pictures=[image],
        provenance={},
        synthetic=False,
    )
    text = Structure(page).text
    assert "image only" in text
    assert "Malignancy" not in text
    assert "record only" not in text


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_cases_of_a_single_class(label, tmp_path):
    truth, scores = np.full(N, label), predictions(0)["malignancy"]
    page = written(
        tmp_path,
        title="t",
        metrics=evaluate({"malignancy": scores}, {"malignancy": truth}, resamples=10),
        curves=[Scores("malignancy", "both", truth, scores)],
        pictures=[],
        provenance={},
        synthetic=True,
    )
    text = Structure(page).text
    assert "Not defined: the cases are all of one class." in text
    assert ("no case is positive" in text) == (label == 0)
    assert "undefined" in text


def test_nothing_to_show(tmp_path):
    empty = {"malignancy": np.zeros(0)}
    page = written(
        tmp_path,
        title="t",
        metrics=evaluate(empty, empty),
        curves=[Scores("malignancy", "both", np.zeros(0), np.zeros(0))],
        pictures=[],
        provenance={},
        synthetic=False,
    )
    assert "No case has a known answer." in Structure(page).text


def test_many_large_cases_stay_below_six_megabytes(everything, tmp_path):
    case = pictures(1, size=128)[0]
    write_page(tmp_path / "index.html", **{**everything, "pictures": [case] * 30})
    assert (tmp_path / "index.html").stat().st_size < 6_000_000
    structure = Structure((tmp_path / "index.html").read_text("utf-8"))
    assert len(structure.values("data-outcome")) == 24
    assert "24 of 30 cases are shown" in structure.text


def test_an_error_leaves_the_old_page_as_it_was(everything, tmp_path):
    (tmp_path / "index.html").write_text("old")
    for finding, mode in (("texture of", "both"), ("malignancy", "image")):
        curve = Scores(finding, mode, np.zeros(2), np.zeros(2))
        with pytest.raises(UserError, match="finding or mode is unknown"):
            write_page(tmp_path / "index.html", **{**everything, "curves": [curve]})
    assert (tmp_path / "index.html").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "index.html"]
