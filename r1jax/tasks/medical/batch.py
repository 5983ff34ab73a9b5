"""From raw cases to what the model reads: collation on the host, windowing and augmentation on the device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, Shaped

from r1jax.config import Config
from r1jax.data import tokenizer
from r1jax.errors import UserError
from r1jax.models.r1 import Inputs
from r1jax.tasks.medical.schema import RECORD_FIELDS

HU_WINDOW = (-1000.0, 400.0)
PICTURES = ("volume", "image")
Targets = dict[str, Any]


def collate(raw: dict[str, Any], config: Config, fields: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Turns a source's batch into a flat dict of arrays of the modalities that the model reads.

    A modality that the source lacks is missing in every case.

    Args:
      raw: What `Source.read_batch` returned.
      config: Model and task.
      fields: Findings to learn.

    Returns:
      Arrays with a leading batch axis: raw integers for pictures, standardised table, tokens, `target.*`.

    Raises:
      UserError: A case has nothing that the model reads.
    """
    count = len(raw["case_id"])
    batch: dict[str, np.ndarray] = {}
    for name in PICTURES:
        if name in config.model.modalities:
            size = getattr(config.model, name).size
            batch[name] = raw.get(name, np.zeros((count, *size), np.int16))
            batch[f"{name}_spacing"] = raw.get(f"{name}_spacing", np.ones((count, len(size)), np.float32))
            batch[f"has_{name}"] = raw.get(f"has_{name}", np.full(count, name in raw))
    if "table" in config.model.modalities:
        center = np.array([f.center for f in RECORD_FIELDS], np.float32)
        scale = np.array([f.scale for f in RECORD_FIELDS], np.float32)
        table = raw.get("table", np.full((count, len(RECORD_FIELDS)), np.nan, np.float32))
        batch["table"] = ((table - center[None]) / scale[None]).astype(np.float32)
        batch["has_table"] = ~np.all(np.isnan(table), axis=1)
    if "text" in config.model.modalities:
        batch["text"], batch["text_valid"] = tokenizer.encode_batch(
            raw.get("text", [""] * count), config.model.text_tokens
        )
    present = [v for k, v in batch.items() if k.startswith("has_")]
    present += [batch["text_valid"].any(axis=1)] if "text" in batch else []
    empty = np.flatnonzero(~np.any(present, axis=0))
    if empty.size:
        raise UserError(
            f"case {raw['case_id'][empty[0]]!r} has none of the modalities that the model reads "
            f"({', '.join(config.model.modalities)}); remove it or give it an image or a record"
        )
    for name in fields:
        batch[f"target.{name}"] = raw[f"target.{name}"].astype(np.float32)
    return batch


def window(x: Array) -> Float[Array, "..."]:
    """Maps HU (int16) or windowed bytes (uint8) to -1..1."""
    low, high = HU_WINDOW
    if x.dtype == jnp.uint8:
        return x.astype(jnp.float32) / 127.5 - 1
    return (jnp.clip(x.astype(jnp.float32), low, high) - low) * (2 / (high - low)) - 1


