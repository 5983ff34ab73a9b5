"""Export of checkpoints with `model.quant`: the artefact has their codes, and computes what they compute."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.models.moe import dense_mixtures
from r1jax.models.quantized import Use
from r1jax.ops.quantize import Quantized, pack_int4
from r1jax.ops.quantized_dot import Scheme
from r1jax.serve import export_jax
from r1jax.serve.export_codes import OwnCodes, in_groups
from r1jax.serve.export_command import ExportArguments, Opened, exported_weights, limits_of, open_checkpoint
from r1jax.serve.export_gate import FP32, compare
from r1jax.serve.export_graph import constants
from r1jax.tasks.finance.operating import operating_points
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoints import write_sealed
from r1jax.train.quantized import FOLDER, is_codes, write_codes
from tests.serve.exported import export_to_jax, merged, write_checkpoint, write_random
from tests.serve.exported_finance import get_config as get_finance_config

RULES = ("head_=float", "embed_tokens=int4", "table=int4/4", ".=int8:int8/running")
"""All kinds at once: floats, weights alone, blocks, and products of int8 with ranges."""


def opened_with(folder: Path, quant: tuple[str, ...], **asked) -> Opened:
    """A checkpoint that was trained with rules, and reads several bytes as one token."""
    changes = merged()
    changes["model"] = dataclasses.replace(changes["model"], quant=quant)
    checkpoint = write_checkpoint(folder / "00000024", **changes)
    return open_checkpoint(checkpoint, ExportArguments(checkpoint=str(checkpoint.path), output="", cases=12, **asked))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Opened:
    return opened_with(tmp_path_factory.mktemp("run"), RULES)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    return export_to_jax(tmp_path_factory.mktemp("exported"), trained)


def test_the_program_of_a_run_with_rounding_says_what_the_checkpoint_says(exported):
    """Whose weights are floats that it rounds as it goes, and whose ranges are numbers beside them: no code differs."""
    card = json.loads((exported / "card.json").read_text())
    rows = card["agreement"]["findings"]
    assert len(rows) == 4 and all(row["largest_difference"] < 1e-6 for row in rows.values())
    assert card["quantized"] == {"rules": list(RULES), "activations": "rounded as in the checkpoint"}


def test_the_program_multiplies_int8_and_holds_codes(trained, exported):
    program = jax.export.deserialize(bytearray((exported / export_jax.MODEL).read_bytes()))
    text = program.mlir_module()
    found = re.findall(r"stablehlo\.dot_general .*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> tensor<.*x(\w+)>", text)
    assert found.count(("i8", "i8", "i32")) >= 10
    # No weight of codes lies there as floats: what does is less than the smallest part of them would be.
    sizes = re.findall(r"stablehlo\.constant dense<.*> : tensor<((?:\d+x)+)f32>", text)
    floats = sum(int(np.prod([int(n) for n in size.split("x")[:-1]])) for size in sizes)
    numbers = sum(codes.values.size for codes in jax.tree.leaves(trained.params, is_leaf=is_codes) if is_codes(codes))
    assert floats < 0.2 * numbers


def test_iree_is_given_the_same_codes_and_computes_the_rest_in_fp32(trained):
    config = dataclasses.replace(trained.config, model=dataclasses.replace(trained.config.model, precision="bf16"))
    made, params = exported_weights(config, None, trained.codes, "iree")
    assert made.model == trained.config.model and made.model.quant == RULES
    assert jax.tree.structure(params) == jax.tree.structure(trained.params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(trained.params), strict=True):
        assert ours.dtype == (np.float32 if theirs.dtype == ml_dtypes.bfloat16 else theirs.dtype)  # scales widen
        np.testing.assert_array_equal(ours, theirs)


def test_the_card_says_how_weights_are_stored(trained, exported):
    stored = json.loads((exported / "card.json").read_text())["stored"]
    assert stored["weights"]["decoder/embed_tokens"] == "int4" and "head_malignancy/weight" not in stored["weights"]
    assert stored["bytes"]["int4"] >= 264 * 16 // 2
    # The language head and MTP answer nothing here: the file has no byte of them.
    assert all(re.search("lm_head|mtp", name) is None for name in stored["weights"])
    text = jax.export.deserialize(bytearray((exported / export_jax.MODEL).read_bytes())).mlir_module()
    sizes = re.findall(r"stablehlo\.constant dense<.*> : tensor<((?:\d+x)+)i8>", text)
    assert stored["bytes"]["int8"] == sum(int(np.prod([int(n) for n in size.split("x")[:-1]])) for size in sizes)


def test_a_quantized_checkpoint_is_the_same_program(trained, exported, tmp_path):
    """As `r1jax quantize` stores it; and another would be told from it."""
    config, meta = trained.checkpoint.config(), trained.checkpoint.meta() | {"step": 24}
    codes = trained.codes
    checkpoint = write_sealed(
        tmp_path / "codes", codes.params, config, meta, {}, lambda d: write_codes(d / FOLDER, codes.params, codes.kinds)
    )
    asked = ExportArguments(checkpoint=str(checkpoint.path), output="", cases=12)
    again = open_checkpoint(checkpoint, asked)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    jax.tree.map(np.testing.assert_array_equal, again.exported.scored.predicted, trained.exported.scored.predicted)
    limits, run = limits_of(config.model, again.codes, asked), export_jax.read_model(exported)
    assert limits == FP32 and compare(run, again.exported, limits)["agrees"]
    moved = lambda inputs: {name: x + 1e-3 for name, x in run(inputs).items()}  # noqa: E731
    assert not compare(moved, again.exported, limits)["agrees"]


def test_the_program_of_a_finance_run_says_what_the_checkpoint_says(tmp_path):
    """In its batches of 256 XLA left the cast of a scale to bf16 out of the checkpoint's program, and moved scores."""
    config = get_finance_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, quant=("int8",)))
    score = np.linspace(0, 1, 100).astype(np.float32)
    points = {"both": operating_points((score > 0.7).astype(np.float32), score, 10, "isotonic")}
    checkpoint = write_random(tmp_path / "00000024", Finance(config), points)
    opened = open_checkpoint(checkpoint, ExportArguments(checkpoint=str(checkpoint.path), output="", cases=8))
    run = jax.jit(opened.exported.graph(opened.task, opened.model, opened.params))
    agreement = compare(lambda inputs: jax.device_get(run(inputs)), opened.exported, FP32)
    assert agreement["findings"]["score"]["largest_difference"] < 1e-6


