import threading
import time

import pytest

from r1jax.data import bounded as module
from r1jax.data.bounded import bounded
from r1jax.errors import UserError
from tests.data.parquet_sets import refused


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(module, "PAUSE_S", 0.01)


def test_results_are_in_order_and_calls_run_side_by_side():
    meeting = threading.Barrier(module.THREADS, timeout=200)  # passed only if that many are there at once

    def call(number: int) -> int:
        meeting.wait()
        return number

    module.TIMEOUT_S = 20.0
    wanted = list(range(2 * module.THREADS))
    assert bounded(["x"] * len(wanted), [lambda n=n: call(n) for n in wanted]) == wanted
    assert bounded([], []) == []


def test_an_answer_that_never_comes_is_an_error_of_its_file():
    gate = threading.Event()
    refused(lambda: bounded(["url/a", "url/b"], [lambda: 1, gate.wait]), "url/b", "no answer within 1 s", "again")
    gate.set()


def test_a_server_that_comes_back_is_not_noticed(capsys):
    module.TIMEOUT_S, calls = 60.0, []

    def call() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise OSError("connection refused: [and a long structure")
        return "here"

    assert bounded(["url/a"], [call]) == ["here"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "url/a: connection refused; trying again" in told


def test_a_server_that_stays_away_is_named_with_its_last_word():
    def call() -> None:
        raise RuntimeError("connection refused")

    refused(lambda: bounded(["url/a"], [call]), "url/a", "connection refused")


@pytest.mark.parametrize("error", [FileNotFoundError("nothing there"), PermissionError("locked"), ValueError("bad")])
def test_what_time_does_not_mend_is_not_tried_again(error):
    module.TIMEOUT_S, calls = 60.0, []

    def call() -> None:
        calls.append(1)
        raise error

    refused(lambda: bounded(["url/a"], [call]), "url/a", str(error))
    assert len(calls) == 1


def test_errors_of_users_and_of_programmers_pass_through():
    def fails(error: Exception) -> None:
        raise error

    module.TIMEOUT_S = 60.0
    with pytest.raises(UserError, match="^as it is$"):
        bounded(["url/a"], [lambda: fails(UserError("as it is"))])
    with pytest.raises(ZeroDivisionError):
        bounded(["url/a"], [lambda: 1 // 0])


def test_many_bytes_get_more_time():
    module.TIMEOUT_S = 0.1
    bounded(["url/a"], [lambda: time.sleep(0.2)], size=60 * module.SLOWEST)
