"""Renders synthetic chest-CT-like sub-volumes in Hounsfield units (HU): no patient, no scanner.

The picture is composed front to back from analytic shapes with soft edges (partial volume), then blurred by the
scanner's point spread and overlaid with correlated noise. Points are (z, y, x) in mm from the centre of the sub-volume.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int16

from r1jax.data.canvas import Canvas, Capsule, Point, Shape, point_spread, separable, texture

Wall = Literal["none", "chest", "mediastinum"]

GROUND_GLASS_HU = (-640.0, -480.0)
SOLID_HU = (0.0, 70.0)
CALCIFIED_HU = (550.0, 1000.0)


@dataclass(frozen=True)
class Scene:
    """Everything in the picture except the nodule."""

    spacing: Point
    """mm a voxel (z, y, x)."""
    lung_hu: float
    emphysema: float
    """0 none to 1 severe: darker lung with bullae."""
    wall: Wall
    trees: int
    """Vessel trees that enter the sub-volume."""
    vessel_hu: float
    """Blood: about 40 HU plain, up to 250 HU with contrast medium."""
    blur_mm: float
    """Standard deviation of the scanner's point spread."""
    noise_hu: float
    """Standard deviation of the noise in the finished picture."""


@dataclass(frozen=True)
class Nodule:
    """Shape and density of one nodule."""

    place: Point
    """Centre in (-1, 1), as a share of how far from the middle it may lie on each axis."""
    long_axis_mm: float
    roundness: float
    """Shortest through longest axis, (0, 1]."""
    core: float
    """Radius of the solid core as a share of the nodule's: 0 ground glass, 1 solid."""
    softness: float
    """Half width of the margin as a share of the radius, 0 sharp."""
    lobulation: float
    """Amplitude of the low-order harmonics of the radius, 0 smooth."""
    spikes: int
    """Number of radial spikes."""
    calcification: int
    """LIDC pattern: 1 popcorn, 2 laminated, 3 solid, 4 non-central, 5 central, 6 absent."""


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draws surroundings, independently of whether there is a nodule and of the patient record.

    Args:
      rng: Source of randomness.

    Returns:
      The scene; "emphysema" is what this small piece of lung shows, not the patient's diagnosis.
    """
    in_plane = rng.uniform(0.8, 1.4)
    through = rng.uniform(1.0, 2.0)
    kind = rng.random()
    contrast = rng.random() < 0.3
    return Scene(
        spacing=(through, in_plane, in_plane),
        lung_hu=rng.normal(-860.0, 20.0),
        emphysema=rng.uniform(0.2, 1.0) if rng.random() < 0.3 else 0.0,
        wall="chest" if kind < 0.24 else "mediastinum" if kind < 0.34 else "none",
        trees=int(rng.integers(3, 7)),
        vessel_hu=rng.uniform(100, 250) if contrast else rng.uniform(20, 60),
        blur_mm=rng.uniform(0.45, 0.8),
        noise_hu=rng.uniform(8.0, 28.0),
    )


def nodule_center_mm(scene: Scene, nodule: Nodule, shape: Shape) -> Point:
    """Says where the nodule lies: in the central half of each axis and, where it fits, wholly inside.

    Args:
      scene: Gives the voxel size.
      nodule: Gives place and size.
      shape: Voxels (z, y, x).

    Returns:
      (z, y, x) in mm from the centre of the sub-volume.
    """
    center = []
    for share, voxels, step in zip(nodule.place, shape, scene.spacing, strict=True):
        reach = min(voxels * step / 4, max(voxels * step / 2 - nodule.long_axis_mm / 2 - 1.0, 0.0))
        center.append(share * reach)
    z, y, x = center
    return z, y, x


def _unit(vector: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """Scales to length one."""
    return vector / math.sqrt(vector @ vector + 1e-12)


def _step(point: Point, way: Point, length: float) -> Point:
    """Goes `length` from a point along a direction."""
    return point[0] + length * way[0], point[1] + length * way[1], point[2] + length * way[2]


def _turned(way: Point, by: Sequence[float], strength: float) -> Point:
    """Adds `strength` x `by` to a direction and scales it to length one."""
    z, y, x = (w + strength * b for w, b in zip(way, by, strict=True))
    norm = math.sqrt(z * z + y * y + x * x) + 1e-9
    return z / norm, y / norm, x / norm


def _tree(canvas: Canvas, rng: np.random.Generator) -> list[Capsule]:
    """One vessel tree that enters through a face, bends, tapers and forks; a few branches end inside."""
    half = canvas.half.tolist()
    first = (rng.uniform(-1, 1, 3) * canvas.half).tolist()
    face = int(rng.integers(3))
    first[face] = half[face] * (1 if rng.random() < 0.5 else -1)
    toward = _unit(rng.uniform(-0.6, 0.6, 3) * canvas.half - first).tolist()
    thickest = min(max(rng.lognormal(0.0, 0.55), 0.5), 3.6)
    branches: list[tuple[Point, Point, float]] = [(tuple(first), tuple(toward), thickest)]
    drawn: list[Capsule] = []
    # Numbers for up to 12 segments: single draws would cost more than the drawing.
    for chance, normal in zip(rng.random((12, 5)).tolist(), rng.standard_normal((12, 6)).tolist(), strict=True):
        if not branches:
            break
        point, way, radius = branches.pop(0)
        stop = _step(point, way, 5 + 5 * chance[0])
        ends = radius < 0.5 or chance[1] < 0.04
        drawn.append((point, stop, (radius, 0.3 if ends else 0.94 * radius)))
        if ends or any(abs(s) > h + radius for s, h in zip(stop, half, strict=True)):
            continue
        radius *= 0.94
        if chance[2] < 0.4:
            # Murray's law: the cubes of the radii add up at a fork.
            share = 0.25 + 0.5 * chance[3]
            side = normal[3:]
            if chance[4] < 0.5:
                bulge = radius * (1.1 + chance[4])
                drawn.append((stop, stop, (bulge, bulge)))
            bent = _turned(way, normal[:3], 0.15)
            branches.append((stop, _turned(bent, side, 0.7 * (1 - share)), radius * share ** (1 / 3)))
            branches.append((stop, _turned(bent, side, -0.7 * share), radius * (1 - share) ** (1 / 3)))
        else:
            branches.append((stop, _turned(way, normal[:3], 0.22), radius))
    return drawn


def _calcified(
    rng: np.random.Generator, pattern: int, rho: Float32[np.ndarray, "z y x"], place: list[np.ndarray]
) -> Bool[np.ndarray, "z y x"]:
    """Marks calcium; `rho` is 0 at the centre and 1 at the margin, `place` the same with its direction."""

    def blob(offset: float, radius: float) -> np.ndarray:
        center = (offset * _unit(rng.standard_normal(3))).astype(np.float32)
        z, y, x = (part - at for part, at in zip(place, center, strict=True))
        return z * z + y * y + x * x < radius**2

    if pattern == 1:
        grains = [blob(rng.uniform(0.15, 0.65), rng.uniform(0.22, 0.36)) for _ in range(6)]
        return functools.reduce(np.logical_or, grains)
    if pattern == 2:
        return (rho < 0.3) | ((rho > 0.6) & (rho < 0.92))
    if pattern == 3:
        return rho < 1.1
    if pattern == 4:
        return blob(0.5, 0.42)
    return rho < 0.55


def _lobes(rng: np.random.Generator, direction: list[np.ndarray]) -> Float32[np.ndarray, "z y x"]:
    """Sums zonal harmonics (Legendre polynomials) of order 3, 4 and 5 of unit directions about random poles."""
    poles = [_unit(pole).astype(np.float32) for pole in rng.standard_normal((3, 3))]
    third, fourth, fifth = (pole[0] * direction[0] + pole[1] * direction[1] + pole[2] * direction[2] for pole in poles)
    total = third * (2.5 * third * third - 1.5)
    square = fourth * fourth
    total += (4.375 * square - 3.75) * square + 0.375
    square = fifth * fifth
    total += 0.6 * fifth * ((7.875 * square - 8.75) * square + 1.875)
    return 1.3 * total


def _density(
    rng: np.random.Generator, nodule: Nodule, rho: Float32[np.ndarray, "z y x"], place: list[np.ndarray], soft: float
) -> Float32[np.ndarray, "z y x"]:
    """HU inside the nodule; `soft` is the width of the core's margin as a share of the nodule's radius."""
    solid, glass, calcium = (np.float32(rng.uniform(*limits)) for limits in (SOLID_HU, GROUND_GLASS_HU, CALCIFIED_HU))
    if nodule.core == 1:
        density = np.full_like(rho, solid)
    elif nodule.core == 0:
        density = np.full_like(rho, glass)
    else:
        # The core lies off the centre, but inside.
        offset = 0.7 * (1 - nodule.core) * rng.random() * _unit(rng.standard_normal(3))
        z, y, x = (part - np.float32(o) for part, o in zip(place, offset, strict=True))
        inner = 0.5 - (np.sqrt(z * z + y * y + x * x) - np.float32(nodule.core)) / np.float32(soft)
        density = glass + np.clip(inner, 0, 1) * (solid - glass)
    if nodule.calcification < 6:
        density = np.where(_calcified(rng, nodule.calcification, rho, place), calcium, density)
    return density


def _add_nodule(
    canvas: Canvas, rng: np.random.Generator, nodule: Nodule, center: Point, hu: Float32[np.ndarray, "z y x"]
) -> Bool[np.ndarray, "z y x"]:
    """Draws the nodule into `hu` and returns the voxels of its body (spikes left out)."""
    long = nodule.long_axis_mm / 2
    semi_axes = np.array([long, long * rng.uniform(nodule.roundness, 1.0), long * nodule.roundness])
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    mask = np.zeros(canvas.shape, bool)
    soft = max(canvas.edge, 2 * nodule.softness * long)
    reach = 1.25 * long + soft
    box = canvas.box([c - reach for c in center], [c + reach for c in center])
    if box is None:
        return mask
    if nodule.spikes:
        _add_spikes(canvas, rng, nodule, center, turn / semi_axes[:, None], hu)
    z, y, x = canvas.local(box, center)
    # Axes of the ellipsoid: `place` has length `rho`, which is 1 on the surface.
    rows = (turn / semi_axes[:, None]).astype(np.float32)
    place = [z * row[0] + y * row[1] + x * row[2] for row in rows]
    rho = np.sqrt(place[0] * place[0] + place[1] * place[1] + place[2] * place[2]) + np.float32(1e-3)
    if nodule.lobulation > 0:
        margin = 1 + np.float32(nodule.lobulation) * _lobes(rng, [part / rho for part in place])
        rho = rho / margin
        place = [part / margin for part in place]
    depth = (rho - 1) / rho * np.sqrt((z * z + y * y) + x * x)
    density = _density(rng, nodule, rho, place, soft / long)
    cover = np.clip(0.5 - depth / np.float32(soft), 0, 1)
    behind = hu[box]
    # Vessels show through ground glass and are hidden in solid tissue.
    density = np.where(density < -200, np.maximum(density, behind), density)
    hu[box] = behind + cover * (density - behind)
    mask[box] = depth <= 0
    return mask


def _add_spikes(
    canvas: Canvas,
    rng: np.random.Generator,
    nodule: Nodule,
    center: Point,
    scaled: Float[np.ndarray, "3 3"],
    hu: Float32[np.ndarray, "z y x"],
) -> None:
    """Draws thin tapering radial spikes from the surface; `scaled` maps mm to where the nodule is a unit sphere."""
    drawn: list[Capsule] = []
    # In a solid nodule they start below the surface, so that no gap shows.
    root = 0.6 if nodule.core == 1 else 0.95
    for _ in range(nodule.spikes):
        direction = _unit(rng.standard_normal(3))
        z, y, x = direction.tolist()
        surface = 1 / math.sqrt(((scaled @ direction) ** 2).sum())
        length = surface + rng.uniform(2.5, 4.5) + rng.uniform(0.1, 0.5) * surface
        thickness = rng.uniform(0.8, 1.2) + 0.05 * surface
        ends = _step(center, (z, y, x), root * surface), _step(center, (z, y, x), length)
        drawn.append((*ends, (thickness, 0.15)))
    cover = np.zeros(canvas.shape, np.float32)
    canvas.capsules(cover, drawn)
    density = np.float32(-20 if nodule.core > 0 else -420)
    hu += cover * np.maximum(density - hu, 0)


def _add_wall(
    canvas: Canvas,
    rng: np.random.Generator,
    ribs: bool,
    keep: Point,
    distance: float,
    hu: Float32[np.ndarray, "z y x"],
) -> Bool[np.ndarray, "z y x"]:
    """Draws curved soft tissue with fat and ribs no nearer than `distance` (mm) to the point `keep`; returns where."""
    normal = _unit(rng.standard_normal(3) * np.array([0.35, 1.0, 1.0]))
    radius = rng.uniform(60, 130)
    depth = float(np.abs(normal) @ canvas.half) * rng.uniform(0.25, 0.8)
    depth = max(depth, float(normal @ np.array(keep)) + distance)
    z, y, x = canvas.local((slice(None),) * 3, ((depth - radius) * normal).tolist())
    wavy = texture(rng, canvas.shape, 4)
    beyond = np.sqrt((z * z + y * y) + x * x) - np.float32(radius) + 0.6 * wavy
    tissue = rng.uniform(30, 60) + 8 * wavy
    if ribs:
        fat_from = rng.uniform(2.5, 5.0)
        muscle = rng.uniform(8, 15)
        fat = (beyond > fat_from + 0.8 * wavy) & (beyond < fat_from + 1.5) | (beyond > muscle + 2 * wavy)
        tissue = np.where(fat, np.float32(rng.uniform(-115, -85)), tissue)
        run = z + np.float32(rng.uniform(-0.4, 0.4)) * (x if abs(normal[1]) > abs(normal[2]) else y)
        along = (run - np.float32(rng.uniform(-12, 12)) + 12) % 24 - 12
        bone = np.sqrt((along / np.float32(rng.uniform(4.5, 6.5))) ** 2 + ((beyond - 6.5) / np.float32(3.6)) ** 2)
        cortex, marrow = rng.uniform(500, 900), rng.uniform(120, 320)
        inside = marrow + np.clip(4 * bone - 2.4, 0, 1) * np.float32(cortex - marrow)
        tissue += np.clip(5.5 - 5 * bone, 0, 1) * (inside - tissue)
    cover = np.clip(0.5 + beyond / np.float32(canvas.edge), 0, 1)
    hu += cover * (tissue - hu)
    return beyond > 0


def render(
    scene: Scene, nodule: Nodule | None, shape: Shape, rng: np.random.Generator, spare: Nodule | None = None
) -> tuple[Int16[np.ndarray, "z y x"], Bool[np.ndarray, "z y x"]]:
    """Renders one sub-volume.

    Args:
      scene: Lung, vessels, wall and scanner.
      nodule: The nodule, None for a case without one.
      shape: Voxels (z, y, x).
      rng: Draws all that the parameters leave open.
      spare: The nodule for which the wall leaves room although it is not drawn, so that walls lie alike with and
        without a nodule; by default the nodule itself.

    Returns:
      The volume in HU, and the nodule's body (all False without a nodule).
    """
    canvas = Canvas(shape, scene.spacing)
    grain = texture(rng, shape, 12)
    hu = scene.lung_hu + 18 * texture(rng, shape, 4) + 24 * grain + 9 * grain * grain
    if scene.emphysema > 0:
        holes = np.clip(texture(rng, shape, 7) - 0.4, 0, 1)
        hu -= np.float32(scene.emphysema) * (30 + 90 * holes)
    hu = hu.astype(np.float32)
    cover = np.zeros(shape, np.float32)
    canvas.capsules(cover, [capsule for _ in range(scene.trees) for capsule in _tree(canvas, rng)])
    hu += cover * (np.float32(scene.vessel_hu) - hu)
    mask = np.zeros(shape, bool)
    room = nodule or spare
    center = nodule_center_mm(scene, room, shape) if room else (0.0, 0.0, 0.0)
    if nodule:
        mask = _add_nodule(canvas, rng, nodule, center, hu)
    if scene.wall != "none":
        distance = room.long_axis_mm / 2 * rng.uniform(0.9, 1.6) if room else 0.0
        mask &= ~_add_wall(canvas, rng, scene.wall == "chest", center, distance, hu)
    z, y, x = (point_spread(n, scene.blur_mm / step) for n, step in zip(shape, scene.spacing, strict=True))
    kept = math.prod(float(np.linalg.norm(row[len(row) // 2])) for row in (z, y, x))
    hu += np.float32(scene.noise_hu / kept) * rng.standard_normal(shape, dtype=np.float32)
    hu = separable(hu, (z, y, x))
    return np.rint(np.clip(hu, -1024, 2000)).astype(np.int16), mask
