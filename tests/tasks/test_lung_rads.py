"""Lung-RADS by rule: the table, and what must be known before it is asked."""

import numpy as np
import pytest

from r1jax.tasks.medical.fhir import to_fhir
from r1jax.tasks.medical.lung_rads import LIMITS, lung_rads
from r1jax.tasks.medical.schema import FINDING
from tests.tasks.reports import full_prediction, report_of


# Rows of the Lung-RADS v2022 table for a baseline CT, written out by hand.
@pytest.mark.parametrize(
    ("texture", "size", "present", "calcification", "categories"),
    [
        (None, None, False, None, ("1",)),
        ("solid", 30.0, False, None, ("1",)),
        ("solid", 30.0, None, None, ()),
        ("solid", 20.0, True, "popcorn", ("1",)),
        ("solid", 20.0, True, "laminated", ("1",)),
        ("solid", 20.0, True, "solid", ("1",)),
        ("solid", 20.0, True, "central", ("1",)),
        (None, None, True, "central", ("1",)),
        ("solid", 20.0, True, "non-central", ("4B",)),
        ("solid", 20.0, True, "absent", ("4B",)),
        ("solid", 0.0, True, None, ("2",)),
        ("solid", 5.9, True, None, ("2",)),
        ("solid", 6.0, True, None, ("3",)),
        ("solid", 7.9, True, None, ("3",)),
        ("solid", 8.0, True, None, ("4A",)),
        ("solid", 14.9, True, None, ("4A",)),
        ("solid", 15.0, True, None, ("4B",)),
        ("part-solid", 5.9, True, None, ("2",)),
        ("part-solid", 6.0, True, None, ("3", "4A")),
        ("part-solid to solid", 7.9, True, None, ("3", "4A")),
        ("part-solid to solid", 8.0, True, None, ("3", "4A", "4B")),
        ("part-solid", 40.0, True, None, ("3", "4A", "4B")),
        ("non-solid", 29.9, True, None, ("2",)),
        ("non-solid", 30.0, True, None, ("3",)),
        ("non-solid to part-solid", 29.9, True, None, ("2",)),
        (None, 8.0, True, None, ()),
        ("solid", None, True, None, ()),
    ],
)
def test_lung_rads_follows_the_table(
    texture: str | None,
    size: float | None,
    present: bool | None,
    calcification: str | None,
    categories: tuple[str, ...],
) -> None:
    assert lung_rads(texture, size, present, calcification).categories == categories


@pytest.mark.parametrize(
    ("levels", "categories"),
    [
        ({"central": 1.0}, ("1",)),
        ({"central": 0.6, "solid": 0.4}, ("1",)),
        ({"central": 0.92, "absent": 0.08}, ("1",)),
        ({"central": 0.8, "absent": 0.2}, ("4A",)),
        ({"absent": 1.0}, ("4A",)),
    ],
)
def test_calcification_counts_as_benign_only_where_it_is_sure(
    levels: dict[str, float], categories: tuple[str, ...]
) -> None:
    probabilities = np.array([levels.get(level, 0.0) for level in FINDING["calcification"].levels])
    report = report_of(full_prediction() | {"calcification": probabilities})
    assert report.lung_rads is not None
    assert report.lung_rads.categories == categories
    assert LIMITS in report.conclusion


@pytest.mark.parametrize(("missing", "categories"), [(("image",), ()), (("volume", "text"), ()), (("table",), ("4A",))])
def test_no_lung_rads_without_the_ct(missing: tuple[str, ...], categories: tuple[str, ...]) -> None:
    report = report_of(full_prediction(), missing=missing)
    assert report.lung_rads is not None
    assert report.lung_rads.categories == categories
    codes = to_fhir(report)["entry"][0]["resource"].get("conclusionCode", [])
    assert [code["text"].split(" (")[0] for code in codes] == [
        f"Lung-RADS v2022 category {name}" for name in categories
    ]


def test_lung_rads_reads_the_size_that_is_reported() -> None:
    report = report_of(full_prediction() | {"long_axis_mm": 7.96})
    assert "8.0 mm" in report.conclusion
    assert report.lung_rads is not None
    assert report.lung_rads.categories == ("4A",)
