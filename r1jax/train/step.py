"""The train state and the one compiled step: (state, batch) -> (state, metrics)."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from r1jax.config import Config, DecoderConfig
from r1jax.errors import UserError
from r1jax.models.lora import join_trees, split_adapters
from r1jax.models.precision import PRECISIONS, stored
from r1jax.models.quantized import Use, check_ranges, check_rules, rounding_by, uses
from r1jax.models.r1 import R1, Inputs
from r1jax.ops.pipeline import STACKED, Stages, stages_of
from r1jax.ops.rounding import round_like
from r1jax.parallel.mesh import batch_sharding, shard_tree, traced_for
from r1jax.parallel.stages import stacked, stages_on
from r1jax.tasks.task import Task
from r1jax.train.accumulate import divide, sum_over
from r1jax.train.layer_metrics import layer_metrics
from r1jax.train.optimizer import BALANCE_BIAS, make_optimizer, schedule, updates_done
from r1jax.train.quantized import holds_codes, nearest_codes, with_codes
from r1jax.train.ranges import follow, is_range, split_ranges
from r1jax.train.scaling import LossScale, ScaledState, first_scale, next_scale

Batch = dict[str, Any]
BITS = "rbg"
"""Generator of the initial weights: one XLA instruction. Its keys are two keys of threefry, side by side."""
HOST = "pinned_host"
"""The host's memory as devices reach it, by the name that JAX has for it."""
NO_LIMIT = np.float32(np.inf)
"""Limit that every finite loss stays below."""


class TrainState(NamedTuple):
    """All that a run is; the order of cases is a function of its seed and `step`."""

    step: Int[Array, ""]
    key: UInt32[Array, " words"]
    """Data of the one random key; every use folds it with the step."""
    params: Any
    optimizer: Any
    """Moments and counts; a `ScaledState` where the precision scales the loss."""
    ema: Any
    """Moving average of `params` that is evaluated and served, fp32 whatever they are; {} where `train.ema` is 0."""


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
    precision = PRECISIONS[config.model.precision]
    averaged = jax.tree.map(jnp.copy, params) if config.train.ema else {}
    state = TrainState(jnp.zeros((), jnp.int32), jax.random.key_data(key), stored(params, precision), None, averaged)
    if holds_codes(config):
        state = encode_frozen(state, model, task, batch)
    pipe = config.mesh.pipe  # its layers will be stacked, and must have one optimizer
    order = stages_of(config.model.decoder, pipe, config.mesh.interleave).order if pipe > 1 else ()
    optimizer = make_optimizer(config.train, order).init(_divide(params, config)[0])
    kept_in = precision.moments or config.train.moments
    optimizer = jax.tree.map(lambda x: x.astype(kept_in) if jnp.issubdtype(x.dtype, jnp.floating) else x, optimizer)
    return state._replace(optimizer=ScaledState(optimizer, first_scale()) if precision.scaled else optimizer)


def encode_frozen(state: TrainState, model: R1, task: Task, batch: Batch) -> TrainState:
    """Puts codes in the place of the weights that adapters adapt, and of their averages, which are the same.

    Args:
      state: Of floats.
      model: The model, which says by what rules.
      task: The task.
      batch: Any collated batch (shapes).

    Returns:
      The state of a run that `holds_codes`.
    """
    with rounding_by(model.config.quant):
        codes = nearest_codes(state.params, weights_of(model, task, batch))
    return state._replace(
        params=with_codes(state.params, codes),
        ema=with_codes(state.ema, jax.tree.map(jnp.copy, codes)) if state.ema else {},
    )


def _divide(params: Any, config: Config) -> tuple[Any, Any, Any]:
    """What is trained, what is not, and ranges of activations: with adapters they alone are trained."""
    if config.model.lora_rank:
        return *split_adapters(params), {}
    ranges, weights = split_ranges(params)
    return weights, {}, ranges


def abstract_state(config: Config, model: R1, task: Task, mesh: Mesh | AbstractMesh, batch: Batch) -> TrainState:
    """Shapes and dtypes of the state as a step on the mesh takes it; the other arguments are those of `init_state`."""
    stages = stages_on(mesh, config.mesh, config.model.decoder)
    return jax.eval_shape(lambda: stacked(init_state(config, model, task, batch), mesh, stages))


