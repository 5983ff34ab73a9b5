"""Compiles the gradients of a layer of DeepSeek-V3 at full widths for many devices, and prints what they exchange.

python -m tests.parallel.contract 512 fsdp=8 expert=8 tensor=8
"""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp

from configs.language import DEEPSEEK_V3
from r1jax.config import Config, MeshConfig, ModelConfig, TaskConfig, TrainConfig
from r1jax.models.r1 import R1
from r1jax.parallel.collectives import collectives
from r1jax.parallel.mesh import batch_sharding, make_mesh, shard_tree, shares, traced_for
from r1jax.tasks.language.task import Language
from r1jax.train.step import batch_gradients, init_state

LENGTH = 256


def main(devices: int, sizes: dict[str, int]) -> list[dict[str, object]]:
    """Exchanges of the step, whose mixture layer, embedding and head are those of the published model."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh_config = MeshConfig(data=1, **sizes)
    mesh = make_mesh(mesh_config)
    decoder = replace(DEEPSEEK_V3, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    config = Config(
        model=ModelConfig(modalities=("text",), decoder=decoder, text_tokens=LENGTH, dropout=0.0, precision="bf16"),
        task=TaskConfig(name="language"),
        train=TrainConfig(batch_size=shares(mesh)),
        mesh=mesh_config,
    )
    task = Language(config)
    model = R1(config.model, task.heads)
    batch = {
        name: jax.ShapeDtypeStruct((shares(mesh), *x.shape[1:]), x.dtype)
        for name, x in task.collate(task.source("train").read_batch(jnp.zeros(1, int))).items()
    }
    params = jax.eval_shape(lambda batch: init_state(config, model, task, batch).params, batch)

    def gradients(params, batch):
        key = jax.random.key(0)
        return batch_gradients(config, model, task, params, {}, batch, key, jnp.zeros(()))[0]

    where = shard_tree(mesh, params)
    compiled = (
        jax.jit(
            traced_for(mesh, mesh_config, gradients), in_shardings=(where, batch_sharding(mesh)), out_shardings=where
        )
        .lower(params, batch)
        .compile()
    )
    return [one._asdict() for one in collectives(compiled.as_text(), mesh)]


if __name__ == "__main__":
    pairs = (word.split("=") for word in sys.argv[2:])
    print(json.dumps(main(int(sys.argv[1]), {name: int(size) for name, size in pairs})))
