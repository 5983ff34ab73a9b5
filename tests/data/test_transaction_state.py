"""A history that is kept on disk: killed at any row and started again, it goes on as if nothing had been."""

import numpy as np
import pytest

from r1jax.data.transaction_live import Payment
from r1jax.data.transaction_rows import Row, take
from r1jax.data.transaction_state import KeptHistory
from r1jax.data.transactions import DAY
from r1jax.errors import UserError
from tests.data.streams import draw_table

DELAY, EVENTS = 7 * DAY, 5


def rows_of(table):
    """Each payment with what will be known of it, and now and then the outcome of an earlier one."""
    for i in range(len(table)):
        own = (str(table.customer[i]), str(table.terminal[i]), float(table.amount[i]))
        fraud = None if np.isnan(table.fraud[i]) or i % 3 == 0 else bool(table.fraud[i])
        yield Row(f"é{i}", Payment(f"é{i}", int(table.seconds[i]), *own), "", fraud)
        if i % 3 == 0 and i > 3:
            yield Row(f"é{i - 3}", None, "", bool(i % 2))


def kept(path):
    return KeptHistory(path, DELAY, EVENTS)


def test_a_killed_process_loses_no_row(tmp_path):
    rows = list(rows_of(draw_table(rows=120, entities=4, days=500)))
    whole, parts = kept(tmp_path / "whole"), kept(tmp_path / "parts")
    for i, row in enumerate(rows):
        wanted, found = take(whole.live, row), take(parts.live, row)
        if row.payment:
            for x, y in zip((wanted[0], *wanted[1]), (found[0], *found[1]), strict=True):
                np.testing.assert_array_equal(x, y)
        else:
            assert wanted == found
        parts.note([row])
        if i % 40 == 20:
            parts.extra = {"typical": np.arange(3.0)}
            parts.save()
        if i % 7 == 0:
            parts.close()  # killed: nothing was saved, the next row was cut off
            with (tmp_path / "parts.journal").open("ab") as journal:
                journal.write(b'[999, "x", nul')
            parts = kept(tmp_path / "parts")
            assert parts.rows == i + 1 and parts.found == (i > 20)
    assert parts.extra["typical"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="came before"):
        take(parts.live, next(row for row in rows[::-1] if row.payment))
    whole.close()
    parts.close()


def test_a_save_that_was_cut_off_between_file_and_journal_takes_no_row_twice(tmp_path):
    rows = list(rows_of(draw_table(rows=30)))
    first = kept(tmp_path / "state")
    for row in rows:
        take(first.live, row)
    first.note(rows)
    journal = (tmp_path / "state.journal").read_bytes()
    first.save()
    first.close()
    (tmp_path / "state.journal").write_bytes(journal)
    again = kept(tmp_path / "state")
    assert again.rows == len(rows) and again.live.customers.keys() == first.live.customers.keys()
    again.note(rows[:1])
    again.close()
    (tmp_path / "state").unlink()
    (tmp_path / "state.journal").write_bytes((tmp_path / "state.journal").read_bytes().splitlines()[-1] + b"\n")
    with pytest.raises(UserError, match=f"its journal goes on from, which begins at row {len(rows) + 1}"):
        kept(tmp_path / "state")


def test_files_that_cannot_be_gone_on_from_are_refused(tmp_path):
    path = tmp_path / "state"
    first = kept(path)
    with pytest.raises(UserError, match="in use by another process"):
        kept(path)
    take(first.live, next(rows_of(draw_table())))
    first.save()
    first.close()
    with pytest.raises(UserError, match="label delay 604800, but the checkpoint has 86400"):
        KeptHistory(path, DAY, EVENTS)
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        kept(path)
    with pytest.raises(UserError, match="cannot be written"):
        kept(tmp_path / "no" / "state")


def test_a_full_disk_is_told_and_the_files_are_let_go(tmp_path):
    first, rows = kept(tmp_path / "state"), list(rows_of(draw_table()))
    first.note(rows[:1])
    first.close()
    again = kept(tmp_path / "state")
    again._journal.close()
    again._journal = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match="its journal cannot be written .No space left on device.: all rows that were"):
        again.note(rows[1:2])
    again.close()
    last = kept(tmp_path / "state")
    assert last.rows == 1
    last.close()