def state_shardings(config: Config, mesh: Mesh, state: TrainState) -> TrainState:
    """Where a run keeps each array of its state between two steps.

    Args:
      config: Whether the moments are in the host's memory.
      mesh: Devices.
      state: Arrays or their shapes.

    Returns:
      A tree of `NamedSharding`, some with the memory of the host.
    """
    where = shard_tree(mesh, state)
    if config.train.moments_on == "device":
        return where
    # Counts and scales stay: what is one number is not worth a way.
    away = lambda x, there: there.with_memory_kind(HOST) if x.ndim else there  # noqa: E731
    return where._replace(optimizer=jax.tree.map(away, state.optimizer, where.optimizer))


def balance_routers(
    params: Any,
    loads: tuple[Float[Array, " E"], ...],
    config: DecoderConfig,
    rate: float | Array,
    stages: Stages | None = None,
) -> Any:
    """Moves each router's bias by rate * sign(mean load - load) (DeepSeek-V3, section 2.1.2).

    Args:
      params: Parameter tree of R1.
      loads: Tokens of each expert in the order of the layers, the MTP module's last if it ran.
      config: Tells which layers have experts.
      rate: gamma.
      stages: Which of the layers are stacked.

    Returns:
      The tree with new biases.
    """
    paths = [(f"layers_{i}",) for i in range(config.first_k_dense_replace, config.num_hidden_layers)]
    by_path = dict(zip([*paths, ("mtp", "layer")][: len(loads)], loads, strict=True))
    if stages is not None and (f"layers_{stages.layers[0]}",) in by_path:
        by_path[STACKED,] = jnp.stack([by_path.pop((f"layers_{i}",)) for i in stages.order])

    def moved(tree: Any, path: tuple[str, ...], load: Float[Array, "*L E"]) -> Any:
        if path:
            return {**tree, path[0]: moved(tree[path[0]], path[1:], load)}
        return tree + rate * jnp.sign(jnp.broadcast_to(jnp.mean(load, axis=-1, keepdims=True), load.shape) - load)

    for path, load in by_path.items():
        params = moved(params, ("decoder", *path, "mlp", "gate", BALANCE_BIAS), load)
    return params


def batch_gradients(
    config: Config,
    model: R1,
    task: Task,
    trained: Any,
    frozen: Any,
    batch: Batch,
    key: PRNGKeyArray,
    share: Float[Array, ""],
    scale: Float[Array, ""] | None = None,
) -> tuple[Any, Float[Array, ""], dict[str, Array], tuple[Float[Array, " E"], ...], list[Array]]:
    """Gradients, loss, its parts and the experts' loads of a whole batch, computed in `train.accumulation` parts.

    Every mean of the loss is taken over the whole batch, and a case's random numbers depend on its index alone, so that
    the number of parts changes nothing but the order of additions, and how gradients are rounded where a rule says so.

    Args:
      config: Parts, and the depth of the decoder.
      model: The model.
      task: Batch, loss.
      trained: Weights to differentiate by, and ranges of activations.
      frozen: The other weights.
      batch: From `task.collate`.
      key: Randomness of the step.
      share: Of the run that is done.
      scale: Factor on the loss while it is differentiated; the gradients are divided by it.

    Returns:
      Gradients in fp32, with the largest input in the place of each range; the scalar loss, its parts, the tokens of
      each expert of each mixture layer, and for each of these layers how many choices waited for a second exchange
      between devices (none where there is no exchange).
    """
    augment, dropout = jax.random.split(key)
    cases = jnp.arange(len(jax.tree.leaves(batch)[0]))
    microbatches = divide((cases, batch), config.train.accumulation)

    def prepare(part: tuple[Array, Batch]) -> tuple[Inputs, dict[str, Array]]:
        keys = jax.vmap(lambda case: jax.random.fold_in(augment, case))(part[0])
        return task.prepare(part[1], keys)

    weights = sum_over(lambda part: task.weights(*prepare(part)), microbatches)

    def one(part: tuple[Array, Batch]) -> Any:
        inputs, targets = prepare(part)

        def loss_fn(trained: Any) -> tuple[Array, Any]:
            params = join_trees(trained, frozen)
            # Rounding draws by the row of a product; dropout knows the case by itself.
            rngs = {"dropout": dropout, "rounding": jax.random.fold_in(dropout, part[0][0])}
            output = model.apply({"params": params}, inputs, cases=part[0], language=task.language, rngs=rngs)
            loss, parts = task.loss(output, inputs, targets, share, weights)
            scaled = loss if scale is None else loss * scale
            waited = [stats.waited for stats in output.router if stats.waited is not None]
            return scaled, (loss, parts, tuple(stats.load for stats in output.router), waited)

        gradients, sums = jax.grad(loss_fn, has_aux=True)(trained)
        return gradients, *sums

    gradients, *sums = sum_over(one, microbatches)
    gradients = _wide(gradients)
    if scale is not None:
        unscaled = lambda path, g: g if is_range(path) else g / scale  # noqa: E731
        gradients = jax.tree_util.tree_map_with_path(unscaled, gradients)
    return gradients, *sums


