"""Whether the tensors of a folder are those of the decoder; everything that is wrong is said at once."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.hf.config import FP8_BLOCK
from r1jax.hf.files import DTYPES, FP8, Stored
from r1jax.hf.names import IGNORED, copies, layout

SCALE = "_scale_inv"
LISTED = 20
"""Names that an error lists before it only counts."""


def match(folder: Path, tensors: dict[str, Stored], config: DecoderConfig) -> None:
    """Compares names, shapes and dtypes.

    Args:
      folder: Where the tensors lie, for error messages.
      tensors: All tensors of the folder by name.
      config: The decoder.

    Raises:
      UserError: Lists missing, surplus and misshapen tensors and those of a dtype that weights cannot have.
    """
    shapes = {piece.name: piece.shape for leaf in layout(config) for piece in leaf.pieces}
    optional = {copy: shapes[main] for copy, main in copies(config).items() if copy in tensors}
    expected = shapes | optional
    missing = [name for name in expected if name not in tensors]
    wrong_shape, wrong_dtype, scales = [], [], set()
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != shape:
            wrong_shape.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
        if tensor.dtype not in DTYPES:
            wrong_dtype.append(f"{name} {tensor.dtype}")
        if tensor.dtype == FP8:
            scales.add(name + SCALE)
            scale, grid = tensors.get(name + SCALE), [-(-n // FP8_BLOCK) for n in shape]
            if scale is None:
                missing.append(name + SCALE)
            elif len(shape) != 2 or list(scale.shape) != grid:
                wrong_shape.append(f"{name + SCALE} {list(scale.shape)} instead of {grid}")
            elif scale.dtype != "F32":
                wrong_dtype.append(f"{name + SCALE} {scale.dtype}")
    known = expected.keys() | scales | _left_out(tensors, config)
    surplus = [name for name in tensors if name not in known and not IGNORED.fullmatch(name)]
    found = {tensors[name].dtype for name in expected if name in tensors}
    mixed = ["F16 and BF16 in one checkpoint"] if {"F16", "BF16"} <= found else []
    told = {"missing": missing, "surplus": surplus, "of another shape": wrong_shape, "of a wrong dtype": wrong_dtype}
    parts = [f"{what}: {_listed(names)}" for what, names in (told | {"not allowed": mixed}).items() if names]
    if parts:
        raise UserError(f"the tensors of {folder} are not those of its config; {'; '.join(parts)}.")


def _left_out(tensors: dict[str, Stored], config: DecoderConfig) -> set[str]:
    """Names of a multi-token prediction module that the config says to leave out."""
    eh_proj = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    if config.num_nextn_predict_layers or eh_proj not in tensors:
        return set()
    full = replace(config, num_nextn_predict_layers=1)
    names = {piece.name for leaf in layout(full) if leaf.path[0] == "mtp" for piece in leaf.pieces} | set(copies(full))
    return names | {name + SCALE for name in names}


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
