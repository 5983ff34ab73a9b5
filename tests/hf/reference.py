"""Random Hugging Face checkpoints of any shape with what `transformers` computes with them, as reference.npz.

`randomise` makes every number count: norms away from 1, logits with a standard deviation near 1, and routing biases
that change who wins and leave every biased score negative.
"""

import json
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
V3 = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 2560,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "num_nextn_predict_layers": 0,
}
V2 = V3 | {
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 4.0,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
del V2["num_nextn_predict_layers"]


def classes(arch):
    import transformers

    name = f"Deepseek{arch.upper()}"
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def randomise(module, seed, half=False):
    """Draws all parameters and routing biases anew, on request as float16 numbers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                new = 0.3 * noise - 1.5
            elif "norm" in name:
                new = 1 + 0.3 * noise
            elif value.ndim >= 2:
                new = noise * (1.0 if "embed_tokens" in name else value.shape[-1] ** -0.5)
            else:
                continue  # rotary frequencies
            value.copy_(new.half().float() if half else new)


def numpy_of(value):
    return value.detach().float().numpy()


def make(folder, arch="v3", *, seed=0, mtp=False, dtype="float32", padding=0, batch=2, length=12, **change):
    """Writes a checkpoint with its reference; returns its arrays and, as mtp_grad/<name>, gradients of the MTP loss.

    Args:
      folder: A new folder.
      arch: v3 or v2.
      seed: Of weights and tokens.
      mtp: Also a multi-token prediction module, written as the published checkpoints have it.
      dtype: Of the weights and of the reference.
      padding: Tokens of padding on the left that leave the logits as they are; 0 stores no such logits.
      batch: Sequences.
      length: Tokens of each.
      change: Values of the config that differ; None stays None.
    """
    import torch

    config_class, model_class = classes(arch)
    values = (V3 if arch == "v3" else V2) | change
    values = {k: v for k, v in values.items() if v is not None or k == "q_lora_rank"}
    if mtp:
        values["num_nextn_predict_layers"] = 1
    model = model_class(config_class(**values, attn_implementation="eager"))
    randomise(model, seed + 1)
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    model = model.to(getattr(torch, dtype))
    for name, bias in biases.items():
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    model.save_pretrained(folder)
    # Casting a model also casts its rotary frequencies; loading one does not.
    model = model_class.from_pretrained(folder, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
    ids = torch.randint(0, values["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
    arrays = run(model, ids, padding, gradients=dtype == "float32")
    gradients = {}
    if mtp:
        module = add_mtp(Path(folder), model, seed)
        arrays |= run_mtp(model, module, ids)
        gradients = mtp_gradients(model, module, ids)
    np.savez(Path(folder) / "reference.npz", **arrays)
    return arrays | gradients


def run(model, ids, padding, gradients):
    """Logits, hidden states, choices, left-padded logits, and gradients of every parameter."""
    import torch

    with choices(model.model.layers) as chosen:
        out = model(input_ids=ids, output_hidden_states=True, labels=ids)
    arrays = {"input_ids": ids.numpy().astype(np.int32), "logits": numpy_of(out.logits), "loss": numpy_of(out.loss)}
    arrays |= {f"hidden_{i}": numpy_of(x) for i, x in enumerate(out.hidden_states)}
    for i, (experts, weights) in enumerate(chosen):
        arrays |= {f"topk_idx_{i}": experts, f"topk_w_{i}": weights}
    if padding:
        padded = torch.cat([torch.zeros_like(ids[:, :padding]), ids], dim=1)
        mask = torch.cat([torch.zeros_like(ids[:, :padding]), torch.ones_like(ids)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
        arrays["leftpad_logits"] = numpy_of(logits[:, padding:])
    if gradients:
        out.loss.backward()
        arrays |= {f"grad/{n}": numpy_of(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    return arrays


@contextmanager
def choices(layers):
    """Collects the chosen experts, sorted, and their weights of each mixture layer that runs meanwhile."""
    found = []

    def note(_module, _arguments, result):
        _, weights, experts = result
        order = experts.argsort(dim=-1)
        found.append((experts.gather(1, order).numpy().astype(np.int32), numpy_of(weights.gather(1, order))))

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in layers if hasattr(layer.mlp, "gate")]
    yield found
    for hook in hooks:
        hook.remove()


def add_mtp(folder, model, seed):
    """Adds a random MTP module to the files, as published: with copies of embedding and head; returns it."""
    from safetensors.torch import load_file, save_file
    from transformers.modeling_layers import MtpModel

    mtp = MtpModel(model, 1).eval()
    randomise(mtp.layers, seed + 7)
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    new = mtp_tensors(mtp, prefix)
    new |= {f"{prefix}embed_tokens.weight": model.model.embed_tokens.weight}
    new |= {f"{prefix}shared_head.head.weight": model.lm_head.weight}
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: value.detach().clone().contiguous() for name, value in new.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return mtp


def mtp_tensors(mtp, prefix):
    """Tensors of an MTP module under the names of the published checkpoints."""
    layer = mtp.layers[0]
    parts = {"enorm": layer.enorm, "hnorm": layer.hnorm, "eh_proj": layer.eh_proj, "shared_head.norm": layer.post_norm}
    named = {f"{prefix}{name}.weight": part.weight for name, part in parts.items()}
    for name, value in layer.mtp_block.state_dict().items():
        experts, stacked, kind = name.partition("experts.")
        if stacked and kind == "gate_up_proj":
            for e, both in enumerate(value):
                halves = zip(("gate", "up"), both.chunk(2), strict=True)
                named |= {f"{prefix}{experts}experts.{e}.{half}_proj.weight": part for half, part in halves}
        elif stacked and kind == "down_proj":
            named |= {f"{prefix}{experts}experts.{e}.down_proj.weight": down for e, down in enumerate(value)}
        else:
            named[prefix + name] = value
    return named


def mtp_states(mtp, hidden, ids):
    """What the MTP module makes of all tokens but the last; through the head it predicts the token after next."""
    import torch

    positions = torch.arange(ids.shape[1] - 1)[None].expand(ids.shape[0], -1)
    return mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])


def run_mtp(model, mtp, ids):
    """States and logits of an MTP module."""
    import torch

    with torch.no_grad():
        states = mtp_states(mtp, model.model(input_ids=ids).last_hidden_state, ids)
        return {"mtp_hidden": numpy_of(states), "mtp_logits": numpy_of(model.lm_head(states))}


def entropy_ahead(logits, ids, ahead):
    """Mean cross-entropy of the token so many places ahead of each place."""
    import torch

    kept = ids.shape[1] - ahead
    return torch.nn.functional.cross_entropy(logits[:, :kept].flatten(0, 1), ids[:, ahead:].flatten())


def mtp_gradients(model, mtp, ids):
    """Gradients of the loss of the token after next for every parameter of both, as mtp_grad/<name>."""
    states = mtp_states(mtp, model.model(input_ids=ids).last_hidden_state, ids)
    entropy_ahead(model.lm_head(states), ids, 2).backward()
    named = all_parameters(model, mtp)
    found = {f"mtp_grad/{name}": numpy_of(p.grad) for name, p in named.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def all_parameters(model, mtp):
    """Parameters of a model and its MTP module by name, experts stacked."""
    layer, prefix = mtp.layers[0], f"model.layers.{model.config.num_hidden_layers}."
    named = dict(model.named_parameters()) | {f"{prefix}{n}": p for n, p in layer.mtp_block.named_parameters()}
    parts = {"enorm": layer.enorm, "hnorm": layer.hnorm, "eh_proj": layer.eh_proj, "shared_head.norm": layer.post_norm}
    return named | {f"{prefix}{name}.weight": part.weight for name, part in parts.items()}


def load(folder, arch, dtype, mtp_of=None):
    """Loads a folder in `transformers`; the weights must be exactly those that it wants.

    Args:
      folder: The checkpoint.
      arch: v3 or v2.
      dtype: Of the weights.
      mtp_of: How names of an MTP module begin that the folder holds too; `transformers` knows the published one only.
    """
    import torch

    model, told = classes(arch)[1].from_pretrained(
        folder, attn_implementation="eager", dtype=getattr(torch, dtype), output_loading_info=True
    )
    surplus = {name for name in told.pop("unexpected_keys") if mtp_of is None or not name.startswith(mtp_of)}
    assert not surplus and not any(told.values()), (surplus, told)
    return model.eval()


def load_mtp(model):
    """The MTP module of the folder that a model was loaded from, by the loader of `transformers`."""
    from transformers.modeling_layers import MtpModel

    where = [rf"model\.layers\.{model.config.num_hidden_layers}\..*"]  # it finds the published layer 61 by itself
    with mock.patch.object(model, "_keys_to_ignore_on_load_unexpected", where):
        return MtpModel.from_pretrained(model).eval()


def published(folder):
    return json.loads((Path(folder) / "config.json").read_text())
