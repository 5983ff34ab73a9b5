"""benchmarks/medical_step.py puts the time of kernels where it belongs, and bounds a step by what was measured."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import medical_step
from benchmarks.medical_step import (
    UNKNOWN,
    Stepping,
    attributed,
    bounds,
    config_of,
    floor_of,
    kind_of,
    launch_case,
    main,
    markdown,
    muon_flops,
    part_of,
    traced,
)
from benchmarks.traces import Event, Program

MODEL = "R1._read/R1.encode"
TEXT = """HloModule jit_step, is_scheduled=true

%fused_volume (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %dot.1 = f32[8]{0} dot(%p, %p), metadata={op_name="jit(step)/jvp(R1)/R1._read/R1.encode/volume/merge_0/dot_general"}
  ROOT %add.1 = f32[8]{0} add(%dot.1, %p), metadata={op_name="jit(step)/jvp(R1)/R1._read/R1.encode/volume/add"}
}

%fused_text (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %reduce.1 = f32[8]{0} reduce(%q, %q), to_apply=%sum
}

ENTRY %main (state_step: f32[8]) -> f32[8] {
  %state_step.1 = f32[8]{0} parameter(0)
  %copy.1 = f32[8]{0} copy(%state_step.1)
  %loop_fusion.1 = f32[8]{0} fusion(%copy.1), kind=kLoop, calls=%fused_volume
  %gemm.1 = f32[8]{0} custom-call(%loop_fusion.1), custom_call_target="__cublas$gemm"
  %loop_fusion.2 = f32[8]{0} fusion(%gemm.1), kind=kLoop, calls=%fused_volume
  ROOT %input_fusion = f32[8]{0} fusion(%loop_fusion.2), kind=kInput, calls=%fused_text, \
metadata={op_name="jit(step)/transpose(jvp(R1))/R1._read/text/reduce_sum"}
}
"""


def run(*kernels):
    """Events one after another, 2 us each and 1 us apart."""
    return [Event(3e3 * i, 3e3 * i + 2e3, name, operation) for i, (name, operation) in enumerate(kernels)]


@pytest.mark.parametrize(
    "op_name, functions, part",
    [
        (f"jit(step)/jvp(R1)/{MODEL}/volume/stage_0_block_0/first/conv", (), "volume encoder"),
        (f"jit(step)/transpose(jvp(R1))/{MODEL}/volume/merge_1/dot_general", (), "volume encoder, backward"),
        (f"jit(step)/jvp(R1)/{MODEL}/table/layers_0/add", ("table",), "record encoder"),
        (f"jit(step)/jvp(R1)/{MODEL}/jit(_where)/select_n", (), "sequence of all modalities"),
        ("jit(step)/jvp(R1)/R1._read/text/words/dot_general", (), "text"),
        ("jit(step)/jvp(R1)/R1._read/decoder.embed/gather", (), "decoder"),
        ("jit(step)/transpose(jvp(R1))/R1._read/decoder/layers_0/mlp/mul", (), "decoder, backward"),
        ("jit(step)/jvp(R1)/R1._read/head_texture/add;jit(step)/mul", (), "heads"),
        ("jit(step)/transpose(jvp(R1))/R1._read/split", (), "sequence of all modalities, backward"),
        ("jit(step)/transpose(jvp(jit(log_softmax)))/div", (), "loss, backward"),
        ("jit(step)/mul", ("tree_norm", "scale_by_matched_muon.<locals>.update", "make_optimizer.<locals>.f"), "Muon"),
        ("jit(step)/mul", ("update_fn", "make_optimizer.<locals>.update", "make_step"), "AdamW and clipping"),
        ("jit(step)/select_n", ("_if_sound.<locals>.<lambda>", "make_step"), "guard"),
        ("reduce_sum", ("norm", "layer_metrics", "make_step"), "norms that are logged"),
        ("jit(step)/mul", ("_average.<locals>.<lambda>",), "weight average"),
        ("jit(step)/sub", ("Medical.prepare", "batch_gradients.<locals>.prepare"), "preparation of the batch"),
        ("jit(step)/jvp()/sub", ("loss_fn", "batch_gradients.<locals>.one"), "loss"),
        ("jit(step)/mul", (), "rest of the step"),
        ("reduce_sum", (), None),
        ("", (), None),
    ],
)
def test_parts_of_operations(op_name, functions, part):
    assert part_of(op_name, functions) == part


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("nvjet_hsh_128x64_64x9_1x2_h_bz_TNN", "products and convolutions"),
        ("sm90_xmma_gemm_f32f32_tf32f32", "products and convolutions"),
        ("gemm_fusion_dot_12", "products and convolutions"),
        ("sm80_xmma_wgrad_implicit_gemm", "products and convolutions"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention kernels"),
        ("loop_convert_fusion_2", "other fusions"),
        ("input_reduce_fusion", "reductions"),
        ("wrapped_transpose", "copies and transposes"),
        ("MemcpyD2D", "copies and transposes"),
        ("sort_3", "other kernels"),
    ],
)
def test_kinds_of_kernels_by_their_names_alone(kernel, kind):
    assert kind_of(kernel, None) == kind


def test_kinds_by_what_a_program_says():
    program = Program(TEXT)
    of = lambda name: kind_of("x", (one := program.instructions[name]), program.inner(one))  # noqa: E731
    assert of("loop_fusion.1") == of("gemm.1") == "products and convolutions"
    assert of("input_fusion") == "reductions" and of("copy.1") == "copies and transposes"


def test_time_goes_to_parts_and_kinds():
    events = run(
        ("MemcpyD2D", "copy.1"),
        ("loop_fusion_1", "command_buffer"),
        ("nvjet_64x8", "command_buffer"),  # between two kernels of the volume
        ("loop_fusion_2", ""),
        ("nvjet_64x8", "command_buffer"),  # between two parts
        ("input_fusion", "input_fusion"),
    )
    found = attributed(events, Program(TEXT), steps=2)
    assert found["parts"] == {
        "volume encoder": 3.0,
        "copies of the state": 1.0,
        UNKNOWN: 1.0,
        "text, backward": 1.0,
    }
    assert found["by_neighbours"] == 1.0
    assert found["kinds"] == {"products and convolutions": 4.0, "copies and transposes": 1.0, "reductions": 1.0}
    assert (found["kernels"], found["us"], found["between_us"]) == (3.0, 6.0, 2.5)
    assert found["costliest"][0] == {"kernel": "volume encoder: loop_fusion", "us": 2.0, "calls": 1.0}


def test_a_real_trace_is_attributed():
    def step(state, batch, limit):
        del limit
        return jnp.tanh(batch @ state) + 1.0, {}

    x = jnp.ones((256, 256))
    compiled = jax.jit(step, donate_argnums=0).lower(x, x, 1.0).compile()
    found = traced(Stepping(compiled, jnp.array(x), x), Program(compiled.as_text()))
    assert found["us"] > 0 and found["kernels"] >= 1
    assert "rest of the step" in found["parts"] and "products and convolutions" in found["kinds"]


def test_a_chain_counts_the_kernels_that_are_left():
    found = launch_case(samples=2)
    assert found["us_each"] > 0
    assert found["chains"]["sorted_again"]["kernels"] >= medical_step.CHAIN


def test_muon_multiplies_the_matrices_that_it_takes():
    config = config_of("", True, "run")
    params = {
        "volume": {
            "projection": {"weight": jnp.ones((16, 64)), "kernel": jnp.ones((3, 3, 8, 8)), "bias": jnp.ones(16)},
            "merge": {"weight": jnp.ones((4, 4))},
        }
    }
    products = lambda short, long: 5 * 2 * (2 * short * short * long + short**3)  # noqa: E731
    assert muon_flops(config, params) == products(16, 64) + products(8, 72)


RATES = [
    {"name": "ceiling matmul fp32", "tflops": 400.0},
    {"name": "ceiling matmul bf16", "tflops": 800.0},
    {"name": "ceiling copy", "tb_per_s": 4.0},
    {"name": "launch", "us_each": 2.0, "chains": {}},
]
STEP = {
    "name": "step",
    "batch_size": 32,
    "precision": "fp32",
    "ms": 6.0,
    "iqr_ms": 0.2,
    "fed_ms": 6.5,
    "examples_per_second": 32 / 6e-3,
    "model_flops": 7e9,
    "muon_flops": 1e9,
    "state_bytes": 4e6,
    "batch_bytes": 2e6,
    "accessed_bytes": 1.2e9,
    "dispatch_ms": 3.0,
    "kernels": 1500.0,
    "us": 4000.0,
    "between_us": 2000.0,
    "parts": {"volume encoder": 3000.0, "Muon": 1000.0},
    "kinds": {"other fusions": 4000.0},
    "by_neighbours": 12.0,
    "costliest": [{"kernel": "Muon: nvjet", "us": 500.0, "calls": 45.0}],
}
HOST = {"name": "host", "ms_a_case": {"one thread": 3.0, "as it is": 1.5}, "cores": 16, "as_it_is_threads": 2}


def test_bounds_are_of_the_rates_of_the_same_precision():
    found = bounds(STEP, RATES)
    expected = {"products": 0.02, "bytes": 0.0025, "accessed": 0.3, "launches": 3.0, "dispatch": 3.0}
    assert found == pytest.approx(expected)
    assert floor_of(found) == pytest.approx(0.02)
    assert bounds(STEP | {"precision": "bf16"}, RATES)["products"] == pytest.approx(0.01)


def test_bounds_without_rates_are_left_out():
    refused = [{"name": row["name"], "refused": "RuntimeError"} for row in RATES]
    assert bounds(STEP, refused) == {"dispatch": 3.0} and floor_of({"dispatch": 3.0}) is None
    assert "accessed" not in bounds(STEP | {"accessed_bytes": None}, RATES)


def test_markdown_tells_steps_bounds_parts_and_host():
    wide = STEP | {"name": "step train.batch_size=256", "batch_size": 256, "parts": {"volume encoder": 4000.0}}
    told = markdown({"results": [*RATES, STEP, HOST, wide, {"name": "step x=1", "refused": "UserError: no field x"}]})
    assert "| as it is | 32 | 6.000 ± 0.100 | 6.500 | 5,333 | 1,500 | 4,000 | 2,000 |" in told
    assert "| 0.0200 (300.0x) | 0.0025 (2,400.0x) | 0.3000 (20.0x) | 3.0000 (2.0x) | 3.0000 (2.0x) | 0.0200" in told
    assert "| volume encoder | 3,000 (75.0%) | 4,000 (100.0%) |" in told
    assert "| as it is, Muon: nvjet | 500.0 | 45.0 |" in told
    assert "| as it is, 2 threads | 1.500 | 48.00 ms, 8.0x | 384.00 ms, 64.0x |" in told
    assert "step x=1: UserError: no field x" in told and "`train.batch_size=256`" in told
    assert "Rates of this run: none." in markdown({"results": []})


def test_what_is_refused_does_not_end_the_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("not here")

    monkeypatch.setattr(medical_step, "start_platform", lambda _: None)
    for name in ("product_case", "copy_case", "launch_case", "host_case"):
        monkeypatch.setattr(medical_step, name, refuse)
    monkeypatch.setattr(medical_step, "step_case", lambda variant, *_: {k: v for k, v in STEP.items() if k != "name"})
    output = tmp_path / "found.json"
    main(["--output", str(output), "--variants", "", "model.precision=bf16", "--tiny"])
    results = json.loads(output.read_text())["results"]
    assert [row["name"] for row in results if "refused" not in row] == ["step", "step model.precision=bf16"]
    assert results[0]["refused"] == "ValueError: not here" and len(results) == 7
    main(["--output", str(output), "--limit", "-1"])
    assert len(json.loads(output.read_text())["results"]) == 7  # nothing was measured, and nothing written


@pytest.mark.slow
@pytest.mark.once  # newer versions of JAX compile the step for minutes on a CPU
def test_a_tiny_step_on_this_machine(tmp_path):
    output = tmp_path / "found.json"
    with jax.numpy_dtype_promotion("standard"):  # as train.py runs: optax mixes types in Muon
        main(["--output", str(output), "--variants", "", "--tiny", "--samples", "2"])
    rows = {row["name"]: row for row in json.loads(output.read_text())["results"]}
    assert not [row for row in rows.values() if "refused" in row]
    parts = rows["step"]["parts"]
    assert {"volume encoder", "volume encoder, backward", "Muon", "text", "decoder", "guard"} <= parts.keys()
    assert parts.get(UNKNOWN, 0.0) < 0.2 * sum(parts.values())
