"""Makes deepseek_v3_tiny.npz: a very small random DeepSeek-V3 checkpoint and what Hugging Face computes with it.

    pip install torch==2.13.0 transformers==5.23.0
    PYTHONPATH=. python tests/models/make_fixture.py tests/models/deepseek_v3_tiny.npz

The tests need neither package, only the file. Arrays:

    config                  JSON of Hugging Face's DeepseekV3Config
    weight/<name>           the checkpoint under its names on disk, one tensor an expert, the MTP module as the layer
                            after the last; float16 numbers, which fp32 holds exactly
    input_ids               [B, T]
    logits, mtp_logits      [B, T, V] and [B, T - 1, V]: next token, and token after next
    experts_<i>, weights_<i>  chosen experts, sorted, and their weights in mixture layer i (B T tokens; the MTP module's
                            layer is the last, with B (T - 1) tokens)
    loss                    mean next-token loss + 0.3 mean MTP loss
    gradient/<name>         its gradients for some weights, gradient_norm/<name> for all; experts are stacked

What Hugging Face initialises hides errors, so `tests.hf.reference.randomise` draws all weights anew; and `rms_norm_eps`
differs from the 1e-6 of the latent norms.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from tests.hf import reference

CONFIG = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 20,
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
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
BATCH, LENGTH, MTP_WEIGHT = 2, 20, 0.3
GRADIENTS = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.q_a_proj.weight",
    "model.layers.0.self_attn.kv_a_layernorm.weight",
    "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.2.mlp.gate.weight",
    "model.layers.2.mlp.experts.down_proj",
    "model.layers.2.mlp.shared_experts.up_proj.weight",
    "model.layers.3.eh_proj.weight",
    "model.layers.3.mlp.gate.weight",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    import torch
    from safetensors.torch import load_file
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG, attn_implementation="eager")).eval()
    mtp = MtpModel(model, 1).eval()
    reference.randomise(mtp.layers, 2, half=True)
    reference.randomise(model, 1, half=True)

    # Hugging Face's own writer names the main model's tensors; the MTP module follows the published checkpoints.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = dict(load_file(Path(folder) / "model.safetensors"))
    tensors |= reference.mtp_tensors(mtp, f"model.layers.{CONFIG['num_hidden_layers']}.")
    arrays = {f"weight/{name}": value.detach().numpy().astype(np.float16) for name, value in tensors.items()}
    assert all((arrays[f"weight/{n}"].astype(np.float32) == v.detach().numpy()).all() for n, v in tensors.items())

    ids = torch.randint(0, CONFIG["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    with reference.choices([*model.model.layers, mtp.layers[0].mtp_block]) as chosen:
        hidden = model.model(input_ids=ids).last_hidden_state
        states = reference.mtp_states(mtp, hidden, ids)
    logits, mtp_logits = model.lm_head(hidden), model.lm_head(states)
    for i, (experts, weights) in enumerate(chosen):
        arrays |= {f"experts_{i}": experts, f"weights_{i}": weights}
    loss = reference.entropy_ahead(logits, ids, 1) + MTP_WEIGHT * reference.entropy_ahead(mtp_logits, ids, 2)
    loss.backward()

    named = reference.all_parameters(model, mtp)
    for name, value in named.items():
        if value.grad is not None:
            arrays[f"gradient_norm/{name}"] = value.grad.norm().numpy()
    arrays |= {f"gradient/{name}": named[name].grad.numpy() for name in GRADIENTS}
    arrays |= {"config": np.array(json.dumps(model.config.to_dict())), "input_ids": ids.numpy().astype(np.int32)}
    arrays |= {"logits": logits, "mtp_logits": mtp_logits, "loss": loss}
    arrays = {name: v.detach().numpy() if isinstance(v, torch.Tensor) else v for name, v in arrays.items()}
    np.savez_compressed(output, **arrays)
    print(f"{output}: {output.stat().st_size} bytes, standard deviation of the logits {arrays['logits'].std():.2f}")


if __name__ == "__main__":
    main()
