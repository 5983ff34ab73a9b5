"""The device reads payments as the export gives them, and its risk reports are those of eval.py, byte for byte."""

import json

import numpy as np
import pytest

from r1jax.data.transaction_history import CHANNELS
from r1jax.edge import __main__ as command
from r1jax.edge.artefact import Artefact, InputError
from r1jax.edge.risk import payment_inputs, read_payments
from r1jax.serve.case_reports import file_name
from r1jax.serve.export_finance import ports, raw_inputs
from r1jax.serve.risk_reports import report_xml, to_tree
from r1jax.serve.structured import to_json
from r1jax.tasks.finance.alerts import ACTIONS, ALERT, BANDS
from r1jax.tasks.finance.report import NOTICE, Alert, build_report
from r1jax.tasks.finance.task import Finance
from tests.serve.exported_finance import ALERTS, get_config
from tests.tasks.finance_period import MONDAY, frozen
from tests.tasks.reports import PROVENANCE

POLICY, _ = frozen(ALERTS)
TEXTS = {"notice": NOTICE, "bands": list(BANDS), "actions": list(ACTIONS), "alert": ALERT, "amount": 0}
IDS, CUSTOMERS = ["tx-1", "付款 2", " 2018/3"], ["K 7", " <&\"'> ", "K\t9"]
NOTES = ["", " 转账 now\n", "x" * 40]


@pytest.fixture(scope="module")
def task() -> Finance:
    return Finance(get_config())


@pytest.fixture(scope="module")
def raw(task) -> dict:
    return task.source("test").read_batch(np.arange(3))


@pytest.fixture(scope="module")
def card(task) -> dict:
    inputs = {name: port._asdict() | {"shape": list(port.shape)} for name, port in ports(task).items()}
    return {
        "task": "finance",
        "inputs": inputs,
        "operating_points": {"both": POLICY._asdict()},
        "checkpoint": {"sha256": PROVENANCE.checkpoint_sha256},
        "model": PROVENANCE.model,
        "versions": {"r1jax": PROVENANCE.r1jax_version},
    }


def arrays_of(raw: dict) -> dict:
    """What the host writes."""
    kept = {name: raw[name] for name in ("series", "series_state", "series_valid", "table")}
    names = {"case_id": np.array(IDS), "customer": np.array(CUSTOMERS), "terminal": np.array([7, 8, 9])}
    return kept | names | {"seconds": MONDAY + np.arange(3), "text": np.array(NOTES)}


def test_payments_are_read_as_the_export_gives_them(tmp_path, task, raw, card):
    np.savez(tmp_path / "payments.npz", **arrays_of(raw))
    payments = read_payments(tmp_path / "payments.npz", card, TEXTS)
    expected = raw_inputs(raw | {"text": NOTES}, ports(task))
    for row in range(3):
        found = payment_inputs(card, payments, row)
        assert found.keys() == expected.keys() == card["inputs"].keys()
        for name, values in expected.items():
            assert found[name].dtype == values.dtype == card["inputs"][name]["dtype"]
            np.testing.assert_array_equal(found[name], values[row])


