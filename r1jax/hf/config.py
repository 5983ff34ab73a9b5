"""What a Hugging Face config.json says, in our names and back; what we cannot honour is refused, all of it at once."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from r1jax.config import DecoderConfig, YarnConfig
from r1jax.data import tokenizer as byte_level
from r1jax.errors import UserError
from r1jax.fields import fit, wanted
from r1jax.validation import decoder_relations

CONFIG_FILE = "config.json"
FP8_BLOCK = 128
RENAMED = ("scoring_func", "num_nextn_predict_layers", "rope_theta", "rope_scaling", "n_group", "topk_group")
"""Fields of DecoderConfig that are spelled otherwise, or mean something else, in one of the model types."""
DEFAULTS = {"initializer_range": 0.02, "rope_interleave": True}
"""What published files may leave out; every other shape and constant must be there."""
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
}
"""Values that change what is computed, and those of them that we compute; a missing key has the first."""
ROUTING = {
    "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    "deepseek_v2": {"scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy")},
}
ROPE_KEYS = {"type", "rope_type", "rope_theta"}
ROPE_ONLY: dict[str, tuple[Any, ...]] = {
    "truncate": (True, None),
    "attention_factor": (None,),
    "partial_rotary_factor": (1.0, None),
}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
FOREIGN = ("quantization_config", "auto_map", "torch_dtype", "dtype", "transformers_version")
"""Keys of an imported config.json that are not true of what we write."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: The file.

    Returns:
      Its keys and values.

    Raises:
      UserError: The file is absent, unreadable or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the folder of a Hugging Face checkpoint.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): download or write it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {value!r:.60}, but it must be a JSON object.")
    return value


def decoder_config(published: dict[str, Any], source: str) -> DecoderConfig:
    """Translates a config.json of model type deepseek_v3 (also R1, Moonlight) or deepseek_v2.

    Args:
      published: Content of the file, in the old spelling (`rope_scaling`, `rope_theta`) or the new (`rope_parameters`).
      source: Name of the file, for error messages.

    Returns:
      The decoder of that checkpoint.

    Raises:
      UserError: Lists every key that is missing and every value that r1jax cannot honour.
    """
    kind = published.get("model_type")
    if kind not in tuple(ROUTING):  # it may be unhashable
        raise UserError(f"{source}: model_type is {kind!r}, but r1jax reads {' and '.join(ROUTING)}.")
    wrong = [*_unsupported(published, kind), *_quantization(published.get("quantization_config"))]
    values = _same_names(published, wrong) | _routing(published, kind, wrong) | _rope(published, wrong)
    if not wrong:
        config = DecoderConfig(**values)
        wrong = [
            f"{name} is {values[name]!r}, but it must be {rule}"
            for holds, name, rule in decoder_relations(config)
            if not holds
        ]
    if wrong:
        raise UserError(f"{source} says what r1jax cannot honour: {'; '.join(wrong)}.")
    return config


def _unsupported(published: dict[str, Any], kind: str) -> Iterator[str]:
    """Names values that would change the numbers."""
    for name, allowed in {**ONLY, **ROUTING[kind]}.items():
        value = published.get(name, allowed[0])
        if not any(value == option and type(value) is type(option) for option in allowed):
            yield f"{name} is {value!r}, but it must be {' or '.join(map(repr, allowed))}"
    heads = published.get("num_attention_heads")
    if published.get("num_key_value_heads", heads) not in (heads, None):
        yield f"num_key_value_heads is {published['num_key_value_heads']!r}, but it must be num_attention_heads"
    if kind == "deepseek_v2":
        if published.get("norm_topk_prob", False) is not False:
            # Hugging Face ignores it, and DeepSeek's own code then leaves the scaling factor out.
            yield f"norm_topk_prob is {published['norm_topk_prob']!r}, but deepseek_v2 must have it False"
        if published.get("rope_interleave", True) is not True:
            yield f"rope_interleave is {published['rope_interleave']!r}, but deepseek_v2 must have it True"


