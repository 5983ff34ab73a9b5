"""The train state and the one compiled step: (state, batch) -> (state, metrics)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from r1jax.config import Config, DecoderConfig
from r1jax.models.lora import join_trees, split_adapters
from r1jax.models.moe import RouterStats
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import batch_sharding, shard_tree
from r1jax.tasks.task import Task
from r1jax.train.optimizer import BALANCE_BIAS, make_optimizer, schedule

Batch = dict[str, Any]
BITS = "rbg"
"""Random bits from one XLA instruction; threefry costs a tenth of the step in dropout."""


class TrainState(NamedTuple):
    """All that a run is; the order of cases is a function of its seed and `step`."""

    step: Int[Array, ""]
    key: UInt32[Array, " words"]
    """Data of the one random key; every use folds it with the step."""
    params: Any
    optimizer: Any
    ema: Any
    """Moving average of `params` that is evaluated and served."""


def init_state(config: Config, model: R1, task: Task, batch: Batch) -> TrainState:
    """Fresh parameters and optimizer moments.

    Args:
      config: Seed and optimizer.
      model: The model.
      task: Turns the batch into the model's inputs.
      batch: Any collated batch; only its shapes matter.

    Returns:
      State at step 0.
    """
    inputs, _ = task.prepare(batch)
    key = jax.random.key(config.seed, impl=BITS)
    params = model.init({"params": key}, inputs, language=task.language)["params"]
    optimizer = make_optimizer(config.train).init(_divide(params, config)[0])
    return TrainState(
        jnp.zeros((), jnp.int32), jax.random.key_data(key), params, optimizer, jax.tree.map(jnp.copy, params)
    )


def _divide(params: Any, config: Config) -> tuple[Any, Any]:
    """What is trained and what is not: with adapters they alone, otherwise everything."""
    return split_adapters(params) if config.model.lora_rank else (params, {})


def balance_routers(params: Any, router: tuple[RouterStats, ...], config: DecoderConfig, rate: float | Array) -> Any:
    """Moves each router's bias by rate * sign(mean load - load) (DeepSeek-V3, section 2.1.2).

    Args:
      params: Parameter tree of R1.
      router: Statistics in the order of the layers, the MTP module's last if it ran.
      config: Tells which layers have experts.
      rate: gamma.

    Returns:
      The tree with new biases.
    """
    paths = [(f"layers_{i}",) for i in range(config.first_k_dense_replace, config.num_hidden_layers)]
    paths = [*paths, ("mtp", "layer")][: len(router)]

    def moved(tree: Any, path: tuple[str, ...], stats: RouterStats) -> Any:
        if path:
            return {**tree, path[0]: moved(tree[path[0]], path[1:], stats)}
        return tree + rate * jnp.sign(jnp.mean(stats.load) - stats.load)

    for path, stats in zip(paths, router, strict=True):
        params = moved(params, ("decoder", *path, "mlp", "gate", BALANCE_BIAS), stats)
    return params


def make_step(config: Config, model: R1, task: Task) -> Any:
    """The training step as a pure function.

    Args:
      config: Optimizer and seed.
      model: The model.
      task: Batch, loss.

    Returns:
      (state, batch) -> (state, metrics), to be compiled.
    """
    optimizer, rate = make_optimizer(config.train), schedule(config.train)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=BITS), state.step)
        augment, dropout = jax.random.split(key)
        inputs, targets = task.prepare(batch, augment)
        share = state.step.astype(jnp.float32) / config.train.steps

        trained, frozen = _divide(state.params, config)

        def loss_fn(trained: Any) -> tuple[Array, Any]:
            params = join_trees(trained, frozen)
            output = model.apply(
                {"params": params}, inputs, train=True, language=task.language, rngs={"dropout": dropout}
            )
            loss, parts = task.loss(output, inputs, targets, share)
            return loss, (parts, output.router)

        (loss, (parts, router)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        updates, moments = optimizer.update(gradients, state.optimizer, trained)
        trained = optax.apply_updates(trained, updates)
        if not frozen and config.model.decoder.scoring_func == "sigmoid":  # DeepSeek-V2's routers have no such bias
            gamma = jnp.where(share < config.train.router_bias_until, config.train.router_bias_rate, 0.0)
            trained = balance_routers(trained, router, config.model.decoder, gamma)
        # Averaging over the steps so far keeps the first average from being the random start.
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.train.ema, (1 + count) / (10 + count))
        average, kept = _divide(state.ema, config)
        average = jax.tree.map(lambda old, new: old * decay + new * (1 - decay), average, trained)
        params, ema = join_trees(trained, frozen), join_trees(average, kept)
        metrics = {"loss": loss, **{f"loss.{k}": v for k, v in parts.items()}}
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": jnp.asarray(rate(state.step))}
        for i, stats in enumerate(router):
            metrics[f"router.{i}.violation"] = jnp.max(stats.load) / jnp.maximum(jnp.mean(stats.load), 1e-9) - 1
        return TrainState(state.step + 1, state.key, params, moments, ema), metrics

    return step


def compile_step(config: Config, model: R1, task: Task, mesh: Mesh, batch: Batch) -> Any:
    """Compiles the step ahead of time for the mesh, with the state donated.

    Args:
      config: The experiment.
      model: The model.
      task: The task.
      mesh: Devices.
      batch: Any collated batch (shapes).

    Returns:
      The compiled executable; `memory_analysis()` and `cost_analysis()` say what it takes.
    """
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    where, cases = shard_tree(mesh, abstract), batch_sharding(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        make_step(config, model, task), in_shardings=(where, cases), out_shardings=(where, whole), donate_argnums=0
    )
    return step.lower(abstract, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)).compile()
