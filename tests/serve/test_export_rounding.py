"""Weights of an int8 edge file: their codes, what they are chosen by, and that the worker finds them again."""

import numpy as np
import pytest

from r1jax.models.quantized import Use
from r1jax.serve import export_rounding
from r1jax.serve.export_command import ExportArguments, open_checkpoint, stored_line
from r1jax.serve.export_rounding import folded, gptq_rows, nearest, round_one, round_weights, storage_options, tensor_of
from r1jax.serve.litert_worker import _codes
from r1jax.errors import UserError
from tests.serve.exported import write_checkpoint

RNG = np.random.default_rng


def error(found: np.ndarray, weight: np.ndarray, inputs: np.ndarray) -> float:
    return float(np.sum(((found - weight) @ inputs.T) ** 2))


def test_rounding_by_inputs_loses_less_and_stays_codes_of_one_scale_a_row():
    weight = RNG(0).normal(size=(8, 24))
    inputs = RNG(1).normal(size=(200, 3)) @ RNG(2).normal(size=(3, 24)) + 0.1 * RNG(3).normal(size=(200, 24))
    found = gptq_rows(weight, inputs.T @ inputs)
    assert error(found, weight, inputs) < 0.3 * error(nearest(weight, 0), weight, inputs)
    codes, scale, axis = _codes(found.astype(np.float32))
    assert axis == 0 and codes.dtype == np.int8
    np.testing.assert_allclose(codes * scale[:, None], found, rtol=1e-6)
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=1) / 127, rtol=1e-6)


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
def test_what_is_rounded_is_stored_as_int8_without_further_loss(role, name, shape):
    weight, use = RNG(0).normal(size=shape).astype(np.float32), Use(name, role, shape, None)
    inputs = RNG(1).normal(size=(50, tensor_of(use, weight).shape[-1]))
    square = inputs.T @ inputs if role in ("linear", "convolution") else None
    found = round_one(use, weight, square, [])
    tensor = tensor_of(use, found.weight)  # as it will lie in the file
    codes, scale, axis = _codes(tensor)
    assert found.weight.shape == shape and len(scale) == found.channels == tensor.shape[axis]
    step = scale.reshape([-1 if place == axis else 1 for place in range(tensor.ndim)])
    np.testing.assert_allclose(codes * step, tensor, rtol=1e-5)
    assert np.abs(found.weight - weight).max() < 4 * scale.max()


def test_numbers_that_are_no_codes_are_not_stored_as_int8():
    weight = RNG(0).normal(size=(6, 20)).astype(np.float32)
    assert _codes(weight) is None
    rounded = nearest(weight.astype(np.float64), 1).astype(np.float32)
    assert _codes(rounded)[2] == 1
    rounded[2, 3] *= 1.01
    assert _codes(rounded) is None


def test_the_norm_that_a_converter_folds_into_columns_is_found_and_rounded_with_them():
    weight, norm = RNG(0).normal(size=(6, 20)).astype(np.float32), RNG(1).uniform(0.2, 3, 20).astype(np.float32)
    constants = [RNG(2).normal(size=(6, 20)).astype(np.float32), weight * norm]
    np.testing.assert_allclose(folded(weight, constants), norm, rtol=1e-6)
    np.testing.assert_array_equal(folded(weight, constants[:1]), np.ones(20))
    inputs = RNG(3).normal(size=(50, 20))
    found = round_one(Use("x/weight", "linear", (6, 20), None), weight, inputs.T @ inputs, constants)
    assert _codes(found.weight) is None and _codes(found.weight * norm)[2] == 0


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "00000024")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r1jax.serve.export_command.CALIBRATION", 8)
        patch.setattr("r1jax.serve.export_command.CHECKED", 8)
        words = ExportArguments(checkpoint=str(checkpoint.path), output="", cases=2, to="litert", weights="int8")
        yield open_checkpoint(checkpoint, words)


def test_the_least_bytes_of_fp16_are_taken_that_keep_the_calls(opened, monkeypatch):
    """Of two weights that int8 changes, the one that matters stays fp16; where calls differ, more do."""
    cases = opened.rounding
    assert len(cases.train) == 8 and "train" in cases.train.name and "val" in cases.checked.source.name
    seen = []

    def options(cases, run, params, rounded):
        found = storage_options(cases, run, params, dict(list(rounded.items())[:6]))
        seen.append(found)
        return found

    agreements = iter([False, True])
    tried = []

    def compare(run, exported, limits):
        tried.append(run({name: x[:1] for name, x in exported.inputs(exported.source.read_batch(np.arange(1))).items()}))
        return {"agrees": next(agreements)}

    monkeypatch.setattr(export_rounding, "storage_options", options)
    monkeypatch.setattr(export_rounding, "compare", compare)
    monkeypatch.setattr(export_rounding, "SPARES", (0.0, 10.0))
    rounded = round_weights(cases, opened.task, opened.model, opened.params, [])
    (found,) = seen
    assert len(tried) == 2 and rounded.agreement["agrees"]
    assert set(rounded.fp16) == {name for name, (_, int8) in found.items() if int8.change > 0}
    assert any(int8.change > 0 for _, int8 in found.values())
    assert "nodule_present" in tried[0] and tried[0]["nodule_present"] != tried[1]["nodule_present"]


def test_a_file_that_is_not_int8_for_the_most_part_is_not_called_so():
    stored = {"int8": 960, "fp16": 30, "fp32": 10}
    assert stored_line("int8", stored, ["a/weight"]) == (
        "weights: 96.0% int8, 3.0% fp16, 1.0% fp32 of 1,000 bytes; fp16: a/weight"
    )
    with pytest.raises(UserError, match=r"only 50.0% of the bytes of the weights are int8.*--weights fp16"):
        stored_line("int8", {"int8": 50, "fp16": 50, "fp32": 0}, [])
    assert "fp16" in stored_line("fp16", {"int8": 0, "fp16": 90, "fp32": 10}, [])