def _quantization(told: Any) -> Iterator[str]:
    """Names a quantization other than DeepSeek's block fp8."""
    if told is None:
        return
    group = told if isinstance(told, dict) else {"quant_method": told}
    block = [FP8_BLOCK, FP8_BLOCK]
    for name, allowed in {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}.items():
        value = group.get(name, allowed if name == "fmt" else None)
        if value != allowed:
            yield f"quantization_config.{name} is {value!r}, but it must be {allowed!r}"


def _same_names(published: dict[str, Any], wrong: list[str]) -> dict[str, Any]:
    """Fields that both sides call the same."""
    values = {}
    for name, hint in get_type_hints(DecoderConfig, include_extras=True).items():
        if name in RENAMED:
            continue
        value = published.get(name, DEFAULTS.get(name))
        if name not in published and name not in DEFAULTS:
            wrong.append(f"{name} is missing")
            continue
        if name == "q_lora_rank":
            value = value or None  # some files write 0
        try:
            values[name] = fit(hint, value)
        except (ValueError, OverflowError):
            wrong.append(f"{name} is {value!r}, but it must be {wanted(hint)}")
    if values.get("n_shared_experts") == 0:  # Hugging Face builds one of no width
        wrong.append("n_shared_experts is 0, but it must be at least 1")
    return values


def _routing(published: dict[str, Any], kind: str, wrong: list[str]) -> dict[str, Any]:
    """Scores, groups and the depth of multi-token prediction."""
    hints = get_type_hints(DecoderConfig, include_extras=True)
    given = dict(published)
    values: dict[str, Any] = {"scoring_func": ROUTING[kind]["scoring_func"][0]}
    if kind == "deepseek_v2" and given.get("topk_method", "greedy") == "greedy":
        given |= {"n_group": 1, "topk_group": 1}  # what the file says of them is not used
    given.setdefault("num_nextn_predict_layers", 0 if kind == "deepseek_v2" else 1)
    for name in ("n_group", "topk_group", "num_nextn_predict_layers"):
        try:
            values[name] = fit(hints[name], given.get(name))
        except (ValueError, TypeError, OverflowError):
            told = f"is {given[name]!r}" if name in given else "is missing"
            wrong.append(f"{name} {told}, but it must be {wanted(hints[name])}")
    if kind == "deepseek_v2" and values.get("num_nextn_predict_layers"):
        wrong.append(f"num_nextn_predict_layers is {given['num_nextn_predict_layers']!r}, but deepseek_v2 has none")
    return values


def _rope(published: dict[str, Any], wrong: list[str]) -> dict[str, Any]:
    """Base and context extension from either spelling; where both are there, they must agree."""
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        group = published.get(name)
        if group is None:
            continue
        if isinstance(group, dict):
            found.append(_rope_group(name, {"rope_theta": published.get("rope_theta"), **group}, wrong))
        else:
            wrong.append(f"{name} is {group!r:.60}, but it must be a JSON object or null")
    if not found:
        found.append(_rope_group("rope_scaling", {"rope_theta": published.get("rope_theta")}, wrong))
    if any(other != found[0] for other in found):
        wrong.append("rope_scaling and rope_parameters differ")
    return found[0]


def _rope_group(name: str, group: dict[str, Any], wrong: list[str]) -> dict[str, Any]:
    """Reads one group, with the meaning that Hugging Face gives to keys that are missing."""
    hints = get_type_hints(YarnConfig, include_extras=True)
    kind = group.get("rope_type", group.get("type", "default"))
    for key, value in group.items():
        if key in ROPE_ONLY and value not in ROPE_ONLY[key]:
            wrong.append(f"{name}.{key} is {value!r}, which is unknown to r1jax")
        elif key not in ROPE_KEYS | set(ROPE_ONLY) | (set(hints) if kind == "yarn" else set()):
            wrong.append(f"{name}.{key} is {value!r}, which is unknown to r1jax for rope type {kind!r}")
    if kind not in ("yarn", "default"):
        wrong.append(f"{name}.rope_type is {kind!r}, but it must be 'yarn' or 'default'")
    values: dict[str, Any] = {}
    if kind == "yarn":
        mscale, all_dim = group.get("mscale") or 0.0, group.get("mscale_all_dim") or 0.0
        if all_dim and not mscale:
            wrong.append(f"{name}.mscale is {group.get('mscale')!r}, but mscale_all_dim needs it")
        given = {"beta_fast": 32.0, "beta_slow": 1.0} | {k: v for k, v in group.items() if v is not None}
        # Without both, cosine and sine grow by the plain 0.1 ln(factor) + 1.
        given |= {"mscale": mscale, "mscale_all_dim": all_dim} if all_dim else {"mscale": 1.0, "mscale_all_dim": 0.0}
        for key, hint in hints.items():
            try:
                values[key] = fit(hint, given.get(key))
            except (ValueError, TypeError, OverflowError):
                told = f"is {given[key]!r}" if key in given else "is missing"
                wrong.append(f"{name}.{key} {told}, but it must be {wanted(hint)}")
    hint = get_type_hints(DecoderConfig, include_extras=True)["rope_theta"]
    try:
        theta = fit(hint, group["rope_theta"])
    except (ValueError, TypeError, OverflowError):
        theta = group["rope_theta"]
        wrong.append(
            "rope_theta is missing" if theta is None else f"rope_theta is {theta!r}, which is no {wanted(hint)}"
        )
    complete = values if len(values) == len(hints) else {}
    return {"rope_theta": theta, "rope_scaling": YarnConfig(**complete)}


