"""A risk report is the same in JSON and XML, fits its published schemas, and is refused where it does not."""

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from r1jax.config import AlertConfig
from r1jax.errors import UserError
from r1jax.serve.risk_reports import RISK_REPORT, from_tree, json_schema, read_xml, report_xml, to_tree, write_report
from r1jax.serve.structured import to_json, to_xml
from r1jax.tasks.finance.alerts import ACTIONS, BANDS
from r1jax.tasks.finance.reasons import CATALOGUE
from r1jax.tasks.finance.report import Alert, Explanation, RiskReport, build_report
from tests.tasks.finance_period import MONDAY, frozen
from tests.tasks.reports import PROVENANCE

SCHEMAS = Path(__file__).resolve().parents[2] / "docs/schemas"
POLICY, _ = frozen(AlertConfig(per_day=6.0, step_up_per_day=20.0))
NAMES = st.text(min_size=1, max_size=20).filter(str.strip)
FINITE = st.floats(-50, 50, allow_nan=False)
SHARE = st.floats(0, 1)
METHOD = "integrated gradients"
EXPLANATIONS = st.builds(
    Explanation,
    method=st.just(METHOD),
    baseline=FINITE,
    output=FINITE,
    rest=FINITE,
    residual=FINITE,
    complete=st.booleans(),
)
REASONS = st.tuples(st.sampled_from(list(CATALOGUE)), st.floats(1e-9, 50), st.text(max_size=20))
ALERTS = st.builds(
    Alert,
    transaction=st.from_regex(r"[\w\-]{1,12}", fullmatch=True),
    seconds=st.integers(0, 2**32),
    customer=st.just("K 7"),
    terminal=st.sampled_from(["终端 3", "T-1", "<&\"'>"]),
    amount=st.floats(0, 1e9),
    score=SHARE,
    probability=SHARE,
    band=st.integers(0, 3),
    reasons=st.lists(REASONS, max_size=4, unique_by=lambda reason: reason[0]).map(tuple),
    explanation=st.none() | EXPLANATIONS,
)


def worded(alert: Alert, language: str = "en") -> RiskReport:
    return build_report(alert, policy=POLICY, provenance=PROVENANCE, synthetic=True, language=language)


PLAIN = Alert(
    transaction="tx-1",
    seconds=MONDAY,
    customer="K 7",
    terminal="T 3",
    amount=12.5,
    score=0.75,
    probability=0.5,
    band=2,
    reasons=(("note", 1.5, "wire it now"), ("amount", 0.5, "")),
    explanation=Explanation(method=METHOD, baseline=-5.0, output=1.1, rest=4.09, residual=0.01, complete=True),
)


@pytest.fixture(scope="module")
def xsd():
    etree = pytest.importorskip("lxml.etree", reason="validates XML in the tests, with the extra r1jax[medical]")
    schema = etree.XMLSchema(etree.parse(SCHEMAS / "risk_report.xsd"))
    return lambda text: schema.assertValid(etree.fromstring(text.encode()))


@hypothesis.settings(max_examples=60)
@hypothesis.given(ALERTS, st.sampled_from(["en", "zh"]))
def test_json_and_xml_hold_the_same_report_and_fit_their_schemas(xsd, alert, language):
    jsonschema = pytest.importorskip("jsonschema")
    report = worded(alert, language)
    text, xml = to_json(to_tree(report)), report_xml(report)
    assert from_tree(json.loads(text)) == report == read_xml(xml)
    jsonschema.validate(json.loads(text), json_schema())
    xsd(xml)


def test_the_published_schema_is_that_of_the_code():
    assert json.loads((SCHEMAS / "risk_report.schema.json").read_text("utf-8")) == json_schema()


@pytest.mark.parametrize("field", ["band", "score", "caseId", "amount", "language"])
def test_neither_schema_takes_a_report_without_a_field(xsd, field):
    etree = pytest.importorskip("lxml.etree")
    with pytest.raises(UserError, match=field):
        from_tree({name: value for name, value in to_tree(worded(PLAIN)).items() if name != field})
    with pytest.raises(etree.DocumentInvalid):
        xsd("\n".join(line for line in report_xml(worded(PLAIN)).split("\n") if f"<{field} value" not in line))


