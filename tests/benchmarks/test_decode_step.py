"""What the benchmark of a step reads out of compiled programs and traces."""

import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks.decode_step import SCALES, bytes_read, cases, launches
from benchmarks.traces import device_events, kernels

PROGRAM = """
%small (a: f32[]) -> f32[] {
  %x = f32[] fusion(%a), kind=kLoop, calls=%f
}

%large.7 (a: f32[]) -> f32[] {
  %x = f32[8]{0} fusion(%a), kind=kLoop, calls=%f
  %y = (f32[8]{0}, f32[8]{0}) custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={}
  %z = f32[8]{0} fusion(%y), kind=kLoop, calls=%g
  ROOT %c = f32[8]{0} copy(%z)
}

ENTRY %main (a: f32[]) -> f32[] {
  %o = f32[] fusion(%a), kind=kLoop, calls=%f
  %v = f32[] while(%o), condition=%c, body=%small
  ROOT %w = f32[] while(%o), condition=%c, body=%large.7
}
"""
TRACE = """planes { name: "/device:GPU:0"
  lines { id: 1 name: "Stream #1(Compute)" timestamp_ns: 0
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 }
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 2000000 }
    events { metadata_id: 3 offset_ps: 10000000 duration_ps: 6000000 } }
  lines { id: 2 name: "XLA Ops" timestamp_ns: 0 events { metadata_id: 1 offset_ps: 0 duration_ps: 16000000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_fusion_3" } }
  event_metadata { key: 2 value { id: 2 name: "loop_fusion_12" } }
  event_metadata { key: 3 value { id: 3 name: "rows_times_16384x2048" } } }"""


def test_launches_are_those_of_the_largest_loop():
    assert launches(PROGRAM) == {"fusion": 2, "__gpu$xla.gpu.triton": 1, "copy": 1}
    assert launches("ENTRY %main () -> f32[] {\n}") == {}


def test_kernels_of_one_kind_and_the_pauses_between_them_are_summed(tmp_path):
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(TRACE))
    found = kernels(device_events(path), 2)
    assert (found["us"], found["between_us"], found["kernels"]) == (6.0, 2.0, 1.5)
    costliest = [(k["kernel"], k["us"], k["calls"]) for k in found["costliest"]]
    assert costliest == [("loop_fusion", 3.0, 1.0), ("rows_times_16384x2048", 3.0, 0.5)]
    assert found["pauses_after"] == {"loop_fusion": 2.0}


def test_a_token_reads_the_experts_that_it_chooses_and_no_embedding():
    config = SCALES["full"].one
    size = jnp.zeros((4, 8), jnp.bfloat16)  # 64 bytes
    params = {"embed_tokens": size, "layers_0": {"mlp": {"experts": {"down_proj": size}, "gate": {"weight": size}}}}
    share = config.num_experts_per_tok / config.n_routed_experts
    assert bytes_read(config, params) == pytest.approx(64 + 64 * share)


def test_both_sides_of_every_case_are_measured():
    names = [name for name, _ in cases(SCALES["full"], 20)]
    assert len(names) == len(set(names))
    for name in names:
        if name.endswith(", fused") and not name.startswith(("profile mixture", "large")):
            assert name.replace("fused", "modules") in names
