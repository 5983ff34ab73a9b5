"""Lung-RADS v2022 by rule: the baseline rows of the table that predicted texture and size can decide.

Source: Christensen et al., ACR Lung-RADS v2022: Assessment Categories and Management Recommendations,
J Am Coll Radiol 2024;21(3):473-488, doi:10.1016/j.jacr.2023.09.009. Rows used (baseline screening CT):
    1   no nodule; or complete, central, popcorn or concentric-ring calcification
    2   solid < 6 mm; part-solid < 6 mm in all; non-solid < 30 mm
    3   solid 6 to < 8 mm; part-solid >= 6 mm with solid component < 6 mm; non-solid >= 30 mm
    4A  solid 8 to < 15 mm; part-solid >= 6 mm with solid component 6 to < 8 mm
    4B  solid >= 15 mm; part-solid with solid component >= 8 mm
"""

from typing import Literal, NamedTuple

from r1jax.tasks.medical.schema import FINDING

Category = Literal["1", "2", "3", "4A", "4B"]
LIMITS = (
    "Sub-volume only, not the whole screening examination; the most likely texture counts; long axis stands for the "
    "mean diameter; no earlier CT, so neither growth nor new nodules; solid component, airway, juxtapleural, cyst, fat "
    "and 4X features are not used."
)
# LIDC words for complete ("solid"), central, popcorn and concentric-ring ("laminated") calcification.
BENIGN_CALCIFICATION = frozenset({"popcorn", "laminated", "solid", "central"})
# Five LIDC levels to the three of Lung-RADS: 1-2 non-solid, 3-4 part-solid, 5 solid.
_DENSITY = dict(
    zip(FINDING["texture"].levels, ("non-solid", "non-solid", "part-solid", "part-solid", "solid"), strict=True)
)


class Assessment(NamedTuple):
    """The categories that the inputs leave possible (none: not assignable), and the row that decided."""

    categories: tuple[Category, ...]
    basis: str


def lung_rads(
    texture: str | None, long_axis_mm: float | None, present: bool | None, calcification: str | None
) -> Assessment:
    """Looks the category up; it is never a network's output.

    Args:
      texture: LIDC word of the texture, None where it was not predicted.
      long_axis_mm: Size to one decimal, as the table asks for; None where it was not predicted.
      present: Whether a nodule is called, None where no call was made.
      calcification: LIDC word of the calcification pattern; None counts as not benign.

    Returns:
      One category, or several where the solid component of a part-solid nodule would decide, or none.
    """
    if present is None:
        return Assessment((), "presence was not called")
    if not present:
        return Assessment(("1",), "no nodule called in this sub-volume")
    if calcification in BENIGN_CALCIFICATION:
        return Assessment(("1",), "benign calcification pattern")
    if texture is None or long_axis_mm is None:
        return Assessment((), "texture or size was not predicted")
    size = long_axis_mm
    match _DENSITY[texture]:
        case "solid":
            category: Category = "2" if size < 6 else "3" if size < 8 else "4A" if size < 15 else "4B"
            return Assessment((category,), "solid texture and size")
        case "non-solid":
            return Assessment(("2" if size < 30 else "3",), "non-solid texture and size")
    if size < 6:
        return Assessment(("2",), "part-solid texture and size")
    # The solid component is not measured; it cannot be larger than the whole.
    possible: tuple[Category, ...] = ("3", "4A") if size < 8 else ("3", "4A", "4B")
    return Assessment(possible, "part-solid texture and size; solid component not measured")
