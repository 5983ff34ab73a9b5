"""Voxel grids in mm for the phantom: soft-edged capsules, smooth noise and separable blur."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int

Shape = tuple[int, int, int]
"""Voxels (z, y, x)."""
Point = tuple[float, float, float]
"""(z, y, x) in mm from the centre of the sub-volume."""

Capsule = tuple[Point, Point, tuple[float, float]]
"""From a point to another, and a radius (mm) at each."""

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
        self.edge = math.prod(spacing) ** (1 / 3)
        self.axes = [
            ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            for axis, (n, step) in enumerate(zip(shape, spacing, strict=True))
        ]

    def _within(
        self, low: Float64[np.ndarray, "*n 3"], high: Float64[np.ndarray, "*n 3"]
    ) -> tuple[Int[np.ndarray, "*n 3"], Int[np.ndarray, "*n 3"]]:
        """First voxel between two corners (mm), and the one behind the last; not in this order where there is none."""
        first = np.maximum(np.ceil((low + self.half) / self.spacing), 0)
        last = np.minimum(np.floor((high + self.half) / self.spacing) + 1, self.shape)
        return first.astype(int), last.astype(int)

    def box(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, slice, slice] | None:
        """Voxels between two corners (mm), None where they miss the volume."""
        first, last = self._within(np.array(low), np.array(high))
        if (first >= last).any():
            return None
        z, y, x = map(slice, first.tolist(), last.tolist())
        return z, y, x

    def local(self, box: tuple[slice, slice, slice], origin: Sequence[float]) -> list[np.ndarray]:
        """Positions in the box relative to `origin`, one broadcastable axis each."""
        z, y, x = box
        parts = (self.axes[0][z], self.axes[1][:, y], self.axes[2][:, :, x])
        return [part - np.float32(o) for part, o in zip(parts, origin, strict=True)]

    def capsules(self, out: Float32[np.ndarray, "z y x"], drawn: Sequence[Capsule]) -> None:
        """Raises the coverage `out` (0..1) by tapered capsules.

        Their voxels lie behind each other in one array, so that a step is one call for all of them: a capsule has too
        few for calls of its own.
        """
        if not drawn:
            return
        start, stop, radii = (np.array(part) for part in zip(*drawn, strict=True))
        reach = radii.max(axis=1, keepdims=True) + self.edge / 2
        first, last = self._within(np.minimum(start, stop) - reach, np.maximum(start, stop) + reach)
        inside = (first < last).all(axis=1)
        if not inside.any():
            return
        start, stop, radii, first, last = (part[inside] for part in (start, stop, radii, first, last))
        way = stop - start
        square = (way[:, 0] * way[:, 0] + way[:, 1] * way[:, 1]) + way[:, 2] * way[:, 2] + 1e-6
        # Place of each voxel along the way, and its distance from the start squared, by axis.
        origin, slope = start.astype(np.float32), (way / square[:, None]).astype(np.float32)
        along, apart = [], []
        for axis, line in enumerate(self.axes):
            place = line.ravel() - origin[:, axis, None]
            along.append(place * slope[:, axis, None])
            apart.append(place * place)
        ends = (last - first).prod(axis=1).cumsum().tolist()
        share, distance = np.empty((2, ends[-1]), np.float32)
        boxes = [tuple(map(slice, low, high)) for low, high in zip(first.tolist(), last.tolist(), strict=True)]
        ranges = list(zip([0, *ends], ends, boxes, strict=False))
        for parts, total in ((along, share), (apart, distance)):
            by_capsule = zip(*parts, ranges, strict=True)
            for of_z, of_y, of_x, (begin, end, (z, y, x)) in by_capsule:
                plane = np.add.outer(of_z[z], of_y[y])
                np.add.outer(plane, of_x[x], out=total[begin:end].reshape(*plane.shape, -1))
        counts = np.diff(ends, prepend=0)
        numbers = np.stack(
            [
                square,
                (radii[:, 1] - radii[:, 0]) / self.edge,
                0.5 + radii[:, 0] / self.edge,
                np.minimum(1.0, (radii[:, 0] + radii[:, 1]) / self.edge),
            ]
        )
        squares, taper, surface, fill = np.repeat(numbers.astype(np.float32), counts, axis=1)
        # |p - share way|^2 = |p|^2 + |way|^2 ((share - s)^2 - s^2) with s the unclipped share.
        distance -= squares * share * share
        clipped = np.minimum(np.maximum(share, 0), 1)
        share -= clipped
        share *= share
        share *= squares
        distance += share
        np.maximum(distance, 0, out=distance)
        np.sqrt(distance, out=distance)
        clipped *= taper
        distance *= np.float32(-1 / self.edge)
        distance += clipped
        distance += surface
        np.maximum(distance, 0, out=distance)
        np.minimum(distance, 1, out=distance)
        # A thread thinner than a voxel fills only a part of it.
        distance *= fill
        for begin, end, box in ranges:
            part = out[box]
            np.maximum(part, distance[begin:end].reshape(part.shape), out=part)
