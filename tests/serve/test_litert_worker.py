"""The worker's part that runs in the converter's Python: which codes it finds, and the file that it makes of them.

The converter's packages are not here: plain objects stand in for a model, and a small interpreter for LiteRT.
"""

import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from r1jax.serve.litert_worker import Given, _match, _narrowed, _packed, _triangles

RNG = np.random.default_rng
WIDTH = {"INT8": np.int8, "FLOAT16": np.float16, "FLOAT32": np.float32, "INT32": np.int32}


class Made:
    """A table of a model: any field may be set, and those that were not are None."""

    def __getattr__(self, name):
        return None


TensorType = IntEnum("TensorType", {"FLOAT32": 0, "FLOAT16": 1, "INT32": 2, "BOOL": 6, "INT8": 9, "INT4": 17})
BuiltinOperator = IntEnum(
    "BuiltinOperator", {"DEQUANTIZE": 6, "MUL": 18, "RESHAPE": 22, "GREATER_EQUAL": 62, "SLICE": 65}
)


class Model(bytearray):
    """A file that is read already."""


@pytest.fixture(autouse=True)
def schema(monkeypatch):
    """What the worker imports of LiteRT; a file is the model itself."""
    tables = dict.fromkeys(["TensorT", "BufferT", "OperatorT", "OperatorCodeT", "QuantizationParametersT"], Made)
    stand_in = SimpleNamespace(TensorType=TensorType, BuiltinOperator=BuiltinOperator, **tables)
    utilities = SimpleNamespace(read_model_from_bytearray=lambda model: model)
    package, tools = ModuleType("ai_edge_litert"), ModuleType("ai_edge_litert.tools")
    package.schema_py_generated, tools.flatbuffer_utils = stand_in, utilities
    for name, module in (("ai_edge_litert", package), ("ai_edge_litert.tools", tools)):
        monkeypatch.setitem(sys.modules, name, module)


def model_of(*constants: np.ndarray) -> Model:
    """A model with these constants, its first buffer empty."""
    model, tensors = Model(), []
    model.buffers, model.operatorCodes, model.metadata = [SimpleNamespace(data=None)], [], None
    for x in constants:
        kind = TensorType.BOOL if x.dtype == bool else TensorType.FLOAT32
        model.buffers.append(SimpleNamespace(data=x.reshape(-1).view(np.uint8)))
        tensors.append(
            SimpleNamespace(type=kind, shape=list(x.shape), buffer=len(model.buffers) - 1, quantization=None)
        )
    model.subgraphs = [SimpleNamespace(tensors=tensors, operators=[])]
    return model


def value_of(model: Model, place: int) -> np.ndarray:
    """What a tensor holds, by a reference of the four operations that widen."""
    (graph,) = model.subgraphs
    tensor = graph.tensors[place]
    made = [operation for operation in graph.operators if place in operation.outputs]
    if not made:
        data = model.buffers[tensor.buffer].data
        if tensor.type == TensorType.INT4:
            halves = np.stack([data & 0xF, data >> 4], -1).reshape(-1)[: int(np.prod(tensor.shape))]
            return (((halves.astype(np.int8) + 8) % 16) - 8).reshape(tensor.shape)
        return data.view(WIDTH[tensor.type.name]).reshape(tensor.shape)
    (operation,) = made
    inputs = [value_of(model, at) for at in operation.inputs]
    operator = model.operatorCodes[operation.opcodeIndex].builtinCode.name
    if operator == "DEQUANTIZE":
        about = graph.tensors[operation.inputs[0]].quantization
        scale = np.ones(1, np.float32) if about is None else about.scale
        shape = [
            -1 if about and len(scale) > 1 and axis == about.quantizedDimension else 1 for axis in range(inputs[0].ndim)
        ]
        found = inputs[0].astype(np.float32) * scale.reshape(shape)
    elif operator == "RESHAPE":
        found = inputs[0].reshape(inputs[1])
    elif operator == "SLICE":
        found = inputs[0][tuple(slice(first, first + size) for first, size in zip(*inputs[1:], strict=True))]
    else:
        found = {"MUL": np.multiply, "GREATER_EQUAL": np.greater_equal}[operator](*inputs)
    assert list(found.shape) == list(tensor.shape)
    return found


