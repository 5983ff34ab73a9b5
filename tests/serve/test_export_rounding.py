"""Weights of an int8 edge file: their codes, what they are chosen by, and that the worker finds them again."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1jax.arguments import EvalArguments, EvalData
from r1jax.data.transaction_simulator import simulate
from r1jax.errors import UserError
from r1jax.models.quantized import Use
from r1jax.models.r1 import R1
from r1jax.serve import export_rounding
from r1jax.serve.evaluate import scoring_config
from r1jax.serve.export_command import EXPORTS, ExportArguments, open_checkpoint, rounding_cases, stored_line
from r1jax.serve.export_finance import FinanceExport
from r1jax.serve.export_rounding import (
    BITS,
    bytes_of_others,
    calibration_inputs,
    folded,
    gptq_rows,
    int8_share,
    mostly_int8,
    nearest,
    round_one,
    round_weights,
    storage_options,
    tensor_of,
)
from r1jax.serve.litert_worker import STEPS, _codes, _packed_int4, storable
from r1jax.serve.quantize_budget import Option
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.evaluation import Evaluator
from tests.serve.exported import write_checkpoint
from tests.serve.exported_finance import get_config as get_finance_config
from tests.train.experiment import one_device

RNG = np.random.default_rng


def error(found: np.ndarray, weight: np.ndarray, inputs: np.ndarray) -> float:
    return float(np.sum(((found - weight) @ inputs.T) ** 2))


@pytest.mark.parametrize("kind", STEPS)
def test_rounding_by_inputs_loses_less_and_stays_codes_of_one_scale_a_row(kind):
    weight = RNG(0).normal(size=(8, 24))
    inputs = RNG(1).normal(size=(200, 3)) @ RNG(2).normal(size=(3, 24)) + 0.1 * RNG(3).normal(size=(200, 24))
    found = gptq_rows(weight, inputs.T @ inputs, STEPS[kind])
    assert error(found, weight, inputs) < 0.3 * error(nearest(weight, 0, STEPS[kind]), weight, inputs)
    is_kind, codes, scale, axis, *_ = _codes(found.astype(np.float32))
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
        ("embedding", "x", (1, 9, 40)),
        ("fields", "x/weight", (3, 8, 6)),
        ("experts", "x/gate_up_proj", (2, 6, 20)),
        ("experts", "x/down_proj", (2, 20, 6)),
    ],
)
def test_what_is_rounded_is_stored_without_further_loss(role, name, shape, kind):
    weight, use = RNG(0).normal(size=shape).astype(np.float32), Use(name, role, shape, None)
    inputs = RNG(1).normal(size=(50, tensor_of(use, weight).shape[-1]))
    square = inputs.T @ inputs if role in ("linear", "convolution") else None
    found = round_one(use, weight, square, np.ones(inputs.shape[1]), kind)
    tensor = tensor_of(use, found.weight)  # as it will lie in the file
    is_kind, codes, scale, axis, *_ = _codes(tensor)
    assert is_kind == kind
    assert found.weight.shape == shape and len(scale) == found.channels == tensor.shape[axis]
    step = scale.reshape([-1 if place == axis else 1 for place in range(tensor.ndim)])
    np.testing.assert_allclose(codes * step, tensor, rtol=1e-5)
    assert np.abs(found.weight - weight).max() < 4 * scale.max()


def test_numbers_that_are_no_codes_are_not_stored_as_int8():
    weight = RNG(0).normal(size=(6, 20)).astype(np.float32)
    assert _codes(weight) is None
    rounded = nearest(weight.astype(np.float64), 1, STEPS["int8"]).astype(np.float32)
    found = _codes(rounded)
    assert (found.kind, found.axis) == ("int8", 1)
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
    factor = folded(weight, constants)
    found = round_one(Use("x/weight", "linear", (6, 20), None), weight, inputs.T @ inputs, factor, "int8")
    assert _codes(found.weight) is None and _codes(found.weight * norm)[0] == "int8"
    norm[3] = 0  # no code can be divided by it
    assert folded(weight, [weight * norm]) is None


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
    assert abs(tried[0] - exact[0]) > abs(tried[2] - exact[0])
    # There was room for all of them as fp16, but for the name of the file.
    sizes = {name: (fp16.bytes // 2) for name, (fp16, *_) in options.items()}
    assert set(rounded.kinds.values()) == {"fp16", "int8"} and int8_share(rounded.kinds, sizes, 0) > 0.5


def test_int8_is_most_of_the_bytes_whatever_there_is_room_for():
    changes = {"a": (0.0, 1.0, 50.0), "b": (0.0, 2.0, 90.0), "c": (0.0, 3.0, 70.0)}
    sizes = dict.fromkeys(changes, 1000)
    found = {
        name: [
            Option(kind, 1000 * BITS[kind] // 8, change)
            for kind, change in zip(("fp16", "int8", "int4"), made, strict=True)
        ]
        for name, made in changes.items()
    }
    # All as fp16 would change nothing, and leave no int8; one as fp16 is 2,000 of 4,000 bytes, which is not most.
    assert mostly_int8(found, 9000, sizes, 0) == {"a": "int8", "b": "int8", "c": "int8"}
    # Of larger ones beside it the last may be fp16, as far as others leave int8 the larger part.
    sizes, found["a"] = sizes | {"a": 3000}, [o._replace(bytes=3 * o.bytes) for o in found["a"]]
    assert mostly_int8(found, 9000, sizes, 0) == {"a": "int8", "b": "int8", "c": "fp16"}
    assert mostly_int8(found, 9000, sizes, 2000) == {"a": "int8", "b": "int8", "c": "int8"}
    assert int8_share({"a": "int8", "b": "int8", "c": "fp16"}, sizes, 2000) == 0.5
    assert mostly_int8(found, 9000, sizes, 5000) is None
    assert mostly_int8(found, 3000, sizes, 0) is None  # no room for any but int4


def test_a_file_that_cannot_be_int8_for_the_most_part_is_refused_before_anything_is_tried(opened, monkeypatch):
    monkeypatch.setattr(export_rounding, "storage_options", lambda *_: pytest.fail("it was tried"))
    vectors = [np.zeros(100_000, np.float32)]
    with pytest.raises(UserError, match=r"at most \d\.\d% of the bytes of the weights can be int8.*--weights fp16"):
        round_weights(opened.rounding, opened.task, opened.model, opened.params, vectors)


def test_bytes_of_others_are_those_of_vectors_small_matrices_and_what_has_no_codes():
    shapes = [(32, 32), (16, 64), (100,), (4, 4)]
    assert bytes_of_others([np.zeros(shape) for shape in shapes], {"w": 1024}) == 2 * 1024 + 4 * 100 + 4 * 16


def test_two_codes_of_4_bits_are_a_byte_the_first_in_its_lower_half():
    packed = _packed_int4(np.array([[1, -7, 3]], np.int8))
    assert packed.dtype == np.uint8 and packed.tolist() == [0x91, 0x03]


def test_a_vector_is_not_rounded_since_the_worker_leaves_it_as_it_is():
    assert not storable((1, 512)) and not storable((512,)) and not storable((8, 31)) and storable((8, 32))


def test_an_output_that_one_way_leaves_constant_does_not_outweigh_the_others(opened):
    """As payments without notes, shown as their notes alone, of which all have one score."""
    cases = opened.rounding
    constant = [0.5] * 8 * (len(cases.checked.shown) - 1)
    score = np.array([0.2, 0.4, 0.6, 0.8, 0.2, 0.4, 0.6, 0.8, *constant], np.float32)
    rounded = {"w": {"int8": export_rounding.Codes(np.full(4, 0.01, np.float32), 1)}}
    run = lambda params, inputs: dict.fromkeys(cases.checked.decided, score + params["w"][0])  # noqa: E731
    _, int8 = storage_options(cases, run, {"w": np.zeros(4, np.float32)}, rounded)["w"]
    assert 0 < int8.change < 50  # of a variance of nothing it would be a million


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """A checkpoint of payments in a file, that one and a later one; there are no weights, and nothing is predicted."""
    found = simulate(3, 30, 90)
    columns = {
        "TRANSACTION_ID": found.ids,
        "TX_DATETIME": pa.array(found.seconds, pa.timestamp("s")),
        "CUSTOMER_ID": found.customers.take(pa.array(found.customer)),
        "TERMINAL_ID": found.terminals.take(pa.array(found.terminal)),
        "TX_AMOUNT": pa.array(found.amount),
        "TX_FRAUD": pa.array(found.fraud),
    }
    table, files = pa.table(columns), [str(tmp_path / name) for name in ("earlier.parquet", "later.parquet")]
    half = int(np.searchsorted(found.seconds, found.seconds.mean()))
    for file, part in zip(files, (table.slice(0, half), table.slice(half)), strict=True):
        pq.write_table(part, file)
    config = get_finance_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=files[0]))
    monkeypatch.setitem(EXPORTS, "finance", Chosen)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "meta.json").write_text('{"data": {}}')
    return Checkpoint(tmp_path), files


class Chosen(FinanceExport):
    """The payments alone."""

    def __init__(self, checkpoint, evaluator, params, source):
        self.source = source


def rounded_by(checkpoint, **data):
    asked = ExportArguments(checkpoint="run", output="", data=EvalData(**data), alerts_per_day=3.0)
    told = EvalArguments(checkpoint="run", data=asked.data, alerts_per_day=3.0)
    task = Finance(scoring_config(checkpoint, told))
    evaluator = Evaluator(R1(task.config.model, task.heads), task, one_device())
    return rounding_cases(checkpoint, evaluator, {}, asked)


def test_cases_of_training_are_read_without_themselves_as_history_where_a_later_file_is_compared_on(stream):
    checkpoint, files = stream
    cases = rounded_by(checkpoint, path=files[1], split="all")
    assert cases.train.name == f"{files[0]}, train" and len(cases.train) and len(cases.checked.source)


def test_training_cases_that_are_not_here_are_said(stream):
    checkpoint, files = stream
    Path(files[0]).unlink()
    with pytest.raises(UserError, match=r"earlier.parquet, which .* was trained on, is not here: bring it back"):
        rounded_by(checkpoint, path=files[1], split="all")


@pytest.mark.parametrize("split", ["train", "all"])
def test_a_comparison_on_the_cases_that_weights_are_rounded_by_is_refused(stream, split):
    with pytest.raises(UserError, match=f"data.split is '{split}': compare the export on others by --data.split test"):
        rounded_by(stream[0], split=split)


def test_a_file_that_is_not_int8_for_the_most_part_is_not_called_so():
    stored = {"int4": 100, "int8": 860, "fp16": 30, "fp32": 10}
    assert stored_line("int8", stored) == "weights: 10.0% int4, 86.0% int8, 3.0% fp16, 1.0% fp32 of 1,000 bytes"
    with pytest.raises(UserError, match=r"only 50.0% of the bytes of the weights are int8.*--weights fp16"):
        stored_line("int8", {"int4": 0, "int8": 50, "fp16": 50, "fp32": 0})
    assert stored_line("fp16", {"int4": 0, "int8": 0, "fp16": 90, "fp32": 10}) == (
        "weights: 90.0% fp16, 10.0% fp32 of 100 bytes"
    )