def test_a_report_is_never_final(xsd):
    etree = pytest.importorskip("lxml.etree")
    with pytest.raises(UserError, match="status"):
        from_tree(to_tree(worded(PLAIN)) | {"status": "final"})
    with pytest.raises(etree.DocumentInvalid, match="preliminary"):
        xsd(report_xml(worded(PLAIN)).replace("preliminary", "final"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"amount": 12.5', '"amount": -12.5'),
        ('"contribution": 0.5', '"contribution": -0.5'),
        ('"code": "amount"', '"code": "colour"'),
        ('"code": "amount"', '"code": "note"'),
        ('"method": "integrated gradients"', '"method": "guess"'),
        ('"notice": "Research', '"notice": "Certified'),
        ('"time": "2018-08-06T00:00:00Z"', '"time": "yesterday"'),
        ('"time": "2018-08-06T00:00:00Z"', '"time": "2018-08-06T00:00:00"'),
        ('"time": "2018-08-06T00:00:00Z"', '"time": "2018-13-06T00:00:00Z"'),
        ('"time": "2018-08-06T00:00:00Z"', '"time": "2018-08-06T24:00:00Z"'),
        ('"time": "2018-08-06T00:00:00Z"', '"time": "2018-08-06T00:00:00+14:30"'),
        ('"status": "preliminary"', None),
        ('"notice": "', None),
        ('"rest": 4.09', None),
        ('"unit": "per transaction"', None),
        ('"method": "integrated gradients"', None),
        ('"customer": "K 7"', '"customer": "\x7f"'),
        ('"action": "review"', '"action": "block"'),
        ('"resourceType": "RiskReport"', None),
    ],
)
def test_what_the_model_refuses_both_schemas_refuse(xsd, old, new):
    """A line of a report is changed or, with None, left out."""
    etree, jsonschema = pytest.importorskip("lxml.etree"), pytest.importorskip("jsonschema")
    lines = to_json(to_tree(worded(PLAIN))).split("\n")
    assert sum(old in line for line in lines) == 1
    if new is None:
        lines = [line for line in lines if old not in line]
    tree = json.loads("\n".join(line.replace(old, new or "") for line in lines))
    with pytest.raises(UserError, match="risk report"):
        from_tree(tree)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, json_schema())
    if "action" not in old and "resourceType" not in old:  # XML Schema 1.0 cannot pair two values; the root has a name
        with pytest.raises(etree.DocumentInvalid):
            xsd(to_xml(tree, RISK_REPORT))


def test_unknown_fields_are_refused():
    with pytest.raises(UserError, match="nickname"):
        from_tree(to_tree(worded(PLAIN)) | {"nickname": "x"})


def test_a_report_says_what_an_investigator_needs():
    tree = to_tree(worded(PLAIN))
    assert tree["resourceType"] == "RiskReport" and tree["status"] == "preliminary" and tree["synthetic"] is True
    assert (tree["band"], tree["action"]) == (BANDS[2], ACTIONS[2]) == ("high", "review")
    assert tree["reasons"][0] == {
        "code": "note",
        "text": "Wording of the note",
        "contribution": 1.5,
        "span": "wire it now",
    }
    assert tree["operatingPoint"]["origin"] == "6 alerts a day on validation"
    assert tree["provenance"]["checkpointSha256"] == "a" * 64
    assert "附言" in to_tree(worded(PLAIN, "zh"))["reasons"][0]["text"]


def test_files_are_named_after_the_transaction(tmp_path):
    write_report(tmp_path, worded(PLAIN))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tx-1.json", "tx-1.xml"]
    assert read_xml((tmp_path / "tx-1.xml").read_text()) == worded(PLAIN)


def test_numbers_that_are_not_finite_name_the_transaction():
    with pytest.raises(UserError, match="'tx-1'.*amount is inf"):
        worded(PLAIN.model_copy(update={"amount": float("inf")}))
