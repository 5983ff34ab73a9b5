"""Quantized weights on disk: one file of bytes and one index, in a format of our own with a version.

DIR/quantized/{index.zlib, weights.bin}, sealed like every checkpoint. Codes take 8 or 4 bits each, their scales bf16,
and whatever no rule names is fp32 as it was: what is served is then what was trained, bit for bit. A balance, which
version 1 did not have, is a byte a column. Each part is packed where that makes it smaller: codes of few bits are not
evenly used, exponents of scales even less, and small models win back their scales. Parts and index are deflated; since
version 3 short parts may be packed by LZMA, the first bytes of all numbers before the second ones. Earlier indexes are
plain, in index.json.
"""

import json
import lzma
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from r1jax.config import Config
from r1jax.errors import UserError
from r1jax.models.quantized import Use, scheme_for
from r1jax.models.vision import kernel_rows
from r1jax.ops.quantize import Quantized, pack_int4, unpack_int4
from r1jax.ops.quantized_dot import Scheme, weight_codes

FOLDER = "quantized"
VERSION = 3
INDEX, PLAIN_INDEX = "index.zlib", "index.json"
SHORT = 2**20
"""Bytes up to which a part is packed by LZMA, which takes long."""
LZMA = {
    "format": lzma.FORMAT_RAW,
    "filters": [{"id": lzma.FILTER_LZMA1, "preset": 9, "dict_size": SHORT, "lc": 0, "lp": 0, "pb": 0}],
}
HELD = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.int8),
    "affine8": np.dtype(np.uint8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
    "power": np.dtype(np.int8),
}
"""Type of each kind of part: of "power" the exponent of 2 on disk, of all others in memory; int4 is two a byte."""
PARTS = {"bf16": "zero", "power": "balance", "fp32": "span"}
"""What follows codes and scales, by its kind."""


