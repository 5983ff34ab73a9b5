"""Finds the type of a column of cells: whole numbers, numbers, categories or text."""

import pyarrow as pa
import pyarrow.compute as pc

from r1jax.data.schema import Field

UNKNOWN = ("", "nan", "na", "n/a", "none", "null", "<na>")
"""Cells of a column of numbers that say that nothing is known; case does not matter."""
CATEGORIES = 256
"""A column with more different words than this is text."""


def column_field(name: str, cells: pa.Array, decimal_comma: bool, kind: str | None) -> tuple[Field, pa.Array] | int:
    """Finds what a column holds, from all its cells.

    Numbers are read only where every cell that is not empty is one and nothing is lost: codes with leading zeros and
    whole numbers that float64 or int64 cannot hold stay words.

    Args:
      name: Of the column.
      cells: Strings as the file has them.
      decimal_comma: Whether 1,5 is a number too.
      kind: "number", "category" or "text" where the user says it.

    Returns:
      The field and its values, null where missing; or the first row that is no number though `kind` says so.
    """
    trimmed = pc.utf8_trim_whitespace(cells)
    if kind in (None, "number"):
        numbers = _numbers(trimmed, decimal_comma, strict=kind is None)
        if isinstance(numbers, pa.Array):
            return Field(name, "number", str(numbers.type.to_pandas_dtype().__name__)), numbers
        if kind == "number":
            return numbers
    words = cells if kind == "text" else trimmed
    words = pc.if_else(pc.equal(trimmed, ""), None, words)
    if kind is None:
        different = pc.count_distinct(words).as_py()
        kind = "category" if different <= min(CATEGORIES, (len(words) - words.null_count) / 2) else "text"
    return (Field(name, kind), words if kind == "text" else words.dictionary_encode())  # type: ignore[arg-type]


def _numbers(cells: pa.Array, decimal_comma: bool, strict: bool) -> pa.Array | int:
    """Turns cells into int64 or float64, or names the first row that prevents it (strict: or loses digits)."""
    missing = pc.is_in(pc.utf8_lower(cells), value_set=pa.array(UNKNOWN))
    present = pc.if_else(missing, None, cells)
    if decimal_comma and not pc.any(pc.match_substring(present, ".")).as_py():
        present = pc.replace_substring(present, ",", ".")
    whole = pc.match_substring_regex(present, r"^[+-]?[0-9]+$")
    if pc.all(whole).as_py() and present.null_count < len(present):
        try:
            numbers = pc.replace_substring_regex(present, r"^\+", "").cast(pa.int64())
        except pa.ArrowInvalid:
            numbers = None
        coded = strict and pc.any(pc.match_substring_regex(present, r"^[+-]?0[0-9]")).as_py()
        if numbers is not None and not coded and not numbers.null_count:
            return numbers
    lossy = pc.match_substring_regex(present, r"^[+-]?(0[0-9]|[0-9]{16})")
    number = pc.match_substring_regex(present, r"(?i)^[+-]?(inf|infinity|([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?)$")
    refused = pc.or_(pc.invert(number), lossy) if strict else pc.invert(number)
    found = pc.index(refused, True).as_py()
    if found >= 0:
        return found
    values = present.cast(pa.float64())
    overflow = pc.and_(pc.is_inf(values), pc.invert(pc.match_substring(present, "inf", ignore_case=True)))
    found = pc.index(overflow, True).as_py()
    return values if found < 0 else found
