"""The benchmark of sizes: what it reads of a card, and its table."""

import json

from benchmarks.edge_exports import row_of, table


def test_size_and_agreement_are_those_of_the_card(tmp_path):
    kinds = {"malignancy": ("binary", 2e-4), "texture": ("rating", 3e-3), "margin": ("rating", 1e-3)}
    kinds["center_mm"] = ("vector", 0.5)
    findings = {name: {"kind": kind, "largest_difference": value} for name, (kind, value) in kinds.items()}
    decisions = {"same": 1499, "required": 1499, "of": 1500}
    agreement = {"findings": findings, "decisions": decisions, "data": {"cases": 500}}
    card = {"file": "model.tflite", "agreement": agreement, "stored": {"bytes": {"int8": 7}, "weights": {}}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "model.tflite").write_bytes(bytes(500_000))
    row = row_of(tmp_path)
    assert row["largest_difference"] == {"binary": 2e-4, "rating": 3e-3, "vector": 0.5}
    assert row["stored"]["bytes"] == {"int8": 7}
    whole = row | {"bytes": 2_000_000}
    lines = table({"models": {"medical": {"float": whole, "fp16": {"refused": "why"}, "int8": row}}}).splitlines()
    assert lines[3] == "| medical | fp16 | refused | - | - | - | - |"
    assert (
        lines[4]
        == "| medical | int8 | 0.500 | 4.00x | 1,499 of 1,500 | 1,499 | binary 0.0002, rating 0.003, vector 0.5 |"
    )
