import gzip
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from r1jax.config import ProfileConfig
from r1jax.train.profile import Profiler, _own_times, read_ops, table


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Folder, and what was said of two steps of three products."""
    workdir = tmp_path_factory.mktemp("traced")

    def heavy(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ x), x)

    x = jnp.ones((512, 512), jnp.float32)
    step = jax.jit(heavy).lower(x).compile()
    profiler, said = Profiler(ProfileConfig(steps=2, start=1), workdir, done=4), []
    for number in range(5, 10):
        if profiler.begins(number):
            profiler.start()
        jax.block_until_ready(step(x))
        if profiler.ends(number):
            said.append((number, profiler.stop()))
    return workdir, said


def test_the_steps_that_are_traced(traced):
    assert [number for number, _ in traced[1]] == [7]


def test_table_names_what_takes_the_time(traced):
    """In the trace's order: which operation takes longest is the machine's affair while others use it too."""
    first, *rows = traced[1][0][1].splitlines()
    assert first.split() == ["operation", "count", "total", "ms", "share"]
    *rows, where = rows
    assert 1 <= len(rows) <= 10 and where.startswith("trace of the steps: ")
    (trace,) = (traced[0] / "profile").rglob("*.xplane.pb")
    assert [row.split()[0] for row in rows] == [op.name for op in read_ops(trace)[:10]]
    assert any(re.match(r"\S*(dot|fusion|custom)", row) for row in rows)


def test_shares_add_up(traced):
    (trace,) = (traced[0] / "profile").rglob("*.xplane.pb")
    ops = read_ops(trace)
    assert sum(op.share for op in ops) == pytest.approx(1) and all(0 <= op.share <= 1 for op in ops)
    assert [op.milliseconds for op in ops] == sorted((op.milliseconds for op in ops), reverse=True)
    assert next(op for op in ops if "dot" in op.name or "fusion" in op.name).count >= 6  # 2 steps of 3 products
    assert table([]) == "the trace names no operation"


def test_perfetto_reads_the_trace(traced):
    (trace,) = (traced[0] / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    assert any("dur" in event for event in events)


def test_time_inside_an_operation_is_its_own():
    events = [("loop", 0.0, 10.0), ("dot", 1.0, 4.0), ("add", 4.0, 5.0), ("dot", 6.0, 9.0), ("copy", 10.0, 12.0)]
    assert sorted(_own_times(events)) == [("add", 1.0), ("copy", 2.0), ("dot", 3.0), ("dot", 3.0), ("loop", 3.0)]


def test_nothing_is_traced_unless_asked(tmp_path):
    profiler = Profiler(ProfileConfig(), tmp_path, done=0)
    assert not any(profiler.begins(step) or profiler.ends(step) for step in range(30))
    assert not profiler.missed(5)


def test_a_window_that_the_run_does_not_reach_is_said(tmp_path):
    profiler = Profiler(ProfileConfig(steps=2, start=10), tmp_path, done=20)
    assert profiler.missed(30) and not profiler.missed(31)


def test_a_run_writes_the_table(tiny, tmp_path, capsys):
    config = replace(tiny.config, profile=ProfileConfig(steps=2, start=3))
    replace(tiny, config=config).train(tmp_path)
    said = capsys.readouterr().err
    assert "operation" in said and "perfetto_trace.json.gz" in said
    row = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][0]
    assert 0 < row["goodput"] < 1 and row["tokens_per_second"] > 0 and "mfu" not in row


def gpu_plane(number):
    """A device as XLA's CUDA tracer writes it: streams with kernels and copies, and lines that sum them up again."""
    return f"""planes {{
      name: "/device:GPU:{number}"
      lines {{ id: 13 name: "Stream #13(Compute)" timestamp_ns: 1000
        events {{ metadata_id: 1 offset_ps: 0 duration_ps: 4000000000
                 stats {{ metadata_id: 1 ref_value: 3 }} stats {{ metadata_id: 2 str_value: "jit_step" }} }}
        events {{ metadata_id: 1 offset_ps: 5000000000 duration_ps: 2000000000
                 stats {{ metadata_id: 1 ref_value: 4 }} stats {{ metadata_id: 2 str_value: "jit_step" }} }}
        events {{ metadata_id: 2 offset_ps: 7000000000 duration_ps: 1000000000
                 stats {{ metadata_id: 1 ref_value: 5 }} }} }}
      lines {{ id: 20 name: "Stream #20(MemcpyD2H)" timestamp_ns: 1000
        events {{ metadata_id: 3 offset_ps: 1000000000 duration_ps: 1000000000 }} }}
      lines {{ id: 30 name: "XLA Ops" timestamp_ns: 1000
        events {{ metadata_id: 4 offset_ps: 0 duration_ps: 4000000000 stats {{ metadata_id: 1 ref_value: 3 }} }} }}
      lines {{ id: 31 name: "XLA Modules" timestamp_ns: 1000
        events {{ metadata_id: 5 offset_ps: 0 duration_ps: 8000000000 }} }}
      event_metadata {{ key: 1 value {{ id: 1 name: "nvjet_tst_128x256_64x4_h_bz_TNT" }} }}
      event_metadata {{ key: 2 value {{ id: 2 name: "loop_add_fusion_7" }} }}
      event_metadata {{ key: 3 value {{ id: 3 name: "MemcpyD2H" }} }}
      event_metadata {{ key: 4 value {{ id: 4 name: "custom-call.3" }} }}
      event_metadata {{ key: 5 value {{ id: 5 name: "jit_step(1)" }} }}
      stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
      stat_metadata {{ key: 2 value {{ id: 2 name: "hlo_module" }} }}
      stat_metadata {{ key: 3 value {{ id: 3 name: "custom-call.3" }} }}
      stat_metadata {{ key: 4 value {{ id: 4 name: "custom-call.9" }} }}
      stat_metadata {{ key: 5 value {{ id: 5 name: "command_buffer_2" }} }} }}"""


HOST_PLANE = """planes { name: "/host:CPU" lines { name: "python" timestamp_ns: 1000
  events { metadata_id: 1 duration_ps: 90000000000 stats { metadata_id: 1 str_value: "host" } } }
  event_metadata { key: 1 value { id: 1 name: "dispatch" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }"""


@pytest.mark.parametrize("devices", [1, 2])
def test_kernels_of_gpus_are_told_by_their_operations(tmp_path, devices):
    """Kernels of one name are told apart, those that name no operation or a CUDA graph go by their own names, and
    nothing counts twice."""
    text = "\n".join([HOST_PLANE, *map(gpu_plane, range(devices))])
    trace = tmp_path / "host.xplane.pb"
    trace.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    ops = {op.name: (op.count, op.milliseconds, op.share) for op in read_ops(trace)}
    expected = {"custom-call.3": 4.0, "custom-call.9": 2.0, "loop_add_fusion_7": 1.0, "MemcpyD2H": 1.0}
    assert ops == {name: (devices, pytest.approx(devices * t), pytest.approx(t / 8)) for name, t in expected.items()}
