"""Tests of all layers of a token in one launch: the CUDA source, compiled for a CPU, against one step after another."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from r1jax.ops import decode_layers as ops
from r1jax.ops.decode_attention import LatentWeights, Turn
from r1jax.ops.latent_attention import PagedLatents
from r1jax.ops.quantize import Quantized, quantize

HERE = Path(__file__).parent
NORMS = ops.Norms(1e-5, 1e-6, 0.11)
HEADS, NOPE, ROPE, RANK, VALUE, DIM, WIDE, PAGE, PAGES = 16, 8, 32, 64, 32, 192, 320, 8, 12
WARPS = 4


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape) * scale, jnp.bfloat16)


def drawn(
    codes: tuple[str, ...] = (),
    *,
    heads: int = HEADS,
    rank: int = RANK,
    deep: int = DIM,
    wide: int = WIDE,
    value: int = VALUE,
    scales: DTypeLike = jnp.bfloat16,
    layers: int = 2,
) -> tuple[jax.Array, list[ops.DenseLayer], list[PagedLatents]]:
    """A token, layers and caches."""
    rng = np.random.default_rng(heads + layers)

    def weight(name: str, wide: int, deep: int) -> jax.Array | Quantized:
        drawn = normal(rng, wide, deep, scale=deep**-0.5)
        if name not in codes:
            return drawn
        found = quantize(drawn, "int8")
        return found._replace(scale=found.scale.astype(scales))

    def gain(n: int) -> jax.Array:
        return jnp.asarray(rng.uniform(0.5, 1.5, n), jnp.float32)

    found = [
        ops.DenseLayer(
            gain(deep),
            weight("q_kv", heads * (NOPE + ROPE) + rank + ROPE, deep),
            LatentWeights(
                normal(rng, heads, NOPE, rank, scale=0.2), normal(rng, heads, value, rank, scale=0.1), gain(rank)
            ),
            weight("o", deep, heads * value),
            gain(deep),
            weight("gate_up", 2 * wide, deep),
            weight("down", deep, wide),
        )
        for _ in range(layers)
    ]
    table = jnp.asarray(rng.permutation(PAGES)[None, :], jnp.int32)
    caches = [PagedLatents(normal(rng, PAGES, PAGE, rank + ROPE), table) for _ in range(layers)]
    return normal(rng, 1, deep), found, caches


def turn_at(limit: int) -> Turn:
    angle = jnp.float32(limit) * 10.0 ** -jnp.arange(ROPE // 2, dtype=jnp.float32)[None]
    return Turn(jnp.cos(angle), jnp.sin(angle))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """Runs the source on this CPU, with few warps a block and parts of few tokens."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, which compiles the kernel's source for this CPU")
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def library(text: str) -> ctypes.CDLL:
        path = folder / f"{len(list(folder.iterdir()))}.cc"
        path.write_text(text)
        words = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", f"-I{HERE}"]
        subprocess.run([*words, str(path), "-o", str(path.with_suffix(".so"))], check=True)
        return ctypes.CDLL(str(path.with_suffix(".so")))

    def split(x: np.ndarray) -> np.ndarray:
        """The codes of numbers of which 2^22 is the largest, [n, 3]."""
        _, layers, caches = drawn()
        text = ops.source(sizes_of(layers, caches, blocks=6), ops.FILES)
        start = """
        extern "C" void split_all(const float* x, int count, signed char* codes) {
          for (int i = 0; i < count; i += 4) {
            unsigned four[3];
            split({x[i], x[i + 1], x[i + 2], x[i + 3]}, 1, four);
            for (int j = 0; j < 12; j++) codes[3 * (i + j % 4) + j / 4] = (signed char)(four[j / 4] >> 8 * (j % 4));
          }
        }"""
        codes = np.empty((len(x), 3), np.int8)
        held = np.ascontiguousarray(x, np.float32)
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (held, codes))
        library(on_cpu(text, start)).split_all(next(pointers), len(x), next(pointers))
        return codes

    def sizes_of(layers, caches, *, blocks: int, **changed: int) -> ops.Sizes:
        sizes = ops.sizes_of(layers[0], caches[0], NORMS, len(layers))
        sizes |= {"WARPS": WARPS, "BRINGERS": 2, "PARTS": 8, "SPAN": 16, "LEAST_SPAN": 8, "BLOCKS": blocks} | changed
        return ops.with_ring(sizes) | {"SLOTS": 5}

    def on_cpu(text: str, start: str) -> str:
        macros, rest = text[: text.index("//")], text[text.index("//") :]
        return f'{macros}\n#include "cuda_on_cpu.cc"\n{rest}\n{start}'

    def run(
        x, layers, caches, limit: int, *, blocks: int, **changed: int
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        sizes = sizes_of(layers, caches, blocks=blocks, **changed)
        text = ops.source(sizes, ops.FILES)
        many = 6 + sum(map(len, map(_arrays, layers, caches))) + len(layers) + 2
        start = f"""
        extern "C" long sizes(int what) {{ return what ? sizeof(Scratch) : sizeof(Shared); }}
        extern "C" bool start(void** p, int blocks) {{
          return run_blocks(blocks, WARPS, BRINGERS, sizeof(Shared), SLOTS * SLOT, [=] {{
            decode_layers({", ".join(f"p[{i}]" for i in range(many))}); }});
        }}"""
        compiled = library(on_cpu(text, start))
        turn = turn_at(limit)
        first = [x[0], jnp.int32([limit]), caches[0].table[0], turn.cos[0], turn.sin[0]]
        first.append(jnp.zeros(ops.scratch_words(sizes), jnp.uint32))
        arrays = [*first, *(a for pair in zip(layers, caches, strict=True) for a in _arrays(*pair))]
        held = [_aligned(np.asarray(a)) for a in arrays]
        pools = [held[5 + len(_arrays(layers[0], caches[0])) * (i + 1)] for i in range(len(layers))]
        out = _aligned(np.asarray(x[0]))
        assert compiled.sizes(1) == held[5].nbytes
        every = [*held, out, *pools, held[5]]
        compiled.start.restype = ctypes.c_bool
        assert compiled.start((ctypes.c_void_p * many)(*(a.ctypes.data for a in every)), blocks), "the kernel hangs"
        return out, pools, held[5]

    run.split = split
    return run


def _arrays(layer: ops.DenseLayer, cache: PagedLatents) -> list[jax.Array]:
    given = ops._given(layer, cache.pages)
    return [given[name] for name in ops._ORDER if name in given]


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 16 bytes."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    held = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    held[...] = array
    return held


def widened(tree):
    """With floats in fp32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)


def far(a: np.ndarray | jax.Array, b: jax.Array) -> float:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


ALL = ("q_kv", "o", "gate_up", "down")


@pytest.mark.once
def test_codes_of_a_row_are_the_nearest_to_what_is_left_of_each_number(small) -> None:
    edges = [0, 0.49, 127.5, 128, 128.5, 32639, 32640, 32767.5, 32768, 98304, 2**22 - 1, 2**22]
    numbers = np.float32([*edges, *np.random.default_rng(0).uniform(0, 2**22, 500)])
    numbers = np.concatenate([numbers, -numbers])
    whole = np.rint(numbers).astype(int)
    second = (whole + 128) >> 8
    first = (second + 128) >> 8
    expected = np.stack([first, second - 256 * first, whole - 256 * second], axis=1)
    assert np.abs(expected).max() == 128 and np.abs(expected[:, 0]).max() == 64
    np.testing.assert_array_equal(small.split(numbers), expected)


@pytest.mark.once
@pytest.mark.parametrize(
    ("codes", "limit", "blocks", "sizes"),
    [
        (ALL, 40, 6, {"scales": jnp.float32}),
        (("gate_up", "down"), 0, 6, {}),
        ((), 95, 11, {"heads": 32}),
        (("o",), 40, 20, {"rank": 128, "deep": 64, "wide": 64}),  # two ways, and blocks that have nothing to do
        # Blocks that only have queries and rows of o_proj, and warps that have no columns there.
        (("o",), 40, 40, {"deep": 640, "wide": 64, "value": 16, "WARPS": 8}),
    ],
)
def test_the_source_gives_what_one_step_after_another_gives(small, codes, limit, blocks, sizes) -> None:
    macros = {name: size for name, size in sizes.items() if name.isupper()}
    x, layers, caches = drawn(codes, **{name: size for name, size in sizes.items() if name not in macros})
    expected, after = ops.decode_layers_reference(x, layers, caches, jnp.int32(limit), turn_at(limit), NORMS)
    found, pools, _ = small(x, layers, caches, limit, blocks=blocks, **macros)
    exact, _ = ops.decode_layers_reference(*widened((x, layers, caches)), jnp.int32(limit), turn_at(limit), NORMS)
    assert far(found, exact[0]) < 1.2 * far(expected[0], exact[0]) < 0.02  # bf16 rounds both
    for pool, cache, before in zip(pools, after, caches, strict=True):
        assert np.abs(pool.astype(np.float32) - np.asarray(cache.pages, np.float32)).max() < 0.05
        changed = np.any(pool != np.asarray(before.pages), axis=-1)
        assert changed.sum() == 1


@pytest.mark.once
def test_where_there_is_no_token_nothing_changes(small) -> None:
    x, layers, caches = drawn()
    found, pools, _ = small(x, layers, caches, -1, blocks=6)
    np.testing.assert_array_equal(found, x[0])
    for pool, cache in zip(pools, caches, strict=True):
        np.testing.assert_array_equal(pool, cache.pages)


@pytest.mark.once
def test_what_is_no_number_stays_none(small) -> None:
    x, layers, caches = drawn(ALL)
    layers[0] = layers[0]._replace(
        latent=layers[0].latent._replace(values=layers[0].latent.values.at[3, 2, 1].set(jnp.nan))
    )
    found, _, _ = small(x, layers, caches, 40, blocks=6)
    assert np.isnan(found.astype(np.float32)).all()


@pytest.mark.once
def test_a_traced_launch_tells_when_each_block_was_through_with_each_phase(small) -> None:
    x, layers, caches = drawn()
    words = small(x, layers, caches, 3, blocks=6, TRACED=1)[2]
    clocks = words[-(len(layers) * 7 + 1) * 6 :].reshape(-1, 6)
    assert np.all(clocks > 0) and np.all(np.diff(clocks.astype(int), axis=0) > 0)


def test_only_what_the_kernel_is_written_for_fits() -> None:
    x, layers, caches = drawn()
    assert ops.fits(x, layers, caches)
    assert not ops.fits(jnp.concatenate([x, x]), layers, caches)
    assert not ops.fits(x.astype(jnp.float32), layers, caches)
    odd = layers[0]._replace(o=layers[0].o.astype(jnp.float32))
    assert not ops.fits(x, [odd, odd], caches)
    coded = drawn(("down",))[1]
    assert not ops.fits(x, [layers[0], coded[1]], caches)  # of one kind only
    in_blocks = coded[0].down._replace(scale=jnp.ones((DIM, 2), jnp.bfloat16))
    assert not ops.fits(x, [coded[0]._replace(down=in_blocks)], caches[:1])
    assert not ops.fits(x, layers * 20, caches * 20)  # more addresses than a launch passes
    longer = caches[0]._replace(table=jnp.zeros((1, ops.PARTS * ops.SPAN // PAGE), jnp.int32))
    assert not ops.fits(x, layers, [longer] * 2)
    assert not ops.fits(x, drawn(heads=8)[1], caches)  # 16 heads attend together
    assert not ops.fits(x, layers, [caches[0], caches[1]._replace(pages=caches[1].pages[:5])])
    assert not ops.fits(x, drawn(heads=560, layers=1)[1], caches[:1])  # more rows than threads of all blocks


def test_the_sizes_of_a_decoder_of_a_billion_weights_leave_room_for_the_ring() -> None:
    half, number = jax.ShapeDtypeStruct, jnp.bfloat16
    heads, nope, rope, rank, value, deep, wide = 16, 128, 64, 512, 128, 2048, 8192

    def codes(*shape: int) -> Quantized:
        return Quantized(half(shape, jnp.int8), half((shape[0], 1), number))

    latent = LatentWeights(half((heads, nope, rank), number), half((heads, value, rank), number), half((rank,), number))
    q_kv, o = codes(heads * (nope + rope) + rank + rope, deep), codes(deep, heads * value)
    norm = half((deep,), jnp.float32)
    layer = ops.DenseLayer(norm, q_kv, latent, o, norm, codes(2 * wide, deep), codes(deep, wide))
    cache = PagedLatents(half((128, 64, rank + rope), number), half((1, 128), jnp.int32))
    sizes = ops.with_ring(ops.sizes_of(layer, cache, NORMS, 16) | {"BLOCKS": 132})
    assert sizes["SLOTS"] * sizes["STRIDES"] == 10
    assert sizes["SHARED_BYTES"] + sizes["SLOTS"] * ops.slot_bytes(sizes) <= ops.SHARED


def test_what_nvrtc_refuses_takes_the_launches_of_before_with_a_warning(monkeypatch) -> None:
    def refuse(text: str) -> str:
        raise RuntimeError("NVRTC refuses the source of a kernel: line 3")

    monkeypatch.setattr(ops.cuda_source, "compiled", refuse)
    with pytest.warns(UserWarning, match=r"all layers of a token is not used, which is slower: NVRTC refuses.* line 3"):
        assert not ops._compiles("source")