def published_config(config: DecoderConfig, dtype: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Writes a decoder in Hugging Face's names.

    Args:
      config: The decoder.
      dtype: What its weights are stored in: float32, bfloat16 or float16.
      base: config.json that it was imported from, or a part of it; keys that r1jax does not use are kept. Without one
        the special tokens are those of bytes.

    Returns:
      Content of config.json, which `decoder_config` reads back as `config`.

    Raises:
      UserError: Hugging Face's model has no such decoder; names the fields.
    """
    kind = "deepseek_v3" if config.scoring_func == "sigmoid" else "deepseek_v2"
    if base is None:
        base = dict(zip(SPECIAL, (byte_level.BOS, byte_level.EOS, byte_level.PAD), strict=True))
    elif base.get("model_type", kind) != kind:
        base = {key: base[key] for key in SPECIAL if key in base}
    dtype_key = "torch_dtype" if "torch_dtype" in base else "dtype"
    values = {key: value for key, value in base.items() if key not in FOREIGN}
    values |= {f: getattr(config, f) for f in get_type_hints(DecoderConfig) if f not in RENAMED}
    if kind == "deepseek_v2" and config.rope_interleave:
        del values["rope_interleave"]  # not among its keys
    values |= {"num_key_value_heads": config.num_attention_heads, "model_type": kind, dtype_key: dtype}
    values["architectures"] = [f"Deepseek{kind[-2:].upper()}ForCausalLM"]
    if kind == "deepseek_v3":
        values |= {"n_group": config.n_group, "topk_group": config.topk_group}
        values["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    else:
        grouped = config.n_group > 1
        values["topk_method"] = "group_limited_greedy" if grouped else "greedy"
        if grouped or "n_group" not in values:
            values |= {"n_group": config.n_group, "topk_group": config.topk_group}
    rope = {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    if _rope(base, []) != rope:
        values = {key: value for key, value in values.items() if key not in ("rope_scaling", "rope_theta")}
        values["rope_parameters"] = _rope_parameters(config)
    values.setdefault("hidden_act", "silu")
    values.setdefault("tie_word_embeddings", False)
    yarn = config.rope_scaling
    values.setdefault("max_position_embeddings", int(yarn.factor * yarn.original_max_position_embeddings))
    back = decoder_config(values, "this decoder, in Hugging Face's names,")
    if yarn.factor == 1.0:  # then its other numbers mean nothing
        back = replace(back, rope_scaling=yarn)
    lost = [f for f in get_type_hints(DecoderConfig) if getattr(back, f) != getattr(config, f)]
    if lost:
        told = ", ".join(f"{name} {getattr(config, name)!r}" for name in lost)
        raise UserError(f"Hugging Face's {kind} has no place for {told}: export a decoder without it.")
    return values


def _rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """Rotary embedding in the new spelling."""
    if config.rope_scaling.factor == 1.0:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    named = {name: getattr(config.rope_scaling, name) for name in get_type_hints(YarnConfig)}
    return {"rope_type": "yarn", "rope_theta": config.rope_theta, **named}