def fit(x: Float[Array, "B ..."], size: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Crops about the centre, or pads with the lowest value (air), to `size`."""
    for axis, want in enumerate(size, start=1):
        have = x.shape[axis]
        if have > want:
            start = (have - want) // 2
            x = jax.lax.slice_in_dim(x, start, start + want, axis=axis)
        elif have < want:
            before = (want - have) // 2
            pads = [(0, 0)] * x.ndim
            pads[axis] = (before, want - have - before)
            x = jnp.pad(x, pads, constant_values=-1.0)
    return x


def fitted_middle(have: tuple[int, ...], want: tuple[int, ...]) -> tuple[float, ...]:
    """How far `fit` moves the middle: voxels from the middle of what it gives to that of the original, each axis.

    0.5 where an odd number of voxels is cut off, -0.5 where one is added, else 0.
    """
    lost = zip(have, want, strict=True)
    return tuple(0.0 if (a - b) % 2 == 0 else 0.5 if a > b else -0.5 for a, b in lost)


def _per_case(values: Shaped[Array, " B"], x: Array) -> Array:
    """One value a case, shaped to meet whole cases of x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def orient(
    x: Float[Array, "B ..."], flips: Bool[Array, "B rank"], transpose: Bool[Array, " B"]
) -> Float[Array, "B ..."]:
    """Mirrors along the chosen axes, then swaps the last two, if equally long, where `transpose` says so."""
    for axis in range(flips.shape[1]):
        x = jnp.where(_per_case(flips[:, axis], x), jnp.flip(x, axis + 1), x)
    if x.shape[-1] != x.shape[-2]:
        return x
    return jnp.where(_per_case(transpose, x), jnp.swapaxes(x, -1, -2), x)


def orient_vector(
    vector: Float[Array, "B rank"], flips: Bool[Array, "B rank"], transpose: Bool[Array, " B"]
) -> Float[Array, "B rank"]:
    """What `orient` does to an offset from the centre."""
    vector = jnp.where(flips, -vector, vector)
    return swap_in_plane(vector, transpose)


def swap_in_plane(vector: Float[Array, "B rank"], transpose: Bool[Array, " B"]) -> Float[Array, "B rank"]:
    """Swaps the last two components where `transpose` says so."""
    swapped = jnp.concatenate([vector[:, :-2], vector[:, -1:], vector[:, -2:-1]], axis=1)
    return jnp.where(transpose[:, None], swapped, vector)


def unorient_vector(
    vector: Float[Array, "B rank"], flips: Bool[Array, "B rank"], transpose: Bool[Array, " B"]
) -> Float[Array, "B rank"]:
    """Undoes `orient_vector`."""
    vector = swap_in_plane(vector, transpose)
    return jnp.where(flips, -vector, vector)


def view_of(index: int, batch: Any, rank: int) -> tuple[Bool[Array, "B rank"], Bool[Array, " B"]]:
    """Flips and transposition of the index-th of the eight in-plane orientations; 0 is the identity.

    The batch is a number, or its symbol in a program that is exported.
    """
    flips = jnp.zeros((batch, rank), bool)
    flips = flips.at[:, -1].set(bool(index & 1)).at[:, -2].set(bool(index & 2))
    return flips, jnp.full(batch, bool(index & 4))


def fold_in(keys: Key[Array, " B"], number: int) -> Key[Array, " B"]:
    """New keys, one from each case's key."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def uniform(keys: Key[Array, " B"], shape: tuple[int, ...] = (), **bounds: float) -> Float[Array, "B ..."]:
    """Draws [B, *shape], each case's numbers from its own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, **bounds))(keys)


def _warp(
    keys: Key[Array, " B"], x: Float[Array, "B ..."], spacing: Float[Array, "B rank"], zoom: Float[Array, " B"] | None
) -> tuple[Float[Array, "B ..."], Float[Array, "B 2 2"], Float[Array, "B rank"], Float[Array, " B"]]:
    """Random turn in plane, zoom 0.85 to 1.18 if none is given, shift of up to 8 % of the edge; interpolates linearly.

    Returns:
      The warped pictures; the in-plane rotation, shift in mm and zoom, so that a point p moves to zoom R (p - shift).
    """
    size = x.shape[1:]
    rank = len(size)
    angles, zooms, shifts = (fold_in(keys, i) for i in range(3))
    angle = uniform(angles, maxval=2 * np.pi)
    if zoom is None:
        zoom = jnp.exp(uniform(zooms, minval=-0.165, maxval=0.165))
    edge = jnp.asarray(size, jnp.float32)
    shift = uniform(shifts, (rank,), minval=-0.08, maxval=0.08) * edge[None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    middle = (edge - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(n, dtype=jnp.float32) for n in size], indexing="ij"), -1)
    offset = grid.reshape(-1, rank) - middle[None]

    def sample(
        case: Array,
        rotation: Float[Array, "2 2"],
        shift: Float[Array, " rank"],
        zoom: Float[Array, ""],
        spacing: Float[Array, " rank"],
    ) -> Array:
        # The turn is a turn in mm, so that a voxel that is not square does not shear the picture.
        plane = offset[:, -2:] * spacing[None, -2:] @ rotation / spacing[None, -2:]
        source = jnp.concatenate([offset[:, :-2], plane], axis=1) / zoom + (middle + shift)[None]
        coordinates = [source[:, i] for i in range(rank)]
        return jax.scipy.ndimage.map_coordinates(case, coordinates, order=1, mode="nearest").reshape(case.shape)

    warped = jax.vmap(sample)(x, rotation, shift, zoom, spacing)
    return warped, rotation, shift * spacing, zoom


