"""What is read of compiled programs and of traces."""

import pytest
from jax.profiler import ProfileData

from benchmarks.traces import Event, Program, between_neighbours, device_events

TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "step.py"

FunctionNames
1 "make_step.<locals>.step"
2 "layer_metrics"

FileLocations
1 {file_name_id=1 function_name_id=1 line=2 end_line=2 column=3 end_column=4}
2 {file_name_id=1 function_name_id=2 line=5 end_line=5 column=3 end_column=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} add(%p, %p), metadata={op_name="jit(step)/add" stack_frame_id=2}
}

%outer (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%q), kind=kLoop, calls=%fused
}

ENTRY %main (a: f32[8], b: (f32[8], f32[8])) -> (f32[8], f32[8]) {
  %a = f32[8]{0} parameter(0)
  %loop_add_fusion.3 = f32[8]{0} fusion(%a), kind=kLoop, calls=%outer
  %call.1 = (f32[8]{0}, /*index=1*/f32[8]{0}) call(%a), to_apply=%fused
  %gemm.2 = (f32[8]{0}, s8[4]{0}) custom-call(%a), custom_call_target="__cublas$gemm", backend_config={"x":{"y":1}}
  ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%a, %loop_add_fusion.3)
}
"""
TRACE = """planes { name: "/device:GPU:0"
  lines { id: 1 name: "Stream #1(Compute)" timestamp_ns: 0
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 2000000 }
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 stats { metadata_id: 7 str_value: "gemm.2" } } }
  lines { id: 2 name: "XLA Ops" timestamp_ns: 0 events { metadata_id: 1 offset_ps: 0 duration_ps: 16000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_tst_64x8" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_3" } }
  stat_metadata { key: 7 value { id: 7 name: "hlo_op" } } }"""


@pytest.fixture
def program():
    return Program(TEXT)


def test_kernels_and_the_operations_that_they_name(tmp_path):
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(TRACE))
    assert device_events(path) == [
        Event(0.0, 4000.0, "nvjet_tst_64x8", "gemm.2"),
        Event(5000.0, 7000.0, "loop_add_fusion_3", ""),
    ]


def test_instructions_launch_what_they_are(program):
    assert [one.opcode for one in program.entry] == ["parameter", "fusion", "call", "custom-call", "tuple"]
    assert program.launches() == 3  # that of the call too
    assert {one.opcode for one in program.inner(program.instructions["loop_add_fusion.3"])} == {
        "parameter",
        "fusion",
        "add",
    }


@pytest.mark.parametrize(
    "name, operation, found",
    [
        ("nvjet_tst_64x8", "gemm.2", "custom-call"),
        ("loop_add_fusion_3", "", "fusion"),
        ("loop_add_fusion_3", "command_buffer", "fusion"),
        ("loop_add_fusion_3", "call.1", "fusion"),
        ("nvjet_tst_64x8", "command_buffer", None),
        ("nvjet_tst_64x8", "t", None),
    ],
)
def test_an_event_is_found_by_its_operation_and_else_by_its_own_name(program, name, operation, found):
    one = program.instruction_of(Event(0.0, 1.0, name, operation))
    assert (one and one.opcode) == found


def test_functions_are_told_from_the_innermost_on(program):
    assert program.functions(program.instructions["d"].frame) == ["layer_metrics", "make_step.<locals>.step"]
    assert program.functions(0) == Program("ENTRY %main () -> f32[] {\n}").functions(3) == []
    right = TEXT.replace("id=1 parent_frame_id=1", "id=1 parent_frame_id=0").replace(
        "parent_frame_id=2", "parent_frame_id=1"
    )
    assert Program(right).functions(2) == ["layer_metrics", "make_step.<locals>.step"]


def test_what_has_no_part_takes_that_of_neighbours_that_agree():
    assert between_neighbours([None, "a", None, None, "a", None, "b", None]) == [
        *(None, "a", "a", "a", "a"),
        *(None, "b", None),
    ]
    assert between_neighbours([]) == []