def path_of(path: tuple[Any, ...]) -> str:
    """A path of the parameter tree with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_codes(x: Any) -> bool:
    """Whether a leaf of a parameter tree is the codes of a weight."""
    return isinstance(x, Quantized)


def rows_of(weight: Any, use: Use) -> Any:
    """A weight as its rows are rounded: with the axis along which it contracts last."""
    return kernel_rows(jnp.asarray(weight)) if use.role == "convolution" else weight


def weight_of(rows: Any, use: Use) -> Any:
    """Undoes `rows_of`."""
    return rows.reshape(use.shape[-1], *use.shape[:-1]).transpose(1, 2, 3, 0) if use.role == "convolution" else rows


def schemes_of(uses: list[Use]) -> dict[str, tuple[Use, Scheme]]:
    """The ruled weights by name, and how each is rounded; to be called within `rounding_by`."""
    found = {use.name: (use, scheme_for(tuple(use.name.split("/")), use.role, use.shape)) for use in uses}
    return {name: (use, scheme) for name, (use, scheme) in found.items() if scheme is not None}


def with_codes(params: Any, codes: dict[str, Any]) -> Any:
    """The parameter tree with codes, or what they stand for, in the place of the weights that they were made from."""
    return jax.tree_util.tree_map_with_path(lambda path, x: codes.get(path_of(path), x), params)


def holds_codes(config: Config) -> bool:
    """Whether a run keeps the weights that its adapters adapt as codes (QLoRA, Dettmers et al. 2023).

    They never change and are rounded in every product, so that their floats would be of no use; only a run whose first
    part is of floats needs those.
    """
    return bool(config.model.quant and config.model.lora_rank and not config.train.quant_start)


def coded(tree: Any) -> Any:
    """Codes in a tree that Orbax describes or reads, where they are dicts of their fields."""
    if not isinstance(tree, dict):
        return tree
    return Quantized(**tree) if {"values", "scale"} <= tree.keys() else {k: coded(x) for k, x in tree.items()}


def without_codes(params: Any) -> Any:
    """The floats alone: what can change, and has a norm."""
    return jax.tree.map(lambda x: None if is_codes(x) else x, params, is_leaf=is_codes)


encode = jax.jit(weight_codes, static_argnums=1)
"""Codes of one weight to nearest."""


def nearest_codes(params: Any, uses: list[Use]) -> dict[str, Quantized]:
    """Codes of every ruled weight, rounded to nearest as training rounds them; within `rounding_by`."""
    held = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    return {
        name: encode(jnp.asarray(rows_of(held[name], use)), scheme) for name, (use, scheme) in schemes_of(uses).items()
    }


def write_codes(folder: Path, params: Any, kinds: dict[str, str]) -> None:
    """Writes a parameter tree.

    Args:
      folder: To be made.
      params: Floats and codes.
      kinds: Kind of the codes of each weight by name: int8, int4, fp8 or affine8.
    """
    folder.mkdir()
    arrays: dict[str, list[list[Any]]] = {}
    with (folder / "weights.bin").open("wb") as file:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_codes):
            name = path_of(path)
            parts = [(leaf, "fp32")]
            if is_codes(leaf):
                extra = [(getattr(leaf, part), kind) for kind, part in PARTS.items()]
                parts = [(leaf.values, kinds[name]), (leaf.scale, "bf16"), *(p for p in extra if p[0] is not None)]
            arrays[name] = [_write(file, np.asarray(part), kind) for part, kind in parts]
    index = {"version": VERSION, "part": ["kind", "shape", "bytes", "form"], "arrays": arrays}
    (folder / INDEX).write_bytes(zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9))


def _write(file: Any, x: np.ndarray, kind: str) -> list[Any]:
    """Writes a part in the shortest of its forms: plain, deflated, or by LZMA with bytes of like place together."""
    x = np.frexp(x.astype(np.float32))[1] - 1 if kind == "power" else x
    plain = (pack_int4(x) if kind == "int4" else x.astype(HELD[kind])).tobytes()
    forms = [plain, zlib.compress(plain, 9)]
    if len(plain) <= SHORT:
        together = np.frombuffer(plain, np.uint8).reshape(-1, HELD[kind].itemsize).T
        forms.append(lzma.compress(together.tobytes(), **LZMA))
    form = min(range(len(forms)), key=lambda i: len(forms[i]))
    file.write(forms[form])
    return [kind, list(x.shape), len(forms[form]), form]


def read_codes(folder: Path) -> tuple[Any, dict[str, str]]:
    """Reads what `write_codes` wrote.

    Args:
      folder: DIR/quantized, whose checksums have been verified.

    Returns:
      The parameter tree, of NumPy arrays, and the kind of the codes of each weight.

    Raises:
      UserError: The format is of another version.
    """
    if (folder / INDEX).exists():
        index = json.loads(zlib.decompress((folder / INDEX).read_bytes()))
    else:
        index = json.loads((folder / PLAIN_INDEX).read_text())
    if index["version"] not in range(1, VERSION + 1):
        raise UserError(
            f"{folder} has version {index['version']} of the quantized format and this r1jax reads versions up to "
            f"{VERSION}: quantize the checkpoint again"
        )
    tree: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    with (folder / "weights.bin").open("rb") as file:
        for name, parts in index["arrays"].items():
            read = [_read(file, *part) for part in parts]
            if len(parts) > 1:
                kinds[name] = parts[0][0]
            *groups, last = name.split("/")
            inner = tree
            for group in groups:
                inner = inner.setdefault(group, {})
            more = {PARTS[part[0]]: x for part, x in zip(parts[2:], read[2:], strict=True)}
            inner[last] = Quantized(*read[:2], **more) if len(read) > 1 else read[0]
    return tree, kinds


def in_four_bits(tree: Any, kinds: dict[str, str]) -> Any:
    """Codes of 4 bits as JAX's own type of them, two of which a device may keep in a byte.

    Args:
      tree: From `read_codes`, or any part of it with its names from the root.
      kinds: From there too.

    Returns:
      The tree for products in which codes are widened before they are multiplied.
    """

    def narrow(path: tuple[Any, ...], x: Any) -> Any:
        return x._replace(values=x.values.astype(jnp.int4)) if kinds.get(path_of(path)) == "int4" else x

    return jax.tree_util.tree_map_with_path(narrow, tree, is_leaf=is_codes)


def _read(file: Any, kind: str, shape: list[int], size: int, form: int) -> np.ndarray:
    plain = file.read(size)
    if form == 1:
        plain = zlib.decompress(plain)
    elif form == 2:
        together = np.frombuffer(lzma.decompress(plain, **LZMA), np.uint8)
        plain = together.reshape(HELD[kind].itemsize, -1).T.tobytes()
    if kind == "int4":
        return unpack_int4(np.frombuffer(plain, np.uint8), tuple(shape))
    x = np.frombuffer(plain, HELD[kind]).reshape(shape)
    return np.ldexp(np.float32(1), x).astype(HELD["bf16"]) if kind == "power" else x
