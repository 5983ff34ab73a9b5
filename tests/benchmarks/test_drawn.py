"""Cases that several processes draw once are those of the source, in its order."""

import numpy as np

from benchmarks.drawn import CHUNK, DONE, SOURCE, Drawn, draw
from r1jax.data.synthetic import SyntheticCases

SHAPE = (4, 8, 8)


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def test_drawn_cases_are_those_of_the_source(tmp_path):
    cases = 2 * CHUNK + 9  # three chunks for two processes, the last of them short
    place = draw(SyntheticCases(3, cases, "val", SHAPE), tmp_path, 2)
    source = SyntheticCases(3, cases, "val", SHAPE)
    drawn = Drawn(source, place)
    rows = np.array([cases - 1, 0, CHUNK, 2 * CHUNK - 1, 2 * CHUNK, 5])
    same(drawn.read_batch(rows), source.read_batch(rows))
    assert (len(drawn), drawn.fingerprint, drawn.schema) == (cases, source.fingerprint, source.schema)
    assert drawn.ceilings() == source.ceilings()


def test_what_was_drawn_is_not_drawn_again_and_what_was_cut_off_is(tmp_path):
    source = SyntheticCases(0, 3, "test", SHAPE)
    place = draw(source, tmp_path, 2)
    (place / SOURCE).unlink()  # without which nothing can be drawn
    assert draw(source, tmp_path, 2) == place
    (place / DONE).unlink()
    np.load(place / "volume.npy", mmap_mode="r+")[:] = 0
    same(Drawn(source, draw(source, tmp_path, 1)).read_batch(np.arange(3)), source.read_batch(np.arange(3)))


def test_other_cases_have_another_folder(tmp_path):
    one, other = (draw(SyntheticCases(seed, 2, "test", SHAPE), tmp_path, 1) for seed in (0, 1))
    assert one != other
