"""Slices of a case: the right plane, window, circle and overlay."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from r1jax.serve.page_slices import Marker, Picture, slices

SPACING = (2.0, 1.0, 0.5)


def picture(**changes):
    volume = np.random.default_rng(0).integers(-1200, 600, (10, 12, 14)).astype(np.int16)
    given = {"case_id": "a", "outcome": "true positive", "pixels": volume, "spacing": SPACING, **changes}
    return Picture(**given)


def images(svg):
    """Pixels of each layer, RGBA."""
    layers = []
    for data in re.findall(r'href="data:image/png;base64,([^"]+)"', svg):
        layers.append(np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")))
    return layers


def shapes(svg, kind):
    """Circles and crosses of a class, as attributes."""
    return [dict(e.items()) for e in ElementTree.fromstring(svg) if e.get("class", "").split(" ")[0] == kind]


def test_three_planes_through_the_true_centre_in_the_lung_window():
    case = picture(truth=Marker((2.0, 5.0, 11.0), 6.0), predicted=Marker((4.0, 4.0, 4.0), 6.0))
    drawn = dict(slices(case))
    assert list(drawn) == ["axial, z 2", "coronal, y 5", "sagittal, x 11"]
    planes = [case.pixels[2], case.pixels[:, 5], case.pixels[:, :, 11]]
    for svg, plane in zip(drawn.values(), planes, strict=True):
        expected = np.clip((plane + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(images(svg)[0][..., 0], expected)


def test_drawn_to_scale_in_mm():
    drawn = dict(slices(picture()))
    boxes = [ElementTree.fromstring(svg).get("viewBox") for svg in drawn.values()]
    assert boxes == ["0 0 7.000 12.000", "0 0 7.000 20.000", "0 0 12.000 20.000"]


def test_circle_is_the_cross_section_of_a_sphere():
    """Model's centre 1 voxel of 2 mm beside the axial slice: a radius of 3 mm leaves sqrt(9 - 4) mm."""
    case = picture(truth=Marker((2.0, 5.0, 11.0), 8.0), predicted=Marker((3.0, 6.0, 10.0), 6.0))
    axial, coronal, _ = (svg for _, svg in slices(case))
    (truth,), (model,) = shapes(axial, "truth"), shapes(axial, "model")
    assert (truth["cx"], truth["cy"], truth["r"]) == ("5.75", "5.50", "4.00")
    assert (model["cx"], model["cy"], model["r"]) == ("5.25", "6.50", f"{5**0.5:.2f}")
    (model,) = shapes(coronal, "model")
    assert (model["cx"], model["cy"], model["r"]) == ("5.25", "7.00", f"{8**0.5:.2f}")


def test_what_lies_beside_the_slice_is_a_cross():
    case = picture(truth=Marker((2.0, 5.0, 11.0), 8.0), predicted=Marker((8.0, 6.0, 10.0), 6.0))
    axial = slices(case)[0][1]
    (model,) = shapes(axial, "model")
    assert model["class"] == "model beside"
    assert "r" not in model
    assert not shapes(slices(picture())[0][1], "model")
    (unsized,) = shapes(slices(picture(predicted=Marker((2.0, 5.0, 11.0), None)))[0][1], "model")
    assert unsized["class"] == "model beside"


def test_centres_outside_the_volume_do_not_fail():
    drawn = slices(picture(predicted=Marker((-4.0, 40.0, 5.0), 6.0)))
    assert [name for name, _ in drawn] == ["axial, z 0", "coronal, y 11", "sagittal, x 5"]


def test_saliency_glows_where_it_is_large():
    saliency = np.zeros((10, 12, 14), np.float32)
    saliency[5, 3:6, 4:8] = -7.0  # its size counts, not its sign
    saliency[0, 0, 0] = np.nan
    drawn = slices(picture(saliency=saliency, truth=Marker((5.0, 5.0, 5.0), 4.0)))
    assert [name for name, _ in drawn][3:] == ["axial + saliency", "coronal + saliency", "sagittal + saliency"]
    grey, glow = images(drawn[3][1])
    np.testing.assert_array_equal(grey, images(drawn[0][1])[0])
    np.testing.assert_array_equal(glow[..., 3] > 100, saliency[5] != 0)
    assert (glow[..., 3][saliency[5] == 0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan])
def test_saliency_without_contrast(value):
    assert len(slices(picture(saliency=np.full((10, 12, 14), value, np.float32)))) == 6


def test_an_image_is_one_tile_and_its_window_is_kept():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    drawn = slices(Picture("a", "x", pixels, (1.0, 1.0), Marker((4.0, 9.0), 6.0), None, pixels.astype(np.float32)))
    assert [name for name, _ in drawn] == ["image", "image + saliency"]
    np.testing.assert_array_equal(images(drawn[0][1])[0][..., 0], pixels)
    (model,) = shapes(drawn[0][1], "model")
    assert (model["cx"], model["cy"], model["r"]) == ("9.50", "4.50", "3.00")


def test_large_pictures_are_thinned_and_keep_their_scale():
    drawn = slices(Picture("a", "x", np.zeros((1000, 700), np.uint8), (0.5, 0.5)))
    assert max(images(drawn[0][1])[0].shape) <= 256
    assert ElementTree.fromstring(drawn[0][1]).get("viewBox") == "0 0 350.000 500.000"


def test_words_are_escaped():
    svg = slices(picture(outcome='<b>"&'))[0][1]
    assert ElementTree.fromstring(svg).get("aria-label") == 'axial, z 4: <b>"&'
