"""All layers of a dense decoder for the next token of one row, on a Hopper GPU in one launch (cuda/decode_layers.cu).

A token reads every weight once, and what separates launches, or phases that wait for each other, is lost to memory. In
one launch a block asks for its weights of the next phase before it waits for what they are multiplied with.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax.ops import cuda_source
from r1jax.ops.decode_attention import LatentWeights, Turn, decode_attention_reference
from r1jax.ops.latent_attention import PagedLatents
from r1jax.ops.quantize import Quantized
from r1jax.ops.row_products import row_product_reference
from r1jax.ops.self_test import agrees, multiprocessors, takes_triton, target

Weight = Array | Quantized
Sizes = dict[str, int | float | bool]

FILES = ("decode_memory.cu", "decode_products.cu", "decode_attention.cu", "decode_layers.cu")
"""Of the source, behind the one that knows the GPU."""
WARPS, BRINGERS = 16, 4
"""Of a block, that compute, and that bring weights; with four a thread has as many registers as with one."""
TILE = 16
"""Rows of a weight that a warp multiplies together."""
PARTS, SPAN, LEAST_SPAN = 32, 272, 64
"""Parts of a cache at most, the new token among them; tokens of a part, at most and where there are few."""
STRIDES, SLOTS = 2, 10
"""KiB of 16 rows in a slot of the ring, and slots at most."""
LEAST_SLOTS = 2
PHASES = 7
"""Of a layer, as decode_memory.cu counts them."""
PATIENCE = 2**24
"""Times that a number is asked for which another block owes, before the kernel fails: seconds."""
ADDRESSES = 512
"""That a launch passes: 4 KB."""
SHARED = 227 * 1024
"""Bytes of shared memory that a block can have."""


class DenseLayer(NamedTuple):
    """Weights of a layer whose queries are of full rank."""

    input_norm: Float[Array, " D"]
    q_kv: Weight
    """[N (Hk + H) + R + H, D]: all heads' queries without position, their rotary numbers, latent and rotary key."""
    latent: LatentWeights
    o: Weight
    post_norm: Float[Array, " D"]
    gate_up: Weight
    """[2 F, D], gate above up."""
    down: Weight


class Norms(NamedTuple):
    """What the norms add to a mean square, and the factor on attention's scores."""

    eps: float
    latent_eps: float
    scale: float


def takes_layers(
    x: Float[Array, "T D"], layers: Sequence[DenseLayer], caches: Sequence[PagedLatents], norms: Norms
) -> bool:
    """Whether the kernel is what these layers and caches are run by here: on the only GPU, which is a Hopper."""
    hopper = takes_triton() and target().compute_capability == "9.0"
    if not (hopper and fits(x, layers, caches) and _kernel_agrees()):
        return False
    return _compiles(source(sizes_of(layers[0], caches[0], norms, len(layers))))


@functools.cache
def _compiles(text: str) -> bool:
    """Whether NVRTC takes the source with these sizes; warns where it does not."""
    try:
        cuda_source.compiled(text)
    except RuntimeError as error:
        warnings.warn(f"the kernel of all layers of a token is not used, which is slower: {error}", stacklevel=2)
        return False
    return True


