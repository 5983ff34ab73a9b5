"""The conclusion in both languages."""

import re
import string

from r1jax.tasks.medical.fhir import to_fhir
from r1jax.tasks.medical.lung_rads import LIMITS, lung_rads
from r1jax.tasks.medical.report import NO_CT
from r1jax.tasks.medical.schema import FINDING, FINDINGS, RECORD_FIELDS
from r1jax.tasks.medical.wording import SENTENCES, TERMS_ZH
from tests.tasks.reports import POINT, RATINGS, TABLE, full_prediction, observation, report_of


def test_inputs_that_were_read_and_those_that_were_missing_are_listed() -> None:
    report = report_of(full_prediction(), missing=("image",), table=TABLE, text="咳嗽\x00 3 weeks")
    assert {value.name: value.value for value in report.record if value.value is not None} == {
        "age": 63.2,
        "male": 1,
        "pack_years": 40,
        "emphysema": 0,
    }
    read = "Record fields read: Age 63.2 years, Male sex yes, Smoking 40 pack-years, Emphysema no."
    assert read in report.conclusion.split("\n")
    assert report.record_text == "咳嗽\ufffd 3 weeks"
    components = {
        part["code"]["text"]: part for part in observation(to_fhir(report), "Inputs of the model")["component"]
    }
    assert components["Age"]["valueQuantity"]["value"] == 63.2
    assert components["Age"]["valueQuantity"]["code"] == "a"
    assert "dataAbsentReason" in components["Haemoglobin"]
    assert "dataAbsentReason" in components["Modality image"]
    assert components["Record text"]["valueString"] == report.record_text
    # What the model did not get is not quoted as if it had been read.
    hidden = report_of(full_prediction(), missing=("table", "text"), table=TABLE, text="cough")
    assert (hidden.record, hidden.record_text) == ((), "")


def test_both_languages_have_the_same_sentences_and_every_term() -> None:
    def fields(template: str) -> set[str | None]:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}

    assert SENTENCES["en"].keys() == SENTENCES["zh"].keys()
    for key, template in SENTENCES["en"].items():
        assert fields(template) == fields(SENTENCES["zh"][key]), key
    terms = {finding.text for finding in FINDINGS if finding.kind in ("binary", "rating")}
    terms |= {level for finding in RATINGS for level in finding.levels} | {field.text for field in RECORD_FIELDS}
    sizes = [5.0, 8.0]
    terms |= {lung_rads(texture, size, True, None).basis for texture in FINDING["texture"].levels for size in sizes}
    terms |= {lung_rads(None, None, present, None).basis for present in (True, False, None)}
    terms |= {
        lung_rads(None, None, True, "central").basis,
        NO_CT,
        LIMITS,
        POINT.unit,
        POINT.origin,
        "volume",
        "image",
        "table",
    }
    assert terms - TERMS_ZH.keys() == set()


def test_chinese_conclusion_is_chinese() -> None:
    report = report_of(full_prediction(), language="zh", missing=("table",), text="咳嗽")
    age = report_of(full_prediction(), language="zh", table=TABLE).conclusion
    assert "已读取的病历字段：年龄 63.2 岁、男性 是、吸烟量 40 包年、肺气肿 否。" in age.split("\n")
    lines = report.conclusion.split("\n")
    assert "密度：实性（概率 1.000）；合计不低于 90% 的等级：实性。" in lines
    assert "长径：8.7 mm。" in lines
    assert "缺失的输入：病历字段。" in lines
    assert not re.search("[a-z]{3}", report.conclusion.replace("Lung-RADS", ""))
    assert to_fhir(report)["entry"][0]["resource"]["language"] == "zh"
