"""What a config field may hold, in words and as JSON: strict conversion between dataclasses and nested dicts."""

import dataclasses
import json
import math
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from r1jax.errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """What a number may be (`low <= x < high`, so never NaN), stated in its type."""

    text: str
    low: int | float
    high: int | float = math.inf


def leaves(kind: type, prefix: str = "") -> dict[str, Any]:
    """Lists the fields of a dataclass, those of its groups (fields that are dataclasses) too.

    Args:
      kind: The dataclass.
      prefix: Put before each name.

    Returns:
      Annotated type of each field that is no group, by dotted name (`train.steps`), in order.
    """
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        found |= leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def wanted(hint: Any) -> str:
    """Says in words what a field takes, for error messages.

    Args:
      hint: Annotated type of the field.

    Returns:
      For example `a whole number of at least 1 or None`.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{wanted(inner[0])} {inner[1].text}"
    if origin is Literal:
        return "one of " + ", ".join(inner) if len(inner) > 1 else repr(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(option) for option in inner)
    if origin is tuple:
        return f"a list, each item {wanted(inner[0])}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}
    return words.get(hint, str(hint))


def fit(hint: Any, value: Any) -> Any:
    """Holds a value to a field's type and bounds.

    Args:
      hint: Annotated type of the field.
      value: Python or JSON value; JSON's lists become tuples, whole numbers become floats where a float is due.

    Returns:
      The value in exactly that type.

    Raises:
      ValueError: The value does not fit.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = fit(inner[0], value)
        if not inner[1].low <= value < inner[1].high:
            raise ValueError
        return value
    if origin is Literal and isinstance(value, str) and value in inner:
        return value
    if origin in (Union, types.UnionType):
        for option in inner:
            try:
                return fit(option, value)
            except (ValueError, TypeError):  # an int has no order beside a text
                continue
        raise ValueError
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(fit(inner[0], item) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # not isinstance: True is no whole number
        raise ValueError
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Turns a config into nested dicts of JSON values.

    Args:
      config: Instance of a dataclass.

    Returns:
      One key a field; tuples are lists.
    """
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def build(kind: type[T], values: Any, source: str, prefix: str = "", *, stored: bool = False) -> T:
    """Builds a dataclass from what `to_dict` gave, and accepts nothing else.

    Args:
      kind: Dataclass to build.
      values: Nested dicts, one key a field.
      source: Where the values came from, for error messages.
      prefix: Dotted name of the group that is built, with a trailing dot.
      stored: Whether another revision may have written the values, which then had every field that it knew. One that
        came later takes its default, which is what the older revision did; a field that went is still refused.

    Returns:
      The instance, of hashable values only.

    Raises:
      UserError: A key is unknown or missing, or a value does not fit its field.
    """
    if not isinstance(values, dict):
        where = f"{source}: {prefix.rstrip('.')}" if prefix else source
        raise UserError(f"{where} must be a group of fields, not {values!r:.60}.")
    hints = get_type_hints(kind, include_extras=True)
    for key in values:
        if key not in hints:
            raise UserError(f"{source}: unknown field {f'{prefix}{key}'!r}{nearest(str(key), hints)}.")
    built: dict[str, Any] = {}
    optional = {item.name for item in dataclasses.fields(kind) if stored and _has_default(item)}  # type: ignore[arg-type]
    for key, hint in hints.items():
        name = f"{prefix}{key}"
        if key not in values:
            if key in optional:
                continue
            raise UserError(f"{source}: the field {name!r} is missing.")
        if dataclasses.is_dataclass(hint):
            built[key] = build(hint, values[key], source, f"{name}.", stored=stored)
            continue
        try:
            built[key] = fit(hint, values[key])
        except (ValueError, OverflowError):
            raise UserError(f"{source}: {name} is {values[key]!r}, but it must be {wanted(hint)}.") from None
    return kind(**built)


def _has_default(item: dataclasses.Field) -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


def to_json(config: Any) -> str:
    """Writes a config as JSON, one field a line.

    Args:
      config: Instance of a dataclass.

    Returns:
      JSON text that `build` reads back through `json.loads`.
    """

    def block(values: dict[str, Any], indent: str) -> str:
        lines = [
            f"{indent}  {json.dumps(key)}: "
            + (block(value, indent + "  ") if isinstance(value, dict) else json.dumps(value, ensure_ascii=False))
            for key, value in values.items()
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    return block(to_dict(config), "") + "\n"