def fits(x: Float[Array, "T D"], layers: Sequence[DenseLayer], caches: Sequence[PagedLatents]) -> bool:
    """Whether this is a token of one row in bf16, all layers are alike, and sizes are of whole tiles and steps."""
    pages, table = caches[0]
    plain = isinstance(pages, jax.Array) and pages.dtype == x.dtype == jnp.bfloat16 and x.shape[0] == 1
    kinds = {str(jax.tree.map(lambda a: (a.shape, a.dtype), pair)) for pair in zip(layers, caches, strict=True)}
    if not plain or len(kinds) > 1:
        return False
    layer = layers[0]
    weights = (layer.q_kv, layer.o, layer.gate_up, layer.down)
    scales = {w.scale.dtype for w in weights if isinstance(w, Quantized)}
    known = all(_known(w) for w in weights) and len(scales) < 2
    if not known or layer.latent.keys.dtype != x.dtype:
        return False
    sizes = sizes_of(layer, caches[0], Norms(0, 0, 0), len(layers))
    heads, value, rank, rope = (sizes[name] for name in ("HEADS", "VALUE", "RANK", "ROPE"))
    widths = heads % TILE == value % TILE == rank % 64 == rope % 32 == 0
    widths = widths and sizes["NOPE"] % BRINGERS == 0 and sizes["NOPE"] * 128 <= slot_bytes(sizes)
    widths = widths and rank <= 64 * WARPS and rank & (rank - 1) == 0
    rows = max(layer.o.shape[1], *(w.shape[0] for w in weights))  # a thread of some block ends each
    widths = widths and rows <= 32 * WARPS * sizes["BLOCKS"]
    widths = widths and (len(_ORDER) + 1) * len(layers) + len(_FIRST) + 2 <= ADDRESSES
    return widths and table.shape[1] * pages.shape[1] <= (PARTS - 1) * SPAN and sizes["SLOTS"] >= LEAST_SLOTS


def _known(weight: Weight) -> bool:
    """Whether it is bf16 or codes with a scale a row, of whole tiles and steps."""
    wide, deep = weight.shape
    if isinstance(weight, Quantized):
        plain = weight.scale.shape[-1] == 1 and weight.zero is None and weight.balance is None
        known = plain and weight.values.dtype == jnp.int8 and weight.scale.dtype in (jnp.bfloat16, jnp.float32)
    else:
        known = weight.dtype == jnp.bfloat16
    return known and wide % TILE == 0 and deep % 64 == 0


