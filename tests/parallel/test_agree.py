"""What processes agree on, where there is but one; tests/parallel/test_together.py starts several."""

import numpy as np
import pytest

from r1jax.config import MeshConfig
from r1jax.errors import UserError
from r1jax.parallel.agree import Vote, from_first, place_share, share_of, whole_rows
from r1jax.parallel.mesh import batch_sharding, make_mesh


def test_one_process_does_it_itself(capsys):
    value = (1, {"kept": [as_it_is := object()]})
    assert from_first(lambda: value) is value and value[1]["kept"] == [as_it_is]
    with pytest.raises(UserError, match="no such thing"):
        from_first(lambda: (_ for _ in ()).throw(UserError("no such thing")))


def test_one_process_decides_at_once():
    vote = Vote(make_mesh(MeshConfig()))
    assert [vote.cast(number) for number in (0, 15, 0)] == [0, 15, 0] and not vote.pending


def test_one_process_reads_all():
    mesh, rows = make_mesh(MeshConfig(data=2, fsdp=4)), np.arange(32, dtype=np.float32).reshape(16, 2)
    assert share_of(mesh, 16) == (0, 1)
    placed = place_share(mesh, rows, 16)
    assert placed.sharding == batch_sharding(mesh) and placed.addressable_data(3).shape == (2, 2)
    np.testing.assert_array_equal(placed, rows)
    assert whole_rows(mesh, rows, 16) is rows


class Places:
    """The sharding of a batch, as a process sees it whose devices hold some of the rows."""

    def __init__(self, *parts):
        self.parts = parts

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*part),) for i, part in enumerate(self.parts)}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(8, 12), (12, 16)], (1, 2)),
        ([(4, 8), (4, 8)], (1, 4)),  # tensor parallel: its devices hold the same rows
        ([(None, None)], (0, 1)),
    ],
)
def test_share_is_where_the_devices_are(monkeypatch, parts, expected):
    monkeypatch.setattr("r1jax.parallel.agree.batch_sharding", lambda mesh: Places(*parts))
    assert share_of(make_mesh(MeshConfig()), 16) == expected


@pytest.mark.parametrize("parts", [[(0, 4), (8, 12)], [(4, 8), (8, 12)]])
def test_scattered_shares_are_refused(monkeypatch, parts):
    monkeypatch.setattr("r1jax.parallel.agree.batch_sharding", lambda mesh: Places(*parts))
    with pytest.raises(UserError, match="cases of a batch that do not follow one another"):
        share_of(make_mesh(MeshConfig()), 16)
