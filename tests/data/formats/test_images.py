"""Pictures come as their bytes or their pixels, with the class of their folder or the row that names them."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from r1jax.data.formats.images import open_images
from r1jax.data.schema import Field
from r1jax.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def everything(source):
    return source.read_batch(np.arange(len(source)))


@pytest.fixture
def tree(tmp_path):
    save(tmp_path / "cat/b.png", GREY)
    save(tmp_path / "cat/deep/a.bmp", GREY + np.uint8(1))
    save(tmp_path / "dog/c.tif", GREY + np.uint8(2))
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    return tmp_path


def test_a_class_is_a_folder(tree):
    source = pickle.loads(pickle.dumps(open_images(tree, form="pixels")))
    assert source.schema.fields[-1] == Field("image", "image", "uint8", (5, 7))
    batch = source.read_batch(np.array([2, 0, 1]))
    assert batch["case_id"] == ["dog/c.tif", "cat/b.png", "cat/deep/a.bmp"]
    assert batch["label"] == ["dog", "cat", "cat"]
    np.testing.assert_array_equal(batch["image"], np.stack([GREY + np.uint8(k) for k in (2, 0, 1)]))


def test_bytes_are_the_file(tree):
    assert everything(open_images(tree))["image"][0] == (tree / "cat/b.png").read_bytes()


def test_sizes_and_channels_may_vary(tmp_path):
    save(tmp_path / "a.png", GREY)
    save(tmp_path / "b.png", np.concatenate([COLOUR, COLOUR]))
    source = open_images(tmp_path, form="pixels")
    assert source.schema.fields[-1] == Field("image", "image", "uint8", (None, 7, 3))
    first, second = everything(source)["image"]
    np.testing.assert_array_equal(first, np.repeat(GREY[..., None], 3, axis=2))
    np.testing.assert_array_equal(second, np.concatenate([COLOUR, COLOUR]))


def test_opacity_and_palettes_are_kept(tmp_path):
    clear = np.concatenate([COLOUR, GREY[..., None]], axis=2)
    save(tmp_path / "a.png", clear)
    Image.fromarray(COLOUR).quantize(100).save(tmp_path / "b.png")
    first, second = everything(open_images(tmp_path, form="pixels"))["image"]
    np.testing.assert_array_equal(first, clear)
    np.testing.assert_array_equal(second[..., :3], COLOUR)
    assert (second[..., 3] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_kept(tmp_path, suffix):
    deep = RNG.integers(0, 2**16, (4, 3), dtype=np.uint16)
    save(tmp_path / f"a.{suffix}", deep)
    batch = everything(open_images(tmp_path, form="pixels"))
    assert batch["image"].dtype == np.uint16
    np.testing.assert_array_equal(batch["image"][0], deep)
    save(tmp_path / "b.png", GREY)
    with pytest.raises(UserError, match="16 bits"):
        open_images(tmp_path, form="pixels")
    assert len(open_images(tmp_path)) == 2


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_photographs_are_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"quality": 95} if suffix == "jpg" else {}
    save(tmp_path / f"a.{suffix}", np.repeat(np.repeat(GREY, 8, 0), 8, 1), exif=exif, **options)
    source = open_images(tmp_path, form="pixels")
    assert source.schema.fields[-1].shape == (56, 40)
    want = np.rot90(np.repeat(np.repeat(GREY, 8, 0), 8, 1), -1).astype(int)
    assert np.abs(everything(source)["image"][0] - want).max() <= 12


def test_a_table_names_the_pictures(tree):
    (tree / "labels.csv").write_text("id,finding,age\ndog/c.tif,ill,7\ncat/b,well,\n")
    source = open_images(tree)
    batch = everything(source)
    assert batch["case_id"] == ["dog/c.tif", "cat/b.png"] and batch["finding"] == ["ill", "well"]
    np.testing.assert_array_equal(batch["age"], [7.0, np.nan])
    assert "1 pictures that labels.csv does not name are left out" in source.name


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("id,x\ndog/c.tif,1\ncat/none.png,2\n", "line 3 .* names 'cat/none.png'"),
        ("id,x\ndog/c.tif,1\n../b.png,2\n", "line 3 .* names '../b.png'"),
        ("id,x\ndog/c.tif,1\n/etc/passwd,2\n", "line 3 .* names '/etc/passwd'"),
        ("id,x\ndog/c.tif,1\ndog/c,2\n", "'dog/c.tif' twice"),
        ("id,x\n1,2\n", "no column .* names the pictures"),
        ("id,image\ndog/c.tif,1\n", "'image' of its own"),
    ],
)
def test_a_table_names_nothing_else(tree, rows, said):
    (tree / "labels.csv").write_text(rows)
    with pytest.raises(UserError, match=said):
        open_images(tree)


def test_links_that_lead_out_are_refused(tree, tmp_path_factory):
    outside = save(tmp_path_factory.mktemp("out") / "x.png", GREY)
    os.symlink(tree / "cat/b.png", tree / "cat/inside.png")
    assert len(open_images(tree)) == 4
    os.symlink(outside, tree / "dog/out.png")
    with pytest.raises(UserError, match="leads out"):
        open_images(tree)
    os.remove(tree / "dog/out.png")
    os.symlink(outside.parent, tree / "bird")
    with pytest.raises(UserError, match="link to a folder"):
        open_images(tree)


def test_a_picture_beside_classes_has_none(tree):
    save(tree / "alone.png", GREY)
    with pytest.raises(UserError, match="alone.png lies beside"):
        open_images(tree)


def bomb():
    """A PNG of a few hundred bytes that claims 900 million pixels."""
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["bytes", "pixels"])
def test_what_is_no_whole_picture_is_refused(tmp_path, form):
    good = save(tmp_path / "good.png", RNG.integers(0, 256, (64, 64), dtype=np.uint8)).read_bytes()
    file = tmp_path / "x.png"
    for data in (b"", b"text", good[:20], good[: len(good) // 2], good[:-12], good[:400] + b"\0" + good[401:]):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.png"):
            everything(open_images(tmp_path, form=form))
    photo = io.BytesIO()
    Image.fromarray(np.repeat(np.repeat(GREY, 20, 0), 20, 1)).save(photo, "JPEG")
    file.write_bytes(photo.getvalue()[:-100])
    with pytest.raises(UserError, match="cut short"):
        everything(open_images(tmp_path, form=form))
    film = [Image.fromarray(GREY)] * 2
    film[0].save(file, "TIFF", save_all=True, append_images=film[1:])
    with pytest.raises(UserError, match="2 pictures"):
        open_images(tmp_path, form=form)
    Image.fromarray(GREY.astype(np.float32)).save(file, "TIFF")
    with pytest.raises(UserError, match="mode F"):
        open_images(tmp_path, form=form)
    Image.fromarray(GREY).save(file, "GIF")
    with pytest.raises(UserError, match="none of PNG, JPEG, TIFF, BMP"):
        open_images(tmp_path, form=form)
    file.write_bytes(bomb())
    with pytest.raises(UserError, match="more than 67108864 pixels"):
        open_images(tmp_path, form=form)


def test_a_file_that_changes_is_noticed(tmp_path):
    save(tmp_path / "a.png", GREY)
    source = open_images(tmp_path, form="pixels")
    save(tmp_path / "a.png", GREY[:3])
    with pytest.raises(UserError, match=r"a\.png.* changed"):
        everything(source)
    os.remove(tmp_path / "a.png")
    with pytest.raises(UserError, match="cannot be read"):
        everything(source)