def shared_bytes(sizes: Sizes) -> int:
    """Shared memory that a block takes beside the ring: at least what `Shared` in decode_memory.cu has."""
    width = {name: 3 * (n + 64) if sizes[f"{name}_CODES"] else 2 * n for name, n in _depths(sizes).items()}
    entry = 2 * (sizes["RANK"] + sizes["ROPE"])
    x = max(*width.values(), TILE * (entry + (192 - entry % 128) % 128), 576 * sizes["WARPS"])
    addresses = len(_FIRST) + len(_ORDER) * sizes["LAYERS"] + 2 + 2 * SLOTS
    heads, rank = sizes["HEADS"], sizes["RANK"] + sizes["ROPE"]
    queries, mixed = heads * (sizes["NOPE"] + sizes["ROPE"]) + rank, heads * sizes["VALUE"]
    together = (2 * sizes["WIDE"], max(queries, sizes["DIM"]), max(mixed, sizes["DIM"]))
    tiles = sum(rows // (TILE * sizes["BLOCKS"]) + 2 for rows in together)
    words = 3 + sizes["PAGES"] + sizes["ROPE"] + (16 * tiles + 3) * sizes["WARPS"]
    words += sizes["PARTS"] + TILE * (sizes["SPAN"] + 4) + entry // 4
    return -(-int(8 * addresses + x + 4 * words + 128) // 128) * 128


def slot_bytes(sizes: Sizes) -> int:
    """A slot of the ring."""
    return TILE * int(64 * sizes["WARPS"] * sizes["STRIDES"] + 64)


def _depths(sizes: Sizes) -> dict[str, int]:
    deep, wide = int(sizes["DIM"]), int(sizes["WIDE"])
    return {"Q_KV": deep, "O": int(sizes["HEADS"] * sizes["VALUE"]), "GATE_UP": deep, "DOWN": wide}


def sizes_of(layer: DenseLayer, cache: PagedLatents, norms: Norms, count: int) -> Sizes:
    """The macros of the source.

    Args:
      layer: One of the layers.
      cache: Its cache.
      norms: Of all layers.
      count: How many layers there are.

    Returns:
      By name; TRACED makes the kernel note when each block was through with each phase.
    """
    (heads, nope, rank), (pages, table) = layer.latent.keys.shape, cache
    weights = {"Q_KV": layer.q_kv, "O": layer.o, "GATE_UP": layer.gate_up, "DOWN": layer.down}
    codes = [w for w in weights.values() if isinstance(w, Quantized)]
    sizes = {
        "LAYERS": count,
        "DIM": layer.q_kv.shape[1],
        "HEADS": heads,
        "NOPE": nope,
        "ROPE": pages.shape[2] - rank,
        "RANK": rank,
        "VALUE": layer.latent.values.shape[1],
        "WIDE": layer.down.shape[1],
        "PAGE": pages.shape[1],
        "PAGES": table.shape[1],
        **{f"{name}_CODES": isinstance(w, Quantized) for name, w in weights.items()},
        "SCALES_OF_HALF": not codes or codes[0].scale.dtype == jnp.bfloat16,
        "BLOCKS": multiprocessors(),
        "STRIDES": STRIDES,
        "WARPS": WARPS,
        "BRINGERS": BRINGERS,
        "PARTS": min(PARTS, 1 - (-table.shape[1] * pages.shape[1] // LEAST_SPAN)),
        "SPAN": SPAN,
        "LEAST_SPAN": LEAST_SPAN,
        "PATIENCE": PATIENCE,
        "TRACED": False,
        "EPS": norms.eps,
        "LATENT_EPS": norms.latent_eps,
        "SCALE": norms.scale,
        "LOWEST": float(np.finfo(np.float32).min),
    }
    return with_ring(sizes)


def with_ring(sizes: Sizes) -> Sizes:
    """The macros with what follows from them for shared memory: where the ring begins, and its slots."""
    held = shared_bytes(sizes)
    return sizes | {"SHARED_BYTES": held, "SLOTS": min(SLOTS, (SHARED - held) // slot_bytes(sizes))}


_FIRST = ("x", "limit", "table", "cos", "sin", "scratch")
_ORDER = (
    *("input_norm", "q_kv", "q_kv_scale", "keys", "values", "latent_norm", "o", "o_scale", "post_norm"),
    *("gate_up", "gate_up_scale", "down", "down_scale", "pool"),
)
"""Addresses of a layer, as decode_memory.cu counts them."""


def source(sizes: Sizes, files: Sequence[str] = ("hopper.cu", *FILES)) -> str:
    """The CUDA source, with a kernel that takes the addresses of what there is.

    Args:
      sizes: Macros.
      files: Of `r1jax/ops/cuda`.

    Returns:
      The text.
    """
    absent = {f"{name.lower()}_scale" for name in _depths(sizes) if not sizes[f"{name}_CODES"]}
    layers = range(int(sizes["LAYERS"]))
    places = [*_FIRST, *(f"{name}_{i}" for i in layers for name in _ORDER), "out"]
    given = [name for name in places[:-1] if name.rsplit("_", 1)[0] not in absent]
    results = ["out", *(f"same_pool_{i}" for i in layers), "same_scratch"]
    noted = " ".join(f"to[{i}] = {name if name in (*given, *results) else 'nullptr'};" for i, name in enumerate(places))
    kernel = f"""
KERNEL decode_layers({", ".join(f"void* {name}" for name in (*given, *results))}) {{
  if (thread_index() == 0) {{
    void** to = shared().address;
    {noted}
  }}
  sync_everything();
  prepare();
  if (shared().limit < 0)
    pass();
  else if (thread_index() < THREADS)
    run_layers();
  else
    bring_weights();
}}
"""
    return cuda_source.source_of(files, sizes) + kernel


def scratch_words(sizes: Sizes) -> int:
    """What `Scratch` in decode_memory.cu has."""
    heads, rank, rope = (int(sizes[name]) for name in ("HEADS", "RANK", "ROPE"))
    vectors = heads * (sizes["NOPE"] + rope + rank + sizes["VALUE"]) + rank + rope + sizes["WIDE"] + 2 * sizes["DIM"]
    clocks = (PHASES * sizes["LAYERS"] + 1) * sizes["BLOCKS"] if sizes["TRACED"] else 1
    return int(vectors + sizes["PARTS"] * heads * (2 + rank) + clocks)


def decode_layers(
    x: Float[Array, "1 D"],
    layers: Sequence[DenseLayer],
    caches: Sequence[PagedLatents],
    limit: Int[Array, ""],
    turn: Turn,
    norms: Norms,
) -> tuple[Float[Array, "1 D"], list[PagedLatents]]:
    """Runs a token through the layers on the kernel.

    Args:
      x: Its embedding; must fit.
      layers: Their weights.
      caches: What came before, a pool for each layer and one table.
      limit: The token's place; -1 where there is none, which then leaves the caches alone.
      turn: Of the token.
      norms: Of all layers.

    Returns:
      The state before the final norm, x where there is no token, and the caches with the token in them.
    """
    sizes = sizes_of(layers[0], caches[0], norms, len(layers))
    out, pools, _ = launch(x, layers, caches, limit, turn, sizes)
    return out, [cache._replace(pages=pool) for cache, pool in zip(caches, pools, strict=True)]


def launch(
    x: Float[Array, "1 D"],
    layers: Sequence[DenseLayer],
    caches: Sequence[PagedLatents],
    limit: Int[Array, ""],
    turn: Turn,
    sizes: Sizes,
) -> tuple[Float[Array, "1 D"], list[Array], Int[Array, " w"]]:
    """`decode_layers` with other macros.

    Args:
      x: As there.
      layers: As there.
      caches: As there.
      limit: As there.
      turn: As there.
      sizes: From `sizes_of`, some of them changed.

    Returns:
      The state, the caches' pools, and the words that blocks passed; the last of these, where TRACED, are clocks of
      the multiprocessors, [layers, phases, blocks].
    """
    places, angles = (limit.reshape(1), caches[0].table[0]), (turn.cos[0], turn.sin[0])
    arrays = [x[0], *(a.astype(jnp.int32) for a in places), *(a.astype(jnp.float32) for a in angles)]
    arrays.append(jnp.zeros(scratch_words(sizes), jnp.uint32))
    aliases = {len(arrays) - 1: len(layers) + 1}
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        given = _given(layer, cache.pages)
        arrays += [given[name] for name in _ORDER if name in given]
        aliases[len(arrays) - 1] = 1 + i
    alike = (x[0], *(cache.pages for cache in caches), arrays[5])
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in alike]
    threads = 32 * (sizes["WARPS"] + sizes["BRINGERS"])
    shared = sizes["SHARED_BYTES"] + sizes["SLOTS"] * slot_bytes(sizes)
    ptx = cuda_source.compiled(source(sizes))
    kernel = cuda_source.Launch("decode_layers", ptx, int(sizes["BLOCKS"]), int(threads), int(shared))
    out, *pools, words = cuda_source.launch(kernel, results, arrays, aliases)
    return out[None], pools, words


def _given(layer: DenseLayer, pages: Float[Array, "P page C"]) -> dict[str, Array]:
    """The arrays of a layer by their names in `_ORDER`."""
    found = {
        "input_norm": layer.input_norm.astype(jnp.float32),
        "keys": layer.latent.keys,
        "values": layer.latent.values,
        "latent_norm": layer.latent.gain.astype(jnp.float32),
        "post_norm": layer.post_norm.astype(jnp.float32),
        "pool": pages,
    }
    for name in ("q_kv", "o", "gate_up", "down"):
        weight = getattr(layer, name)
        coded = isinstance(weight, Quantized)
        found |= {name: weight.values, f"{name}_scale": weight.scale[:, 0]} if coded else {name: weight}
    return found


def decode_layers_reference(
    x: Float[Array, "1 D"],
    layers: Sequence[DenseLayer],
    caches: Sequence[PagedLatents],
    limit: Int[Array, ""],
    turn: Turn,
    norms: Norms,
) -> tuple[Float[Array, "1 D"], list[PagedLatents]]:
    """`decode_layers`, one step after another."""
    after = []
    place, valid = jnp.maximum(limit, 0).reshape(1, 1), (limit >= 0).reshape(1, 1)
    for layer, cache in zip(layers, caches, strict=True):
        both = row_product_reference(x, layer.q_kv, gain=layer.input_norm, eps=norms.eps)
        mixed, cache = decode_attention_reference(
            both, both, layer.latent, cache, place, valid, turn, eps=norms.latent_eps, scale=norms.scale
        )
        x = row_product_reference(mixed, layer.o, added=x)
        hidden = row_product_reference(x, layer.gate_up, gain=layer.post_norm, eps=norms.eps, paired=True)
        x = row_product_reference(hidden, layer.down, added=x)
        after.append(cache)
    return x, after


@functools.cache
def _kernel_agrees() -> bool:
    """Tries the kernel on this device, of floats and of codes, in a cache that is nearly full and in an empty one."""
    heads, nope, rope, rank, value, deep, wide, page = 16, 32, 32, 64, 32, 256, 512, 16
    rng = np.random.default_rng(0)
    shapes = {
        "q_kv": (heads * (nope + rope) + rank + rope, deep),
        "keys": (heads, nope, rank),
        "values": (heads, value, rank),
        "o": (deep, heads * value),
        "gate_up": (2 * wide, deep),
        "down": (deep, wide),
    }
    drawn = [rng.standard_normal((2, *shape)) * shape[-1] ** -0.5 for shape in shapes.values()]
    weights = {name: part.astype(jnp.bfloat16) for name, part in zip(shapes, drawn, strict=True)}
    gains = [rng.uniform(0.5, 2, n).astype(np.float32) for n in (deep, rank, deep)]
    table = rng.permutation(12)[None].astype(np.int32)

    def run(decode, x: Array, pages: Array, *held: Array) -> Array:
        found, named = [], dict(zip(weights, held, strict=True))
        for codes in (False, True):
            layers = []
            for i in range(2):
                own = {name: part[i] for name, part in named.items()}
                for name in ("q_kv", "o", "gate_up", "down") if codes else ():
                    scale = jnp.full((len(own[name]), 1), 2.0**-10, jnp.bfloat16)
                    own[name] = Quantized(jnp.clip(jnp.round(own[name] * 2**10), -127, 127).astype(jnp.int8), scale)
                latent = LatentWeights(own["keys"], own["values"], jnp.asarray(gains[1]))
                norms = jnp.asarray(gains[0]), jnp.asarray(gains[2])
                matrices = own["gate_up"], own["down"]
                layers.append(DenseLayer(norms[0], own["q_kv"], latent, own["o"], norms[1], *matrices))
            for limit in (0, 12 * page - 2):
                angle = limit * 10.0 ** -jnp.arange(rope // 2, dtype=jnp.float32)[None]
                caches = [PagedLatents(pages, jnp.asarray(table))] * 2
                turn = Turn(jnp.cos(angle), jnp.sin(angle))
                out, caches = decode(x, layers, caches, jnp.int32(limit), turn, Norms(1e-6, 1e-6, 0.1))
                found += [out[0], *((cache.pages - pages).reshape(-1) for cache in caches)]
        return jnp.concatenate(found)

    arrays = [rng.standard_normal(shape).astype(jnp.bfloat16) for shape in ((1, deep), (12, page, rank + rope))]
    arrays += list(weights.values())
    fast, slow = (functools.partial(run, decode) for decode in (decode_layers, decode_layers_reference))
    return agrees("the kernel of all layers of a token", fast, slow, arrays, gradients=False)
