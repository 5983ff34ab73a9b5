"""PyTorch's training steps of h100.py: transformers' DeepseekV3ForCausalLM, and as strong a reference as we can write.

A child of h100.py calls it. Both start from the weights that our own case wrote, learn the same tokens at the same
rates, and keep fp32 weights and moments beside bf16 products, as ours does.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

Weights = dict[str, torch.Tensor]
LOSS_ROWS = 4096
"""Tokens whose logits are in memory at once."""
ALIGNED = 8
"""Rows that the size of an expert's group has to be a multiple of, as the kernel of its weights' gradient asserts."""
PEAK = 989.4e12


class Dispatch(torch.autograd.Function):
    """Rows of tokens, sorted by expert; the way back gathers too, where autograd would add with atomics."""

    @staticmethod
    def forward(ctx, x, token, place):
        ctx.save_for_backward(place)
        ctx.tokens = len(x)
        return x[token]

    @staticmethod
    def backward(ctx, slope):
        (place,) = ctx.saved_tensors
        return slope[place].view(ctx.tokens, -1, slope.shape[-1]).sum(1), None, None


class Combine(torch.autograd.Function):
    """Sums of each token's sorted rows."""

    @staticmethod
    def forward(ctx, rows, token, place, tokens):
        ctx.save_for_backward(token)
        return rows[place].view(tokens, -1, rows.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx, slope):
        (token,) = ctx.saved_tensors
        return slope[token], None, None, None


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of losses over a number, with the gradients formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        matrix = weight.to(hidden.dtype)
        slope, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            logits = (hidden[rows] @ matrix.t()).float()
            counted = labels[rows] >= 0
            label = labels[rows].clamp(min=0)[:, None]
            normaliser = torch.logsumexp(logits, -1, keepdim=True)
            total += torch.where(counted, (normaliser - logits.gather(1, label))[:, 0], 0.0).sum() / count
            each = torch.exp(logits - normaliser).scatter_add(1, label, torch.full_like(normaliser, -1.0))
            each = (each * (counted[:, None] / count)).to(hidden.dtype)
            slope[rows] = each @ matrix
            of_weight += (each.t() @ hidden[rows]).float()
        ctx.save_for_backward(slope, of_weight)
        return total

    @staticmethod
    def backward(ctx, one):
        """Its caller has put every factor into `count`: `one` is 1."""
        slope, of_weight = ctx.saved_tensors
        return slope, of_weight, None, None


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def turn(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of neighbouring pairs of x [B, T, N, H]."""
    half = x.shape[-1] // 2
    rates = theta ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (torch.arange(x.shape[1], device=x.device)[:, None] * rates)[None, :, None]
    even, odd = x.float().unflatten(-1, (half, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight.to(x.dtype))


def attention(w: Weights, name: str, x: torch.Tensor, c: dict) -> torch.Tensor:
    heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    q = linear(x, w[f"{name}q_proj.weight"]).unflatten(-1, (heads, -1))
    latent, k_rope = linear(x, w[f"{name}kv_a_proj_with_mqa.weight"]).split([c["kv_lora_rank"], rope], -1)
    latent = norm(latent, w[f"{name}kv_a_layernorm.weight"], 1e-6)
    k_nope, v = (
        linear(latent, w[f"{name}kv_b_proj.weight"]).unflatten(-1, (heads, -1)).split([nope, c["v_head_dim"]], -1)
    )
    k_rope = turn(k_rope[:, :, None], c["rope_theta"]).expand(-1, -1, heads, -1)
    q = torch.cat([q[..., :nope], turn(q[..., nope:], c["rope_theta"])], -1)
    q, k, v = (part.transpose(1, 2) for part in (q, torch.cat([k_nope, k_rope], -1), v))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(mixed.transpose(1, 2).flatten(2), w[f"{name}o_proj.weight"])


def feed_forward(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = linear(x, w[f"{name}gate_up_proj.weight"]).chunk(2, -1)
    return linear(functional.silu(gate) * up, w[f"{name}down_proj.weight"])


def mixture(w: Weights, name: str, x: torch.Tensor, c: dict) -> torch.Tensor:
    """Experts of all tokens x [T, D], no token dropped; one group of experts."""
    count, k = c["n_routed_experts"], c["num_experts_per_tok"]
    scores = functional.linear(x.float(), w[f"{name}gate.weight"]).sigmoid()
    chosen = scores.detach().topk(k, -1, sorted=False).indices  # the biases stay zero
    share = scores.gather(1, chosen)
    share = share / (share.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]
    order = chosen.flatten().argsort(stable=True)
    sizes = torch.zeros(count, device=x.device, dtype=torch.int64)
    sizes = sizes.scatter_add(0, chosen.flatten(), torch.ones_like(order))
    padded = (sizes + ALIGNED - 1) // ALIGNED * ALIGNED
    ends = padded.cumsum(0)
    expert = chosen.flatten()[order]
    inside = torch.arange(len(order), device=x.device) - (sizes.cumsum(0) - sizes)[expert]
    place = torch.zeros_like(order).scatter(0, order, (ends - padded)[expert] + inside)
    capacity = len(order) + count * ALIGNED
    token = torch.zeros(capacity, device=x.device, dtype=torch.int64)
    token = token.scatter(0, place, torch.arange(len(order), device=x.device) // k)
    share = share.new_zeros(capacity).scatter(0, place, share.flatten())  # 0 where a row only fills its group
    rows, ends = Dispatch.apply(x, token, place), ends.to(torch.int32)
    both = functional.grouped_mm(rows, w[f"{name}experts.gate_up"].to(x.dtype).transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, -1)
    inner = torch.where(share[:, None] == 0, 0.0, functional.silu(gate) * up * share[:, None]).to(x.dtype)
    outer = functional.grouped_mm(inner, w[f"{name}experts.down"].to(x.dtype).transpose(1, 2), offs=ends)
    return Combine.apply(outer, token, place, len(x)) + feed_forward(w, f"{name}shared_experts.", x)


def loss(w: Weights, tokens: torch.Tensor, count: int, c: dict) -> torch.Tensor:
    """Sum over the next tokens of tokens [B, T], divided by count."""
    x = functional.embedding(tokens, w["model.embed_tokens.weight"]).bfloat16()
    for i in range(c["num_hidden_layers"]):
        name = f"model.layers.{i}."
        x = x + attention(w, f"{name}self_attn.", norm(x, w[f"{name}input_layernorm.weight"], c["rms_norm_eps"]), c)
        inside = norm(x, w[f"{name}post_attention_layernorm.weight"], c["rms_norm_eps"])
        if i < c["first_k_dense_replace"]:
            x = x + feed_forward(w, f"{name}mlp.", inside)
        else:
            x = x + mixture(w, f"{name}mlp.", inside.flatten(0, 1), c).view_as(x)
    x = norm(x, w["model.norm.weight"], c["rms_norm_eps"])
    labels = functional.pad(tokens[:, 1:], (0, 1), value=-1)
    return LinearCrossEntropy.apply(x.flatten(0, 1), w["lm_head.weight"], labels.flatten(), count)


def read_weights(folder: Path, c: dict, device: str) -> Weights:
    """Trained weights by their names on disk, gate above up, experts stacked."""
    from safetensors import safe_open

    found: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for i in range(c["num_hidden_layers"]):
        name = f"model.layers.{i}.mlp."
        if i < c["first_k_dense_replace"]:
            parts = [name]
        else:
            experts = range(c["n_routed_experts"])
            gates, ups, downs = (
                torch.stack([found.pop(f"{name}experts.{e}.{part}_proj.weight") for e in experts])
                for part in ("gate", "up", "down")
            )
            found[f"{name}experts.gate_up"], found[f"{name}experts.down"] = torch.cat([gates, ups], 1), downs
            found.pop(f"{name}gate.e_score_correction_bias")
            parts = [f"{name}shared_experts."]
        for part in parts:
            both = [found.pop(f"{part}{half}_proj.weight") for half in ("gate", "up")]
            found[f"{part}gate_up_proj.weight"] = torch.cat(both)
    return {name: x.to(device).requires_grad_() for name, x in found.items()}


def reference(folder: Path, c: dict, device: str) -> tuple[Weights, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Our own model and its loss."""
    weights = read_weights(folder, c, device)
    compiled = torch.compile(loss, dynamic=False) if device == "cuda" else loss
    return weights, lambda tokens, count: compiled(weights, tokens, count, c)


def transformers(folder: Path, c: dict, device: str) -> tuple[Weights, Callable[[torch.Tensor, int], torch.Tensor]]:
    """That of Hugging Face. Its grouped products compile for bf16 weights alone, so it gets copies of the fp32 ones."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model = model.to(device).train()
    weights = dict(model.named_parameters())

    def mean(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
        copies = {name: x if "gate.weight" in name else x.bfloat16() for name, x in weights.items()}
        inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        return torch.func.functional_call(model, copies, kwargs=inputs).loss

    compiled = torch.compile(mean, dynamic=False) if device == "cuda" else mean
    return weights, lambda tokens, count: compiled(weights, tokens) * (len(tokens) * (tokens.shape[1] - 1) / count)


def autocast(folder: Path, c: dict, device: str) -> tuple[Weights, Callable[[torch.Tensor, int], torch.Tensor]]:
    """That of Hugging Face as its Trainer runs it: fp32 weights, products in bf16 by autocast."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model = model.to(device).train()
    compiled = torch.compile(model, dynamic=False) if device == "cuda" else model

    def of(tokens: torch.Tensor, count: int) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            mean = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        return mean * (len(tokens) * (tokens.shape[1] - 1) / count)

    return dict(model.named_parameters()), of


MAKERS = {"torch": reference, "transformers": transformers, "transformers autocast": autocast}


def measure(name: str, scale: str, samples: int, folder: Path) -> dict[str, Any]:
    """Learns one batch as `h100_train.measure` does, in the largest parts that fit.

    Args:
      name: Of the case.
      scale: full or tiny.
      samples: Timed steps.
      folder: Holds a folder for each model, with its weights and batch.npz.

    Returns:
      A row.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    began = time.perf_counter()
    device = "cuda" if scale == "full" else "cpu"
    model, maker = name.removeprefix("train ").split(", ")
    here = folder / model.replace(" ", "-")
    c, facts = json.loads((here / "config.json").read_text()), np.load(here / "batch.npz")
    c["rope_theta"] = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    tokens, rates = torch.tensor(facts["tokens"].astype(np.int64), device=device), facts["rates"]
    weights, of = MAKERS[maker](here, c, device)
    free = {"decay": [], "keep": []}
    for key, x in weights.items():
        free["decay" if x.ndim > 1 and "embed_tokens" not in key else "keep"].append(x)
    optimizer = torch.optim.AdamW(
        [
            {"params": free["decay"], "weight_decay": float(facts["decay"])},
            {"params": free["keep"], "weight_decay": 0.0},
        ],
        betas=tuple(float(b) for b in facts["betas"]),
        eps=1e-8,
        fused=True,
    )
    losses: list[torch.Tensor] = []
    count = tokens.shape[0] * (tokens.shape[1] - 1)

    def step(rows: int) -> None:
        total = torch.zeros((), device=device)
        for part in tokens.split(rows):
            share = of(part, count)
            share.backward()
            total += share.detach()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), float(facts["clip"]), foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = float(rates[len(losses)])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)

    best = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    rows, taken = len(tokens) // 4, []
    with sdpa_kernel(best, set_priority=True):
        while not losses:
            try:
                step(rows)
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                if rows == 1:
                    raise
                rows //= 2
        ready = time.perf_counter() - began
        for _ in range(samples + 2):
            start = time.perf_counter()
            step(rows)
            float(losses[-1])
            taken.append(time.perf_counter() - start)
    low, middle, high = np.quantile(taken[2:], [0.25, 0.5, 0.75])
    flops, found = float(facts["flops"]), [float(x) for x in losses]
    return {
        "name": name,
        "ms": 1e3 * middle,
        "iqr_ms": 1e3 * (high - low),
        "error": None,
        "preparing_s": ready,
        "tflops": flops / middle / 1e12,
        "mfu": flops / middle / PEAK,
        "tokens_per_second": tokens.numel() / middle,
        "parts": len(tokens) // rows,
        "losses": found,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
    }
