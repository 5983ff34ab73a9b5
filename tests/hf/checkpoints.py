"""Small checkpoint folders from the stored fixtures, written by the safetensors library."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

FIXTURES = {
    "v3": Path(__file__).parents[1] / "models" / "deepseek_v3_tiny.npz",
    "v2": Path(__file__).with_name("deepseek_v2_tiny.npz"),
}
RENAMED = {"experts_": "topk_idx_", "weights_": "topk_w_"}


def stored(arch):
    """config.json, fp32 tensors by their names on disk, and the reference's arrays under the names of reference.npz."""
    with np.load(FIXTURES[arch]) as file:
        arrays = {name: file[name] for name in file.files}
    published = json.loads(str(arrays.pop("config")))
    names = [name for name in arrays if name.startswith("weight/")]
    tensors = {name.removeprefix("weight/"): np.float32(arrays.pop(name)) for name in names}
    for old, new in RENAMED.items():
        arrays |= {new + n.removeprefix(old): arrays.pop(n) for n in list(arrays) if n.startswith(old)}
    return published, tensors, arrays


def write_folder(folder, published, tensors, shards=1):
    """Writes config.json and the tensors, in turn over as many shards."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: v for n, v in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def quantise(tensors, block=128):
    """Block fp8 as DeepSeek publishes it, and the fp32 numbers that it stands for; one block after another."""
    quantised, plain = {}, {}
    for name, value in tensors.items():
        if value.ndim != 2 or "_proj" not in name or "eh_proj" in name:
            quantised[name] = plain[name] = value
            continue
        rows, columns = value.shape
        scale = np.ones((-(-rows // block), -(-columns // block)), np.float32)
        q, dequantised = np.empty(value.shape, ml_dtypes.float8_e4m3fn), np.empty_like(value)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                place = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
                scale[i, j] = np.abs(value[place]).max() / 448
                q[place] = (value[place] / scale[i, j]).astype(q.dtype)
                dequantised[place] = q[place].astype(np.float32) * scale[i, j]
        quantised[name], quantised[f"{name}_scale_inv"], plain[name] = q, scale, dequantised
    return quantised, plain


def params_by_name(params, config):
    """Arrays of a parameter tree under their names on disk, found without the code that is tested."""
    found = {}

    def walk(prefix, node):
        for key, value in node.items():
            if key == "experts":
                for e in range(config.n_routed_experts):
                    gate, up = np.split(np.asarray(value["gate_up_proj"][e]), 2)
                    found[f"{prefix}experts.{e}.gate_proj.weight"] = gate
                    found[f"{prefix}experts.{e}.up_proj.weight"] = up
                    found[f"{prefix}experts.{e}.down_proj.weight"] = np.asarray(value["down_proj"][e])
            elif isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                found[prefix + key] = np.asarray(value)

    last = config.num_hidden_layers
    for key, value in params.items():
        if key == "embed_tokens":
            found["model.embed_tokens.weight"] = np.asarray(value)
        elif key == "lm_head":
            walk("lm_head.", value)
        elif key == "mtp":
            rest = {k: v for k, v in value.items() if k not in ("layer", "shared_head_norm")}
            walk(f"model.layers.{last}.", rest | value["layer"])
            found[f"model.layers.{last}.shared_head.norm.weight"] = np.asarray(value["shared_head_norm"]["weight"])
        else:
            walk(f"model.{key.replace('layers_', 'layers.')}.", value)
    return found


def write_tokenizer(folder, texts, size):
    """A byte-level BPE like DeepSeek's with its marks and template; returns the files' content by name."""
    folder = Path(folder)
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = byte_level(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    marks = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=marks, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    library.save(str(folder / "tokenizer.json"))
    told = {"add_bos_token": True, "bos_token": marks[0], "eos_token": marks[1], "pad_token": marks[1]}
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(told, ensure_ascii=False) + " \r\n", "utf-8")
    template = "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜><think>\n"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name.startswith(("tokenizer", "chat"))}