@pytest.mark.parametrize(("quant", "largest"), [(("int4",), 1e-5), (("int8",), 0.05)])
def test_a_device_has_the_checkpoint_s_codes(tmp_path, quant, largest):
    """Of weights alone exactly what they stand for; rounded activations fall to other codes at their edges."""
    edge = opened_with(tmp_path, quant, to="litert", weights="int8")
    assert edge.config.model.precision == "fp32"
    assert edge.rounding is None  # no codes are chosen beside those that it has
    assert {leaf.dtype for leaf in jax.tree.leaves(edge.params)} == {np.dtype(np.float32)}
    run = jax.jit(edge.exported.graph(edge.task, edge.model, edge.params))
    asked = ExportArguments(checkpoint="", output="", to="litert")

    def predict(inputs):
        with dense_mixtures():
            return jax.device_get(run(inputs))

    agreement = compare(predict, edge.exported, limits_of(edge.checkpoint.config().model, edge.codes, asked))
    assert agreement["agrees"]
    assert agreement["findings"]["malignancy"]["largest_difference"] < largest


def test_activations_of_fp8_are_refused_for_a_device(tmp_path):
    with pytest.raises(
        UserError, match=r"rounds activations to fp8 \(model.quant fp8\), which LiteRT has not"
    ) as caught:
        opened_with(tmp_path, ("fp8",), to="litert")
    assert "\n" not in str(caught.value)


def test_codes_of_four_bits_are_two_a_byte_in_a_program():
    values = np.random.default_rng(0).integers(-7, 8, (3, 5)).astype(np.int8)
    tree = {"w": Quantized(values.astype(jnp.int4), np.ones((3, 1), jnp.bfloat16)), "b": np.ones(2, np.float32)}
    lowered = jax.jit(lambda: constants(tree)).lower()
    assert "tensor<8xui8>" in lowered.as_text() and "3x5xi4" not in lowered.as_text()
    found = lowered.compile()()
    assert found["w"].values.dtype == jnp.int8
    np.testing.assert_array_equal(found["w"].values, values)
    assert len(pack_int4(values)) == 8


@pytest.mark.parametrize(
    ("role", "name", "shape", "scheme", "order"),
    [
        ("linear", "x/weight", (6, 10), Scheme("int4", block=4), "oi"),
        ("experts", "x/gate_up_proj", (2, 6, 10), Scheme("int8"), "eoi"),
        ("experts", "x/down_proj", (2, 6, 10), Scheme("int4", block=4), "oei"),
        ("experts", "x/down_proj", (2, 6, 10), Scheme("int8", "int8"), "eoi"),
        ("fields", "x/weight", (2, 6, 10), Scheme("int8"), "eoi"),
    ],
)
def test_groups_stand_for_the_weight_in_the_order_of_the_file(role, name, shape, scheme, order):
    """Of three blocks of a row of ten the last is shorter, and filled up."""
    rng, blocks = np.random.default_rng(0), 3 if scheme.block else 1
    values = rng.integers(-7, 8, shape).astype(np.int8)
    scale = rng.uniform(0.5, 2, (*shape[:-1], blocks)).astype(ml_dtypes.bfloat16)
    use = Use(name, role, shape, None)
    tree = {"x": {name.removeprefix("x/"): Quantized(values, scale)}}
    (found,) = in_groups(OwnCodes(tree, {name: (use, scheme)})).values()
    step = -(-10 // blocks)
    wide = values * np.repeat(scale.astype(np.float32), step, axis=-1)[..., :10]
    expected = np.einsum(f"{'eoi'[-len(shape) :]}->{order}", wide).reshape(-1, 10)
    rows = (found.groups * found.scale[:, None]).reshape(len(expected), -1)
    np.testing.assert_array_equal(rows[:, :10], expected)
    assert found.kind == scheme.weights and found.row == 10 and not rows[:, 10:].any()


def test_what_is_no_integer_times_a_scale_is_not_given_to_a_device():
    use, q = Use("x/weight", "linear", (2, 4), None), Quantized(np.zeros((2, 4), np.uint8), np.ones((2, 1)))
    for kind in ("affine8", "fp8"):
        assert in_groups(OwnCodes({"x": {"weight": q}}, {"x/weight": (use, Scheme(kind))})) == {}
