"""Weights of an int8 edge file: their codes, what they are chosen by, and that the worker finds them again."""

import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.models.quantized import Use
from r1jax.serve import export_rounding
from r1jax.serve.export_command import ExportArguments, open_checkpoint, stored_line
from r1jax.serve.export_rounding import (
    calibration_inputs,
    folded,
    gptq_rows,
    nearest,
    round_one,
    round_weights,
    storage_options,
    tensor_of,
)
from r1jax.serve.litert_worker import STEPS, _codes
from tests.serve.exported import write_checkpoint

RNG = np.random.default_rng


def error(found: np.ndarray, weight: np.ndarray, inputs: np.ndarray) -> float:
    return float(np.sum(((found - weight) @ inputs.T) ** 2))


@pytest.mark.parametrize("kind", STEPS)
def test_rounding_by_inputs_loses_less_and_stays_codes_of_one_scale_a_row(kind):
    weight = RNG(0).normal(size=(8, 24))
    inputs = RNG(1).normal(size=(200, 3)) @ RNG(2).normal(size=(3, 24)) + 0.1 * RNG(3).normal(size=(200, 24))
    found = gptq_rows(weight, inputs.T @ inputs, STEPS[kind])
    assert error(found, weight, inputs) < 0.3 * error(nearest(weight, 0, STEPS[kind]), weight, inputs)
    is_kind, codes, scale, axis = _codes(found.astype(np.float32))
    assert (is_kind, axis, codes.dtype) == (kind, 0, np.int8)
    np.testing.assert_allclose(codes * scale[:, None], found, rtol=1e-6)
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=1) / STEPS[kind], rtol=1e-6)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    ("role", "name", "shape"),
    [
        ("linear", "x/weight", (6, 20)),
        ("convolution", "x/weight", (3, 3, 4, 6)),
        ("embedding", "x", (9, 20)),
        ("fields", "x/weight", (3, 8, 6)),
        ("experts", "x/gate_up_proj", (2, 6, 20)),
        ("experts", "x/down_proj", (2, 20, 6)),
    ],
)
def test_what_is_rounded_is_stored_without_further_loss(role, name, shape, kind):
    weight, use = RNG(0).normal(size=shape).astype(np.float32), Use(name, role, shape, None)
    inputs = RNG(1).normal(size=(50, tensor_of(use, weight).shape[-1]))
    square = inputs.T @ inputs if role in ("linear", "convolution") else None
    found = round_one(use, weight, square, [], kind)
    tensor = tensor_of(use, found.weight)  # as it will lie in the file
    is_kind, codes, scale, axis = _codes(tensor)
    assert is_kind == kind
    assert found.weight.shape == shape and len(scale) == found.channels == tensor.shape[axis]
    step = scale.reshape([-1 if place == axis else 1 for place in range(tensor.ndim)])
    np.testing.assert_allclose(codes * step, tensor, rtol=1e-5)
    assert np.abs(found.weight - weight).max() < 4 * scale.max()


def test_numbers_that_are_no_codes_are_not_stored_as_int8():
    weight = RNG(0).normal(size=(6, 20)).astype(np.float32)
    assert _codes(weight) is None
    rounded = nearest(weight.astype(np.float64), 1, STEPS["int8"]).astype(np.float32)
    kind, *_, axis = _codes(rounded)
    assert (kind, axis) == ("int8", 1)
    rounded[2, 3] *= 1.01
    assert _codes(rounded) is None


def test_the_norm_that_a_converter_folds_into_columns_is_found_and_rounded_with_them():
    weight, norm = RNG(0).normal(size=(6, 20)).astype(np.float32), RNG(1).uniform(0.2, 3, 20).astype(np.float32)
    weight[:, 7] = 0  # says nothing of its factor
    norm[7] = 1
    constants = [RNG(2).normal(size=(6, 20)).astype(np.float32), weight * norm]
    np.testing.assert_allclose(folded(weight, constants), norm, rtol=1e-6)
    np.testing.assert_array_equal(folded(weight, constants[:1]), np.ones(20))
    inputs = RNG(3).normal(size=(50, 20))
    found = round_one(Use("x/weight", "linear", (6, 20), None), weight, inputs.T @ inputs, constants, "int8")
    assert _codes(found.weight) is None and _codes(found.weight * norm)[0] == "int8"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "00000024")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r1jax.serve.export_command.CALIBRATION", 8)
        patch.setattr("r1jax.serve.export_command.CHECKED", 8)
        words = ExportArguments(checkpoint=str(checkpoint.path), output="", cases=2, to="litert", weights="int8")
        yield open_checkpoint(checkpoint, words)


def test_the_least_bytes_are_taken_that_keep_the_calls(opened, monkeypatch):
    cases = opened.rounding
    taken = [set(source.rows.tolist()) for source in (cases.train, cases.checked.source)]
    assert "train" in cases.train.name and len(taken[0]) == len(taken[1]) == 8 and not taken[0] & taken[1]
    options, exact, tried, agreements = {}, [], [], iter([(True, 90), (False, 100), (True, 100)])

    def of_few(cases, run, params, rounded):
        exact.append(run(params, next(calibration_inputs(cases, 8)))["nodule_present"][0])
        options.update(storage_options(cases, run, params, dict(list(rounded.items())[:3])))
        return options

    def compare(run, exported, limits):
        tried.append(run(next(calibration_inputs(cases, 8)))["nodule_present"][0])
        agrees, same = next(agreements)
        return {"agrees": agrees, "decisions": {"same": same, "of": 100}}

    monkeypatch.setattr(export_rounding, "storage_options", of_few)
    monkeypatch.setattr(export_rounding, "compare", compare)
    monkeypatch.setattr(export_rounding, "SHARES", (1.0, 1.0, 3.0, 4.0))
    rounded = round_weights(cases, opened.task, opened.model, opened.params, [])
    assert len(tried) == 3 and rounded.agreement["agrees"]  # the least that agreed
    for fp16, int4, int8 in options.values():
        assert fp16.bytes > int8.bytes > int4.bytes and fp16.change == 0 < int8.change < int4.change
    assert set(rounded.kinds.values()) == {"fp16"}  # there was room for all of them
    assert abs(tried[0] - exact[0]) > 0 and tried[2] == exact[0]


def test_a_file_that_is_not_int8_for_the_most_part_is_not_called_so():
    stored = {"int4": 100, "int8": 860, "fp16": 30, "fp32": 10}
    assert stored_line("int8", stored) == "weights: 10.0% int4, 86.0% int8, 3.0% fp16, 1.0% fp32 of 1,000 bytes"
    with pytest.raises(UserError, match=r"only 50.0% of the bytes of the weights are int8.*--weights fp16"):
        stored_line("int8", {"int4": 0, "int8": 50, "fp16": 50, "fp32": 0})
    assert stored_line("fp16", {"int4": 0, "int8": 0, "fp16": 90, "fp32": 10}) == (
        "weights: 90.0% fp16, 10.0% fp32 of 100 bytes"
    )
