"""Training steps of h100.py: models of their real width, through the compiled step of r1jax, on random tokens.

A child process of h100.py calls it. One batch is learned again and again, so that its loss has to fall. Its weights
and tokens at the start go to the peers in h100_train_torch.py.
"""

import gzip
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.h100_case import seconds
from configs import language, medical
from r1jax.config import Config, DecoderConfig
from r1jax.hf.save import save_params
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import batch_sharding, make_mesh, shard_tree
from r1jax.tasks.catalog import TASKS
from r1jax.train.flops import work_of
from r1jax.train.optimizer import schedule
from r1jax.train.plan import device_limit, device_need, example_batch
from r1jax.train.profile import read_ops
from r1jax.train.step import NO_LIMIT, compile_step, init_state

PEAK = 989.4e12
V2_LITE = DecoderConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=4,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=0,
)
"""DeepSeek-V2-Lite's shapes with 4 of its 27 layers and DeepSeek-V3's router, so that both libraries have the model."""
DENSE = replace(V2_LITE, vocab_size=32768, num_hidden_layers=14, first_k_dense_replace=14, intermediate_size=8192)
"""About 1 B parameters, no experts."""
TINY = {"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 192}
TINY |= {"num_hidden_layers": 2, "moe_intermediate_size": 64, "kv_lora_rank": 64, "n_routed_experts": 8}


def language_config(decoder: DecoderConfig, scale: str, quant: tuple[str, ...] = (), **train: Any) -> Config:
    """64 k tokens a step in sequences of 4096, fp32 weights and moments, products in bf16 or by rules for fewer bits.

    The loss is the next token's alone.
    """
    if scale == "tiny":
        dense = decoder.first_k_dense_replace > 1
        decoder = replace(decoder, **TINY, first_k_dense_replace=2 if dense else 1)
    config, (batch, length) = language.get_config(), (16, 4096) if scale == "full" else (4, 128)
    return replace(
        config,
        model=replace(
            config.model,
            decoder=decoder,
            text_tokens=length,
            precision="bf16",
            quant=quant,
            remat=train.pop("remat"),
        ),
        task=replace(config.task, z_loss=0.0, balance_weight=0.0),
        train=replace(
            config.train,
            batch_size=batch,
            steps=1000,
            warmup_steps=10,
            learning_rate=3e-4,
            ema=0.0,
            router_bias_rate=0.0,
            **train,
        ),
    )


def random_tokens(config: Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.model.text_tokens)
    tokens = rng.integers(0, config.model.decoder.vocab_size, shape).astype(np.int32)
    valid = np.ones(shape, bool)
    return {"text": tokens, "text_valid": valid, "target.bytes": np.full(len(tokens), shape[1], np.float32)}


def cases(scale: str) -> dict[str, Callable[[], Config]]:
    """Configs by name. A step of the language models takes its batch in four parts, for memory."""

    def of(decoder: DecoderConfig, *quant: str) -> Callable[[], Config]:
        return lambda: language_config(decoder, scale, quant, accumulation=4, remat="none")

    return {
        "train V2-Lite-4L, ours": of(V2_LITE),
        "train dense 1B, ours": of(DENSE),
        "train dense 1B, int8 forward": of(DENSE, "int8"),
        "train dense 1B, fp8 forward": of(DENSE, "fp8"),
        "train dense 1B, int8 forward and backward": of(DENSE, "lm_head=int8:int8", ".*=int8:int8:int8"),
        "train medical default": medical.get_config,
    }


def compile_fitting(config: Config, mesh: Any, batch: dict[str, np.ndarray]) -> tuple[Config, Any, int]:
    """Compiles the step, and where it would not fit again with more that is computed twice.

    Returns:
      The config, the program, bytes that it takes.
    """
    while True:
        task = TASKS[config.task.name](config)
        model = R1(config.model, task.heads)
        compiled = compile_step(config, model, task, mesh, batch)
        need = sum(device_need(config, model, task, mesh, batch, compiled))
        limit = device_limit(mesh)
        more = {"none": "minimal", "minimal": "full"}.get(config.model.remat)
        if limit is None or need <= limit:
            return config, compiled, need
        if more is None:
            raise MemoryError(f"the step takes {need / 2**30:.1f} GiB of {limit / 2**30:.1f}")
        config = replace(config, model=replace(config.model, remat=more))


def model_of(name: str) -> str:
    """The model of a case, whose weights its peers start from."""
    return name.removeprefix("train ").split(",")[0]


def write_start(model: str, scale: str, folder: Path) -> dict[str, Any]:
    """Writes what a peer needs to take the same steps: weights in Hugging Face's names, tokens, rates."""
    config = cases(scale)[f"train {model}, ours"]()
    task, train = TASKS[config.task.name](config), config.train
    batch = random_tokens(config)
    example = jax.tree.map(jnp.asarray, batch)
    state = jax.jit(lambda: init_state(config, R1(config.model, task.heads), task, example).params)()
    here = folder / model.replace(" ", "-")
    save_params(here, config.model.decoder, state["decoder"])
    np.savez(
        here / "batch.npz",
        tokens=batch["text"],
        rates=[float(schedule(train)(i)) for i in range(train.steps)],
        decay=train.weight_decay,
        betas=(train.b1, train.b2),
        clip=train.clip_norm,
        flops=work_of(config.model, task, batch).flops,
    )
    return {"name": model}


def prepared(name: str, scale: str) -> tuple[Config, Any, dict[str, Any], Any, int]:
    """Config, mesh, batch, compiled step and the bytes that it takes."""
    config = cases(scale)[name]()
    task, mesh = TASKS[config.task.name](config), make_mesh(config.mesh)
    if config.task.name == "language":
        batch = random_tokens(config)
    else:
        batch = jax.tree.map(np.asarray, example_batch(task.source("train"), task, config.train.batch_size))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a kernel that is not used is no result
        config, compiled, need = compile_fitting(config, mesh, batch)
    return config, mesh, batch, compiled, need


def compile_only(name: str, scale: str) -> dict[str, Any]:
    """Leaves the step in JAX's cache of compiled programs."""
    began = time.perf_counter()
    need = prepared(name, scale)[-1]
    return {"name": name, "compile_s": time.perf_counter() - began, "need_gib": need / 2**30}


def measure(name: str, scale: str, samples: int, folder: Path | None) -> dict[str, Any]:
    """Compiles a step, takes 3 + samples of them on one batch, and traces two more.

    Args:
      name: Of the case.
      scale: full or tiny.
      samples: Timed steps.
      folder: Where the compiled program and the costliest operations go, if anywhere.

    Returns:
      A row; `device_share` is the time of all operations of the device over that of the clock.
    """
    began = time.perf_counter()
    config, mesh, batch, compiled, need = prepared(name, scale)
    task = TASKS[config.task.name](config)
    model = R1(config.model, task.heads)
    compile_s = time.perf_counter() - began
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    where = shard_tree(mesh, abstract)
    state = jax.jit(lambda: init_state(config, model, task, batch), out_shardings=where)()
    count = sum(x.size for x in jax.tree.leaves(state.params))
    work = work_of(config.model, task, batch)
    batch = jax.device_put(batch, batch_sharding(mesh))
    losses: list[Any] = []

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch, NO_LIMIT)
        losses.append(metrics["loss"])
        return metrics

    jax.block_until_ready(run())
    median, spread = seconds(run, samples, least=0.0)
    with TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            traced = time.perf_counter()
            jax.block_until_ready((run(), run())[1])
            traced = time.perf_counter() - traced
        ops = read_ops(max(Path(scratch).rglob("*.xplane.pb")))
    busy = sum(op.milliseconds for op in ops) / 1e3
    if folder is not None:
        stem = folder / name.replace(",", "").replace(" ", "-")
        with gzip.open(f"{stem}.hlo.gz", "wt") as file:
            file.write(compiled.as_text())
        Path(f"{stem}.ops.txt").write_text("".join(f"{o.milliseconds:10.3f} {o.count:6} {o.name}\n" for o in ops))
    found = [float(x) for x in losses]
    assert np.isfinite(found).all(), found
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "name": name,
        "ms": 1e3 * median,
        "iqr_ms": 1e3 * spread,
        "error": None,
        "preparing_s": time.perf_counter() - began,
        "compile_s": compile_s,
        "tflops": work.flops / median / 1e12,
        "mfu": work.flops / median / PEAK,
        "tokens_per_second": work.tokens / median,
        "parameters": count,
        "losses": found,
        "device_share": busy / traced,
        "remat": config.model.remat,
        "need_gib": need / 2**30,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
    }