def given(shape: tuple[int, ...], blocks: int = 1, largest: int = 126, kind: str = "int8") -> tuple[Given, np.ndarray]:
    """Random codes below the largest that there are, as of scales in bf16, and the weight that they stand for."""
    rows, length = int(np.prod(shape[:-1])), shape[-1]
    step = -(-length // blocks)
    codes = np.pad(RNG(1).integers(-largest, largest + 1, (rows, length)), ((0, 0), (0, blocks * step - length)))
    scale = RNG(2).uniform(0.01, 0.02, rows * blocks).astype(np.float32)
    groups = codes.reshape(-1, step).astype(np.int8)
    wide = (groups.astype(np.float32) * scale[:, None]).reshape(rows, -1)[:, :length].reshape(shape)
    return Given(kind, groups, scale, length), wide


NORM = RNG(3).uniform(0.2, 3, 40).astype(np.float32)
CASES = {
    "a row a scale": (given((8, 40)), lambda w: w, ["DEQUANTIZE"]),
    "a kernel": (given((8, 72)), lambda w: w.reshape(8, 3, 3, 8), ["DEQUANTIZE"]),
    "fields": (given((4, 8, 40)), lambda w: w, ["DEQUANTIZE", "RESHAPE"]),
    "blocks of 4 bits": (given((8, 40), 2, 6, "int4"), lambda w: w, ["DEQUANTIZE", "RESHAPE"]),
    "a shorter last block": (given((8, 41), 3, 6, "int4"), lambda w: w, ["DEQUANTIZE", "RESHAPE", "SLICE"]),
    "a folded norm": (given((8, 40)), lambda w: w * NORM, ["DEQUANTIZE", "MUL"]),
    "blocks and a norm": (given((8, 40), 2, 6, "int4"), lambda w: w * NORM, ["DEQUANTIZE", "RESHAPE", "MUL"]),
    "a shorter block of a kernel": (
        given((8, 72), 5, 6, "int4"),
        lambda w: w.reshape(8, 3, 3, 8),
        ["DEQUANTIZE", "RESHAPE", "SLICE", "RESHAPE"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_given_codes_are_stored_as_they_are_and_widened_to_what_the_program_had(case):
    (codes, wide), shape, operators = CASES[case]
    weights, other = shape(wide), RNG(4).normal(size=(16, 16)).astype(np.float32)
    model = model_of(other, weights)
    content, stored, found = narrowed(model, {"another": given((8, 8))[0], "w": codes}, narrow=False)
    assert content == b"file" and found == ["w"]
    np.testing.assert_allclose(value_of(model, 1), weights, rtol=1e-6)
    np.testing.assert_array_equal(value_of(model, 0), other)
    (graph,) = model.subgraphs
    assert [model.operatorCodes[operation.opcodeIndex].builtinCode.name for operation in graph.operators] == operators
    (held,) = (tensor for tensor in graph.tensors if tensor.type.name == codes.kind.upper())
    codes_there = value_of(model, graph.tensors.index(held))
    np.testing.assert_array_equal(np.sort(codes_there, axis=None), np.sort(codes.groups, axis=None))
    numbers = -(-codes_there.size * (4 if codes.kind == "int4" else 8) // 8)
    assert stored == {"int4": 0, "int8": 0, "fp16": 0, codes.kind: numbers, "fp32": 1024 + 160 * ("MUL" in operators)}


def narrowed(model: Model, codes: dict[str, Given] | None, *, narrow: bool):
    """`_narrowed` without the writing of the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r1jax.serve.litert_worker._packed", lambda _: b"file")
        return _narrowed(model, codes, narrow=narrow)


def test_codes_without_their_scales_have_one_also_where_the_program_has_them_turned():
    """As of a product that is given rounded inputs, whose sums are multiplied by the scales."""
    codes, _ = given((2, 8, 40))
    plain = codes.groups.astype(np.float32).reshape(2, 8, 40)
    for weights in (plain, np.ascontiguousarray(plain.swapaxes(1, 2))):
        name, stored = _match(weights, {"w": codes})
        assert name == "w" and stored.scale.tolist() == [1] and stored.columns is None
        np.testing.assert_array_equal(stored.values, weights)


def test_numbers_beside_the_codes_are_not_taken_for_them():
    codes, wide = given((8, 40))
    wide = wide.copy()
    wide[3, 5] += 0.02
    assert _match(wide, {"w": codes}) == (None, None)


def test_other_weights_are_codes_where_they_are_some_and_else_fp16_and_vectors_stay():
    codes = RNG(0).integers(-127, 128, (8, 40)).astype(np.float32)
    codes[:, 0] = 127
    floats, vector = RNG(1).normal(size=(16, 32)).astype(np.float32), RNG(2).normal(size=300).astype(np.float32)
    model = model_of(codes * 0.5, floats, vector)
    _, stored, found = narrowed(model, None, narrow=True)
    assert stored == {"int4": 0, "int8": 320, "fp16": 1024, "fp32": 1200} and found == []
    np.testing.assert_array_equal(value_of(model, 0), codes * 0.5)
    np.testing.assert_array_equal(value_of(model, 1), floats.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(value_of(model, 2), vector)
    assert len(model.operatorCodes) == 1  # one operator, however many weights


def test_a_causal_mask_is_made_of_two_rows_of_numbers_and_another_stays():
    mask = np.tri(64, dtype=bool)[None]
    model = model_of(mask, ~mask)
    graph = model.subgraphs[0]
    graph.operators = _triangles(model)
    assert len(graph.operators) == 1 and graph.operators[0].outputs == [0]
    np.testing.assert_array_equal(value_of(model, 0), mask)
    held = sum(len(model.buffers[at].data) for at in {tensor.buffer for tensor in graph.tensors} - {0, 2})
    assert held == 4 * 64


def test_the_file_has_no_names_nothing_unused_and_equal_numbers_once():
    flatbuffers = pytest.importorskip("flatbuffers", reason="by which LiteRT's files are written: r1jax[export]")
    model = model_of(np.ones((2, 3), np.float32), np.zeros(4, np.float32))
    model.buffers.append(SimpleNamespace(data=np.ones(999, np.uint8)))  # of no tensor
    graph = model.subgraphs[0]
    graph.operators = [SimpleNamespace(inputs=[0], outputs=[1], builtinOptions=None)]
    for tensor in graph.tensors:
        tensor.name, tensor.quantization = b"name", Made()
        tensor.quantization.scale, tensor.quantization.zeroPoint = np.ones(2, np.float32), [0, 0]
    places = []

    def pack(builder):
        assert isinstance(builder, flatbuffers.Builder)
        places.extend(builder.CreateNumpyVector(tensor.quantization.zeroPoint) for tensor in graph.tensors)
        builder.StartObject(0)
        return builder.EndObject()

    model.Pack = pack
    content = _packed(model)
    assert content[4:8] == b"TFL3" and places[0] == places[1]
    assert [tensor.name for tensor in graph.tensors] == [None, None]
    assert [buffer.data is None for buffer in model.buffers] == [True, False, False, True]