def gradients_by_now(config: Config, model: R1, task: Task, *arguments: Any) -> Any:
    """`batch_gradients`, of a model whose products are of floats until `train.quant_start` of the run is done.

    Args:
      config: The share.
      model: The model, whose products are rounded from then on.
      task: The task.
      arguments: The others of `batch_gradients`.

    Returns:
      As there; one program holds both, and executes one of them.
    """
    rounding = functools.partial(batch_gradients, config, model, task)
    if not config.train.quant_start:
        return rounding(*arguments)
    floats = functools.partial(batch_gradients, config, model.clone(config=replace(config.model, quant=())), task)
    return jax.lax.cond(arguments[4] < config.train.quant_start, floats, rounding, *arguments)


def make_step(config: Config, model: R1, task: Task, stages: Stages | None = None) -> Any:
    """The training step as a pure function.

    Args:
      config: Optimizer and seed.
      model: The model.
      task: Batch, loss.
      stages: Layers of a pipeline, which the state has stacked.

    Returns:
      (state, batch, limit) -> (state, metrics), to be compiled. A loss above the fp32 scalar `limit`
      (`guard.loss_limit`) or a number that is not finite leaves the state as it was, but for its step.
    """
    order = () if stages is None else stages.order
    optimizer, rate = make_optimizer(config.train, order), schedule(config.train)

    def step(state: TrainState, batch: Batch, limit: Float[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        share = state.step.astype(jnp.float32) / config.train.steps
        old, frozen, ranges = _divide(state.params, config)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key[:2], impl="threefry2x32"), state.step)
        draws, rounding, rounding_moments = jax.random.split(key, 3)
        kept, scaling = state.optimizer if isinstance(state.optimizer, ScaledState) else (state.optimizer, None)
        scale = scaling.scale if scaling else None
        gradients, loss, parts, loads, waited = gradients_by_now(
            config, model, task, join_trees(old, ranges), frozen, batch, draws, share, scale
        )
        if ranges:
            seen, gradients = split_ranges(gradients)
            ranges = follow(ranges, seen, share, config.train)
        updates, moments = optimizer.update(gradients, _wide(kept), _wide(old))
        new = round_like(rounding, optax.apply_updates(_wide(old), updates), old)
        moments = round_like(rounding_moments, moments, kept)
        if not frozen and config.model.decoder.scoring_func == "sigmoid":  # DeepSeek-V2's routers have no such bias
            gamma = jnp.where(share < config.train.router_bias_until, config.train.router_bias_rate, 0.0)
            new = balance_routers(new, loads, config.model.decoder, gamma, stages)
        metrics = {"loss": loss, **{f"loss.{k}": v for k, v in parts.items()}}
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": jnp.asarray(rate(updates_done(kept)))}
        metrics |= layer_metrics(_wide(old), gradients, updates, order)
        for i, load in enumerate(loads):
            metrics[f"router.{i}.violation"] = jnp.max(load) / jnp.maximum(jnp.mean(load), 1e-9) - 1
        for i, count in enumerate(waited):
            metrics[f"router.{i}.waited"] = count.astype(jnp.float32)
        average = _average(state, new, ranges, config)
        params = join_trees(join_trees(new, frozen), ranges)
        done = TrainState(state.step + 1, state.key, params, moments, average)
        return _if_sound(state._replace(optimizer=kept), done, scaling, metrics, limit)

    return step


def _average(state: TrainState, new: Any, ranges: Any, config: Config) -> Any:
    """The moving average with new trained weights in it, and ranges as they are."""
    if not config.train.ema:
        return state.ema
    # Averaging over the steps so far keeps the first average from being the random start.
    count = state.step.astype(jnp.float32)
    decay = jnp.minimum(config.train.ema, (1 + count) / (10 + count))
    average, unmoved, _ = _divide(state.ema, config)
    average = jax.tree.map(lambda old, new: old * decay + new * (1 - decay), average, _wide(new))
    return join_trees(join_trees(average, unmoved), ranges)


