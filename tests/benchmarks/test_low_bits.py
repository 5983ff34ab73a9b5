"""What the benchmark of few bits reads out of compiled programs, and how it sets cases beside bf16."""

from benchmarks.low_bits import SCALES, cases, markdown, table
from benchmarks.low_bits_products import products_of

PROGRAM = """
  %a = (s32[32,64]{1,0}, s8[33]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %b = s32[32,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %c = s32[32,64]{1,0} dot(%y, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %d = (f32[8]{0}, s32[8]{0}) custom-call(%z), custom_call_target="__cub$DeviceRadixSort"
"""


def test_products_are_counted_by_type_and_by_what_forms_them():
    assert products_of(PROGRAM) == ["1 x s32 __cublas$lt$matmul", "2 x s32 dot"]


def test_cases_stand_beside_bf16_of_their_kind_and_size():
    rows = [
        {"name": "product bf16 8x4", "ms": 1.0},
        {"name": "product bf16 4x8", "ms": 3.0},
        {"name": "product int8 4x8", "ms": 2.0},
        {"name": "decode int8_weights, int8 cache", "ms": 2.0},
        {"name": "batch fp8", "refused": "no such type"},
    ]
    lines = table(rows).splitlines()
    assert "1.50" in lines[3] and lines[4].split()[-1] == "2.0000" and "no such type" in lines[5]


def test_runs_are_not_compared_with_each_other():
    one, two = ({"name": "batch bf16", "run": run, "ms": ms, "iqr_ms": 0.2} for run, ms in ((1, 30.0), (2, 20.0)))
    fast = {"name": "batch int8", "run": 2, "ms": 10.0, "iqr_ms": 0.2, "error": 0.05}
    lines = markdown({"results": [one, two, fast], "note": "Two runs."}).splitlines()
    assert lines[4] == "| batch int8 | 2 | 10.000 ± 0.100 | 2.00 |  |  | 5.0e-02 | 1.3 |" and lines[-1] == "Two runs."


def test_every_kind_of_case_has_its_bf16():
    names = [name for _, name, _ in cases(SCALES["full"], 1)]
    assert len(names) == len(set(names))
    for name in names:
        kind, *_, size = name.split()
        plain = f"{kind} bf16 {size}" if kind in ("product", "tile", "vector", "swiglu") else f"{kind} bf16"
        assert plain in names or kind in ("rounding", "gating")
