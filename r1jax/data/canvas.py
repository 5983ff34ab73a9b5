"""Voxel grids in mm for the phantom: soft-edged capsules, smooth noise and separable blur."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

Shape = tuple[int, int, int]
"""Voxels (z, y, x)."""
Point = tuple[float, float, float]
"""(z, y, x) in mm from the centre of the sub-volume."""


SPECK = np.float32(1e-30)
"""Weights below count for nothing in a sum of HU, and below 1e-38 a processor takes many times as long for each."""


@functools.lru_cache(maxsize=64)
def _interpolation(fine: int, coarse: int) -> Float32[np.ndarray, "fine coarse"]:
    """Rows that spread `coarse` samples smoothly (Gaussian weights, unit variance kept) over `fine` voxels."""
    position = np.linspace(0.5, coarse - 1.5, fine)[:, None]
    weight = np.exp(-0.5 * ((position - np.arange(coarse)) / 0.6) ** 2)
    rows = (weight / np.linalg.norm(weight, axis=1, keepdims=True)).astype(np.float32)
    return _without_specks(rows)


def _without_specks(rows: Float32[np.ndarray, "a b"]) -> Float32[np.ndarray, "a b"]:
    return np.where(rows < SPECK, 0, rows)


def point_spread(voxels: int, sigma: float) -> Float32[np.ndarray, "voxels voxels"]:
    """Rows of a one-dimensional Gaussian blur of `sigma` voxels; what would leave at the border is renormalised."""
    offset = np.arange(voxels, dtype=np.float32)
    weight = np.exp(-0.5 * ((offset[:, None] - offset) / np.float32(sigma)) ** 2)
    rows = weight / weight.sum(axis=1, keepdims=True)
    return _without_specks(rows)


def separable(
    volume: Float32[np.ndarray, "a b c"],
    rows: tuple[Float32[np.ndarray, "z a"], Float32[np.ndarray, "y b"], Float32[np.ndarray, "x c"]],
) -> Float32[np.ndarray, "z y x"]:
    """Applies one matrix along each axis."""
    along_z, along_y, along_x = rows
    out = along_y @ (volume @ along_x.T)
    # A stack of small products: BLAS would split one large product over threads, at many times the cost.
    return np.ascontiguousarray((along_z @ out.swapaxes(0, 1)).swapaxes(0, 1))


def texture(rng: np.random.Generator, shape: Shape, coarse: int) -> Float32[np.ndarray, "z y x"]:
    """Smooth noise of unit variance with about `coarse` grains along each axis."""
    grains = rng.standard_normal((coarse + 1,) * 3, dtype=np.float32)
    along_z, along_y, along_x = (_interpolation(n, coarse + 1) for n in shape)
    return separable(grains, (along_z, along_y, along_x))


class Canvas:
    """Voxel positions in mm, and the drawing of soft-edged shapes inside their bounding boxes."""

    def __init__(self, shape: Shape, spacing: Point):
        self.shape = shape
        self.spacing = spacing
        self.half = np.array([(n - 1) / 2 * step for n, step in zip(shape, spacing, strict=True)])
        self.grid = list(zip(self.half.tolist(), spacing, shape, strict=True))
        self.edge = math.prod(spacing) ** (1 / 3)
        self.axes = [
            ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            for axis, (n, step) in enumerate(zip(shape, spacing, strict=True))
        ]

    def box(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, slice, slice] | None:
        """Voxels between two corners (mm), None where they miss the volume."""
        slices = []
        for least, most, (half, step, voxels) in zip(low, high, self.grid, strict=True):
            start = max(math.ceil((least + half) / step), 0)
            stop = min(math.floor((most + half) / step) + 1, voxels)
            if start >= stop:
                return None
            slices.append(slice(start, stop))
        z, y, x = slices
        return z, y, x

    def local(self, box: tuple[slice, slice, slice], origin: Sequence[float]) -> list[np.ndarray]:
        """Positions in the box relative to `origin`, one broadcastable axis each."""
        z, y, x = box
        parts = (self.axes[0][z], self.axes[1][:, y], self.axes[2][:, :, x])
        return [part - np.float32(o) for part, o in zip(parts, origin, strict=True)]

    def capsule(
        self,
        out: Float32[np.ndarray, "z y x"],
        start: Point,
        stop: Point,
        radii: tuple[float, float],
    ) -> None:
        """Raises the coverage `out` (0..1) by a tapered capsule from `start` to `stop` with a radius (mm) at each."""
        reach = max(radii) + self.edge / 2
        low = [min(a, b) - reach for a, b in zip(start, stop, strict=True)]
        box = self.box(low, [max(a, b) + reach for a, b in zip(start, stop, strict=True)])
        if box is None:
            return
        way = [b - a for a, b in zip(start, stop, strict=True)]
        square = sum(w * w for w in way) + 1e-6
        z, y, x = self.local(box, start)
        share = (z * np.float32(way[0] / square) + y * np.float32(way[1] / square)) + x * np.float32(way[2] / square)
        distance = (z * z + y * y) + x * x
        # |p - share way|^2 = |p|^2 + |way|^2 ((share - s)^2 - s^2) with s the unclipped share.
        distance -= np.float32(square) * share * share
        clipped = np.minimum(np.maximum(share, 0), 1)
        share -= clipped
        share *= share
        share *= np.float32(square)
        distance += share
        np.maximum(distance, 0, out=distance)
        np.sqrt(distance, out=distance)
        # A thread thinner than a voxel fills only a part of it.
        fill = min(1.0, (radii[0] + radii[1]) / self.edge)
        clipped *= np.float32((radii[1] - radii[0]) / self.edge)
        distance *= np.float32(-1 / self.edge)
        distance += clipped
        distance += np.float32(0.5 + radii[0] / self.edge)
        np.maximum(distance, 0, out=distance)
        np.minimum(distance, 1, out=distance)
        distance *= np.float32(fill)
        np.maximum(out[box], distance, out=out[box])