def _wide(tree: Any) -> Any:
    """The tree with every floating-point number in fp32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _if_sound(
    before: TrainState,
    done: TrainState,
    scaling: LossScale | None,
    metrics: dict[str, Array],
    limit: Float[Array, ""],
) -> tuple[TrainState, dict[str, Array]]:
    """The step; nothing of it but the step count, where a number is not finite or the loss is above the limit.

    Adds the metric "refused" (0 or 1). An overflow of fp16 does not count as such while its scale can still fall.
    """
    finite = jnp.isfinite(metrics["gradient_norm"])
    taken = finite & (metrics["loss"] <= limit)  # of NaN, this is false
    state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), done, before)
    # A step that was not taken has no update, and JSON has no infinity.
    shown = {k: v if k.startswith(("loss", "router")) else jnp.where(taken, v, 0.0) for k, v in metrics.items()}
    shown |= {"learning_rate": metrics["learning_rate"], "refused": jnp.where(taken, 0.0, 1.0)}
    if scaling is None:
        return state._replace(step=done.step), shown
    following = next_scale(scaling, finite)
    shown["refused"] = jnp.where(taken | (~finite & (scaling.scale > 1)), 0.0, 1.0)
    shown |= {"loss_scale": scaling.scale, "skipped": following.skipped}
    return state._replace(step=done.step, optimizer=ScaledState(state.optimizer, following)), shown


def check_offload(config: Config, device: Any) -> None:
    """Refuses to keep activations or moments in the host's memory where a device cannot reach it.

    Args:
      config: What is kept where.
      device: A JAX device.

    Raises:
      UserError: It cannot.
    """
    for field, value, wish, instead in (
        ("model.remat", config.model.remat, "offload", "full"),
        ("train.moments_on", config.train.moments_on, "host", "device"),
    ):
        if value == wish and HOST not in {memory.kind for memory in device.addressable_memories()}:
            raise UserError(
                f"{field} is {wish!r}, but {device.device_kind} cannot reach the host's memory: use {instead!r}"
            )


def check_quant(model: R1, task: Task, batch: Batch, device: Any) -> None:
    """Refuses rules of `model.quant` that no weight can follow, and types that a device does not multiply.

    Args:
      model: The model.
      task: The task.
      batch: Any collated batch (shapes).
      device: A JAX device.

    Raises:
      UserError: Names the rule.
    """
    if model.config.quant:
        found = weights_of(model, task, batch)
        check_rules(model.config.quant, [use.name for use in found], device)
        check_ranges(model.config.quant, found)


def weights_of(model: R1, task: Task, batch: Batch) -> list[Use]:
    """Every product of a model with a weight; arguments as in `check_quant`."""

    def init(batch: Batch) -> Any:
        return model.init(jax.random.key(0), task.prepare(batch)[0], language=task.language)

    return uses(init, batch)


def compile_step(
    config: Config, model: R1, task: Task, mesh: Mesh, batch: Batch, options: dict[str, Any] | None = None
) -> Any:
    """Compiles the step ahead of time for the mesh, with the state donated.

    Args:
      config: The experiment.
      model: The model.
      task: The task.
      mesh: Devices.
      batch: Any collated batch (shapes).
      options: Of the compiler, where they are not its own.

    Returns:
      The compiled executable; `memory_analysis()` and `cost_analysis()` say what it takes.

    Raises:
      UserError: Activations or moments shall wait in the host's memory, and the devices cannot reach it.
    """
    check_offload(config, mesh.local_devices[0])
    check_quant(model, task, batch, mesh.local_devices[0])
    abstract = abstract_state(config, model, task, mesh, batch)
    where, cases = state_shardings(config, mesh, abstract), batch_sharding(mesh)
    stages = stages_on(mesh, config.mesh, config.model.decoder)
    whole, step_of = NamedSharding(mesh, PartitionSpec()), make_step(config, model, task, stages)
    on_devices = shard_tree(mesh, abstract.optimizer)

    def fetching(state: TrainState, batch: Batch, limit: Float[Array, ""]) -> tuple[TrainState, dict[str, Array]]:
        return step_of(state._replace(optimizer=jax.device_put(state.optimizer, on_devices)), batch, limit)

    step = jax.jit(
        traced_for(mesh, config.mesh, fetching if config.train.moments_on == "host" else step_of),
        in_shardings=(where, cases, whole),
        out_shardings=(where, whole),
        donate_argnums=0,
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    return step.lower(abstract, like, NO_LIMIT).compile(options)
