"""Slices of a case as SVG in millimetres: grey picture, circles of the model and of the truth, saliency."""

import base64
from dataclasses import dataclass
from html import escape
from io import BytesIO

import matplotlib
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

LUNG_WINDOW = (-1000.0, 400.0)
"""HU shown from black to white; uint8 pixels are this window already."""
_SIDE = {2: 256, 3: 128}
"""Pixels of the longer side at most (image, volume): larger ones are thinned, so that the page stays small."""
_PLANES = (("axial", 0, "z"), ("coronal", 1, "y"), ("sagittal", 2, "x"))


@dataclass(frozen=True)
class Marker:
    """Where a nodule is: centre in voxels (array order, the middle of the first voxel is 0) and long axis in mm."""

    center: tuple[float, ...]
    long_axis_mm: float | None


@dataclass(frozen=True)
class Picture:
    """One case of the gallery; `predicted` is None where the model calls no nodule, `truth` where there is none."""

    case_id: str
    outcome: str
    """What the model did here, as `pick_cases` words it; any other word is shown as it is."""
    pixels: Shaped[np.ndarray, "*sizes"]
    """[Z, Y, X] or [Y, X]: HU, or uint8 of the window -1000..400."""
    spacing: tuple[float, ...]
    """mm per voxel, in array order."""
    predicted: Marker | None = None
    truth: Marker | None = None
    saliency: Float[np.ndarray, "*sizes"] | None = None
    """How much each voxel matters, in any unit; its size counts, not its sign."""
    report: str = ""
    """The report's text; line breaks are kept."""
    facts: tuple[tuple[str, str, str], ...] = ()
    """Finding, what the model says, what is true."""


def slices(picture: Picture) -> list[tuple[str, str]]:
    """Slices through the true centre, else the predicted one, else the middle.

    Returns:
      Name and SVG of each: three planes of a volume or the image itself, and then the same with the saliency.
    """
    shape, marker = picture.pixels.shape, picture.truth or picture.predicted
    focus = [(size - 1) / 2 for size in shape] if marker is None else marker.center
    at = [int(np.clip(round(center), 0, size - 1)) for center, size in zip(focus, shape, strict=True)]
    if picture.pixels.ndim == 2:
        planes = [("image", None, "image")]
    else:
        planes = [(name, axis, f"{name}, {letter} {at[axis]}") for name, axis, letter in _PLANES]
    heat = None if picture.saliency is None else _normalized(picture.saliency)
    plain, overlaid = [], []
    for name, axis, label in planes:
        grey = _png(_window(_cut(picture.pixels, axis, at)), "gray")
        circles = [_circle(picture.truth, picture.spacing, axis, at, "truth")]
        circles += [_circle(picture.predicted, picture.spacing, axis, at, "model")]
        height, width = (
            size * step for k, (size, step) in enumerate(zip(shape, picture.spacing, strict=True)) if k != axis
        )
        plain.append((label, _svg(width, height, [grey], circles, f"{label}: {picture.outcome}")))
        if heat is not None:
            glow = _png((_cut(heat, axis, at) * 255).astype(np.uint8), "inferno")
            overlaid.append((f"{name} + saliency", _svg(width, height, [grey, glow], [], f"saliency, {label}")))
    return plain + overlaid


def _cut(values: Shaped[np.ndarray, "..."], axis: int | None, at: list[int]) -> Shaped[np.ndarray, "rows columns"]:
    plane = values if axis is None else np.take(values, at[axis], axis=axis)
    step = -(-max(plane.shape) // _SIDE[values.ndim])
    return plane[::step, ::step]


def _window(pixels: Shaped[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns"]:
    if pixels.dtype == np.uint8:
        return pixels
    low, high = LUNG_WINDOW
    return np.clip((np.nan_to_num(pixels.astype(np.float32)) - low) / (high - low) * 255, 0, 255).astype(np.uint8)


def _normalized(saliency: Float[np.ndarray, "*sizes"]) -> Float[np.ndarray, "*sizes"]:
    """Magnitude over its 99.9th percentile, so that single voxels do not hide the rest; 0 to 1."""
    size = np.abs(np.nan_to_num(saliency.astype(np.float64), posinf=0.0, neginf=0.0))
    top = np.quantile(size, 0.999) or size.max() or 1.0
    return np.clip(size / top, 0, 1)


def _png(values: UInt8[np.ndarray, "rows columns"], palette: str) -> str:
    """A data URI; all palettes but gray fade to transparent at 0."""
    image = Image.fromarray(values if palette == "gray" else values // 8 * 8)
    options = {}
    if palette != "gray":
        colors = (matplotlib.colormaps[palette](np.linspace(0.15, 1, 256))[:, :3] * 255).astype(np.uint8)
        image.putpalette(colors.tobytes())
        options["transparency"] = (np.clip(np.linspace(-0.1, 1, 256), 0, 1) * 190).astype(np.uint8).tobytes()
    out = BytesIO()
    image.save(out, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _circle(marker: Marker | None, spacing: tuple[float, ...], axis: int | None, at: list[int], kind: str) -> str:
    """What a sphere of the long axis leaves in the slice; a faint cross where it lies beside the slice."""
    if marker is None:
        return ""
    y, x = ((c + 0.5) * step for k, (c, step) in enumerate(zip(marker.center, spacing, strict=True)) if k != axis)
    away = 0.0 if axis is None else (marker.center[axis] - at[axis]) * spacing[axis]
    squared = (marker.long_axis_mm or 0.0) ** 2 / 4 - away**2
    if squared > 0:
        return f'<circle class="{kind}" cx="{x:.2f}" cy="{y:.2f}" r="{squared**0.5:.2f}"/>'
    return f'<path class="{kind} beside" d="M{x - 1.5:.2f} {y:.2f}h3M{x:.2f} {y - 1.5:.2f}v3"/>'


def _svg(width: float, height: float, layers: list[str], marks: list[str], label: str) -> str:
    """Layers over each other, marks on top and a bar of 10 mm (or 1 mm in tiny pictures)."""
    images = "".join(
        f'<image href="{layer}" width="{width:.3f}" height="{height:.3f}" preserveAspectRatio="none"/>'
        for layer in layers
    )
    bar, edge = (10 if width > 20 else 1), width * 0.04
    scale = f'<path class="scale" d="M{edge:.2f} {height - edge:.2f}h{bar}"/>'
    box = f'viewBox="0 0 {width:.3f} {height:.3f}" role="img" aria-label="{escape(label)}"'
    return f"<svg {box}>{images}{''.join(marks)}{scale}</svg>"