@pytest.fixture
def device(tmp_path, monkeypatch, raw, card):
    """The command with a model that says what it is told."""
    np.savez(tmp_path / "payments.npz", **arrays_of(raw))
    told = [(0.01, 0.001, 0), (0.7, 0.25, 2), (1.0, 0.95, 3)]
    answers = [dict(zip(("score", "probability", "band"), map(np.asarray, one), strict=True)) for one in told]
    model = Artefact.__new__(Artefact)  # without files and without an interpreter
    model.card, model.texts, model.predict = card, TEXTS, lambda inputs: answers.pop(0)
    monkeypatch.setattr(command, "Artefact", lambda *_: model)

    def call(*words: str) -> None:
        words = (str(tmp_path / "payments.npz"), "--output", str(tmp_path / "out"), *words)
        monkeypatch.setattr("sys.argv", ["r1jax_edge.pyz", *words])
        command.main()

    return call, answers


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_payment_has_its_line_and_each_alert_the_report_of_the_evaluation(
    tmp_path, monkeypatch, raw, device, capsys, language
):
    call, _ = device
    call("--language", language, "--synthetic")
    assert capsys.readouterr().out == "3 payments in scores.jsonl, 2 reports of alerts, JSON and XML\n"
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text("utf-8").splitlines()]
    assert [line["id"] for line in lines] == IDS
    assert lines[0] == {"id": "tx-1", "score": 0.01, "probability": 0.001, "band": "low", "action": "approve"}
    assert len(list((tmp_path / "out").iterdir())) == 5
    amounts = raw["series"][:, 0, -1, CHANNELS.index("amount")]
    for row in (1, 2):
        file = tmp_path / "out" / f"{file_name(IDS[row])}.json"
        made = json.loads(file.read_text("utf-8"))["provenance"]
        provenance = PROVENANCE.model_copy(
            update={
                "data_name": "payments.npz: 3 payments",
                "data_fingerprint": made["dataFingerprint"],
                "created": made["created"],
            }
        )
        alert = Alert(
            transaction=IDS[row],
            seconds=MONDAY + row,
            customer=CUSTOMERS[row],
            terminal=str(7 + row),
            amount=float(str(amounts[row])),
            score=lines[row]["score"],
            probability=lines[row]["probability"],
            band=BANDS.index(lines[row]["band"]),
        )
        expected = build_report(alert, policy=POLICY, provenance=provenance, synthetic=True, language=language)
        assert file.read_text("utf-8") == to_json(to_tree(expected))
        assert file.with_suffix(".xml").read_text("utf-8") == report_xml(expected)
    with pytest.raises(SystemExit, match="2"):
        call()
    assert "has scores.jsonl of an earlier run: name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.1])
def test_a_score_that_is_no_probability_is_not_reported(tmp_path, device, capsys, value):
    call, answers = device
    answers[2]["score"] = np.asarray(value)
    with pytest.raises(SystemExit, match="2"):
        call()
    assert "payment ' 2018/3': its score is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


EVENTS = np.zeros((3, 2, 4))
BAD = {
    "nothing": ({"case_id": None}, "lacks the array 'case_id': a payment needs case_id, seconds, customer, terminal"),
    "no table": ({"table": None}, "lacks the array 'table'"),
    "none": ({"case_id": np.zeros(0, str)}, "has no payments"),
    "events": ({"series_state": np.zeros((3, 2, 5))}, r"shape \[3, 2, 5\]: the artefact reads \[3, 2, 4\]"),
    "rows": ({"customer": np.array(["a", "b"])}, r"'customer' .* shape \[2\]: the artefact reads \[3\]"),
    "text": ({"text": np.array(["a"])}, r"'text' .* shape \[1\]"),
    "nan": ({"table": np.full((3, 34), np.nan)}, "'table' .* no finite number"),
    "large": ({"table": np.full((3, 34), 1e300)}, "'table' .* too large for float32"),
    "words": ({"series_state": EVENTS.astype(str)}, "'series_state' .* no finite number"),
    "state": ({"series_state": EVENTS + 3}, "other states than 0, 1 and 2"),
    "itself": ({"series_valid": EVENTS}, "the last event of both streams is the payment itself"),
    "time": ({"seconds": np.array([1.5, 2, 3])}, "other than whole seconds since 1970"),
    "late": ({"seconds": np.array([10**12, 2, 3])}, "from 1900 to 2199"),
    "customer": ({"customer": np.array(["a", " ", "b"])}, "'customer' .* has an empty name"),
    "same id": ({"case_id": np.array(["a", "a", "b"])}, "has 'a' 2 times"),
    "negative": ({"series": np.full((3, 2, 4, 7), -1.0)}, "holds a negative amount"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_payments_are_refused_in_one_sentence(tmp_path, raw, card, name):
    changes, message = BAD[name]
    arrays = {key: value for key, value in (arrays_of(raw) | changes).items() if value is not None}
    np.savez(tmp_path / "payments.npz", **arrays)
    with pytest.raises(InputError, match=message) as caught:
        read_payments(tmp_path / "payments.npz", card, TEXTS)
    assert "\n" not in str(caught.value)
