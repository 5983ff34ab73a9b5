"""Random Hugging Face checkpoints of any shape with what `transformers` computes with them, as reference.npz.

`randomise` makes every number count: norms away from 1, logits with a standard deviation near 1, and routing biases
that change who wins and leave every biased score negative.
"""

import json
from pathlib import Path

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


def randomise(module, seed):
    """Draws all parameters and routing biases anew."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.3 * noise - 1.5)
            elif "norm" in name:
                value.copy_(1 + 0.3 * noise)
            elif value.ndim >= 2:
                value.copy_(noise * (1.0 if "embed_tokens" in name else value.shape[-1] ** -0.5))


def numpy_of(value):
    return value.detach().float().numpy()


def make(folder, arch="v3", *, seed=0, mtp=False, dtype="float32", padding=0, batch=2, length=12, **change):
    """Writes a checkpoint with its reference; returns the arrays of the reference.

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
    if mtp:
        arrays |= add_mtp(Path(folder), model, ids, seed)
    np.savez(Path(folder) / "reference.npz", **arrays)
    return arrays


def run(model, ids, padding, gradients):
    """Logits, hidden states, choices, left-padded logits, and gradients of every parameter."""
    import torch

    caught = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda _m, _a, result: caught.append(result)) for gate in gates]
    out = model(input_ids=ids, output_hidden_states=True, labels=ids)
    for hook in hooks:
        hook.remove()
    arrays = {"input_ids": ids.numpy().astype(np.int32), "logits": numpy_of(out.logits), "loss": numpy_of(out.loss)}
    arrays |= {f"hidden_{i}": numpy_of(x) for i, x in enumerate(out.hidden_states)}
    for i, (_, weights, experts) in enumerate(caught):
        order = experts.argsort(dim=-1)
        arrays[f"topk_idx_{i}"] = experts.gather(1, order).numpy().astype(np.int32)
        arrays[f"topk_w_{i}"] = numpy_of(weights.gather(1, order))
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


def add_mtp(folder, model, ids, seed):
    """Adds a random MTP module to the files, under the names of the published checkpoints."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.modeling_layers import MtpModel

    mtp = MtpModel(model, 1).eval()
    randomise(mtp.layers, seed + 7)
    layer, prefix = mtp.layers[0], f"model.layers.{model.config.num_hidden_layers}."
    parts = {"enorm": layer.enorm, "hnorm": layer.hnorm, "eh_proj": layer.eh_proj, "shared_head.norm": layer.post_norm}
    parts |= {"embed_tokens": model.model.embed_tokens, "shared_head.head": model.lm_head}
    new = {f"{prefix}{name}.weight": part.weight for name, part in parts.items()}
    for name, value in layer.mtp_block.state_dict().items():
        experts, stacked, kind = name.partition("experts.")
        if stacked and kind == "gate_up_proj":
            for e, both in enumerate(value):
                halves = zip(("gate", "up"), both.chunk(2), strict=True)
                new |= {f"{prefix}{experts}experts.{e}.{half}_proj.weight": part for half, part in halves}
        elif stacked and kind == "down_proj":
            new |= {f"{prefix}{experts}experts.{e}.down_proj.weight": down for e, down in enumerate(value)}
        else:
            new[prefix + name] = value
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: value.detach().clone().contiguous() for name, value in new.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    positions = torch.arange(ids.shape[1] - 1)[None].expand(ids.shape[0], -1)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        states = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
        return {"mtp_hidden": numpy_of(states), "mtp_logits": numpy_of(model.lm_head(states))}


def load(folder, arch, dtype):
    """Loads a folder in `transformers`; the weights must be exactly those that it wants."""
    import torch

    model, told = classes(arch)[1].from_pretrained(
        folder, attn_implementation="eager", dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


def published(folder):
    return json.loads((Path(folder) / "config.json").read_text())