def augment(
    keys: Key[Array, " B"],
    x: Float[Array, "B ..."],
    spacing: Float[Array, "B rank"],
    targets: Targets,
    mode: str,
    zoom: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B ..."], Float[Array, "B rank"], Targets, Float[Array, " B"] | None]:
    """Mirrors, turns and, for `affine`, warps the pictures, and moves centre and size targets with them.

    Args:
      keys: A key for each case.
      x: Pictures, windowed.
      spacing: mm a voxel.
      targets: Findings.
      mode: flips or affine.
      zoom: That of another picture of the same cases, with which the targets have grown already; None draws it.

    Returns:
      Pictures, spacing, targets and, for `affine`, the zoom.
    """
    rank = x.ndim - 1
    turn, warp, contrast, swap = (fold_in(keys, i) for i in range(4))
    center = targets.get("center_mm") if rank == 3 else None
    if mode == "affine":
        grown = zoom is not None
        x, rotation, shift, zoom = _warp(warp, x, spacing, zoom)
        if center is not None:
            moved = center - shift
            plane = jnp.einsum("Bij,Bj->Bi", rotation, moved[:, 1:])
            center = zoom[:, None] * jnp.concatenate([moved[:, :1], plane], axis=1)
        if "long_axis_mm" in targets and not grown:
            targets = targets | {"long_axis_mm": targets["long_axis_mm"] * zoom}
        gain, lift = uniform(contrast, (2,), minval=-0.15, maxval=0.15).T
        x = x * _per_case(jnp.exp(gain), x) + _per_case(lift, x)
    flips = uniform(turn, (rank,)) < 0.5
    transpose = (uniform(swap) < 0.5) & (x.shape[-1] == x.shape[-2])
    x, spacing = orient(x, flips, transpose), swap_in_plane(spacing, transpose)
    if center is not None:
        targets = targets | {"center_mm": orient_vector(center, flips, transpose)}
    return x, spacing, targets, zoom


def hide(inputs: Inputs, images: Bool[Array, " B"], record: Bool[Array, " B"]) -> Inputs:
    """Hides the pictures or the record of the chosen cases."""
    changes: dict[str, Array] = {}
    for name, gone in (("has_volume", images), ("has_image", images), ("has_table", record)):
        has = getattr(inputs, name)
        if has is not None:
            changes[name] = has & ~gone
    if inputs.text_valid is not None:
        changes["text_valid"] = inputs.text_valid & ~record[:, None]
    return inputs._replace(**changes)


def has_pictures(inputs: Inputs) -> Bool[Array, " B"]:
    """Cases with a volume or an image."""
    flags = [has for has in (inputs.has_volume, inputs.has_image) if has is not None]
    return jnp.any(jnp.stack(flags), axis=0) if flags else jnp.zeros((), bool)


def has_record(inputs: Inputs) -> Bool[Array, " B"]:
    """Cases with a table or a text."""
    flags = [] if inputs.has_table is None else [inputs.has_table]
    flags += [] if inputs.text_valid is None else [jnp.any(inputs.text_valid, axis=1)]
    return jnp.any(jnp.stack(flags), axis=0) if flags else jnp.zeros((), bool)
