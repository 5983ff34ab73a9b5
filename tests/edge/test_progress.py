"""The edge runner says how far it is, and only where that takes a while."""

from types import SimpleNamespace

from r1jax.edge import progress
from r1jax.edge.progress import INTERVAL_S, counted


def test_a_line_comes_at_each_interval_and_none_before(monkeypatch, capsys):
    clock = iter(INTERVAL_S * step for step in (0.0, 0.0, 0.9, 1.5, 1.6, 2.5))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # no other thread's
    assert list(counted("payments", 5)) == [0, 1, 2, 3, 4]
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == "payments 2/5, about 22 s to go\npayments 4/5, about 6 s to go\n"
