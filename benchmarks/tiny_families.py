"""A tiny model of every type of causal language model that transformers has: its class, narrow.

What a type's configuration calls its sizes is looked up in one table of small values; a few types
need values of their own to be valid.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB = 61
_MOST = 20_000_000  # parameters of a model that counts as tiny
LAYERS = 4

# fmt: off
_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "lru_width", "backbone_hidden_size",
    "attention_hidden_size", "embedding_size", "embedding_dim", "input_embedding_size",
    "output_embedding_size", "word_embed_proj_dim", "d_ssm")
_WIDER = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff",
    "ffn_hidden_size", "intermediate_size_mlp", "d_inner", "feed_forward_size",
    "dense_intermediate_size")
_NARROW = ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size",
    "expert_ffn_hidden_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "router_hidden_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
    "encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks", "max_window_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads",
    "decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads",
    "num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_value_heads",
    "linear_num_heads", "mamba_n_heads", "mamba_num_heads", "index_n_heads")
_TWO = ("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "swa_num_key_value_heads",
    "moe_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token", "num_query_groups")
_FOUR = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "rotary_dim",
    "qk_rope_head_dim")
_EIGHT = ("head_dim", "kv_channels", "d_head", "dim_head", "attention_head_dim",
    "qk_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim",
    "attention_head_size", "swa_head_dim", "index_head_dim", "mamba_head_dim", "mamba_headdim",
    "query_pre_attn_scalar", "sliding_window", "sliding_window_size", "attention_window_size",
    "local_attention", "window_size", "local_attention_window_len", "attention_chunk_size",
    "state_size", "mamba_d_state", "ssm_state_size", "d_rel", "rel_extent",
    "hidden_size_per_layer_input", "mamba_chunk_size", "chunk_size", "block_size")
_ONE = ("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts",
    "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "mamba_n_groups",
    "n_groups", "mamba_ngroups", "type_vocab_size", "mem_len")
_SIZES: dict[str, int] = {
    **dict.fromkeys(_WIDTH, 32), **dict.fromkeys(_WIDER, 48), **dict.fromkeys(_NARROW, 16),
    **dict.fromkeys(_LAYERS, LAYERS), **dict.fromkeys(_HEADS, 4), **dict.fromkeys(_TWO, 2),
    **dict.fromkeys(_FOUR, 4), **dict.fromkeys(_EIGHT, 8), **dict.fromkeys(_ONE, 1),
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "decoder_vocab_size": VOCAB,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "max_target_positions": 64, "context_length": 64, "model_max_length": 64,
    "original_max_position_embeddings": 64, "qk_nope_head_dim": 4, "v_head_dim": 6,
    "mamba_expand": 2, "mamba_d_head": 16, "mamba_d_ssm": 64, "num_kv_shared_layers": 2,
    "pronunciation_vocab_size": 9, "shape_vocab_size": 9, "pronunciation_embed_dim": 8,
    "shape_embed_dim": 8, "max_source_positions": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
_VISION_SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_ATTENTION = ["linear_attention", "hybrid"] * 2
# What a type needs besides, or instead.
_OWN: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4} for kind in ("axk2", "deepseek_v32", "dots3_note_text",
        "glm_moe_dsa", "minicpm3")},
    **{kind: {"num_key_value_heads": 4, "head_dim": 4} for kind in ("axk1", "deepseek_v2",
        "deepseek_v3", "glm4_moe_lite", "longcat_flash", "mistral4", "mistral_large4", "youtu")},
    **{kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
        "mrope_section": [1, 1, 2]}} for kind in ("glm46v", "glm4v", "glmga", "paddleocr_vl",
        "qwen2_5_omni_thinker", "qwen2_5_vl")},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "cohere_compass_text": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    **{kind: {"layer_types": ["sliding_attention", "full_attention"] * 2} for kind in ("gemma4",
        "gemma4_text", "gemma4_unified", "gemma4_unified_text")},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16),
        "attn_layers": ("local", "lsh") * 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _ATTENTION, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": _ATTENTION, "attention_hidden_size": 64,
        "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on


def causal_types() -> list[str]:
    """The types of configuration that ``AutoModelForCausalLM`` takes, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_types() -> list[str]:
    """Further types, of images and text, of which a text alone is asked for here."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(kind for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if kind not in known)


def auto_class(config: Any) -> Any:
    """What opens a configuration of either."""
    known = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if known and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def tiny_config(kind: str, **more: Any) -> Any:
    """The configuration of a type with small sizes, and with ``more`` of its fields set.

    Raises:
        Exception: whatever a configuration class raises for values that are not valid together.
    """
    made = cast(Any, CONFIG_MAPPING)[kind]
    given = _small(made, kind)
    for name, inner in vars(made()).items():
        if isinstance(inner, transformers.PreTrainedConfig):
            given[name] = _small(type(inner), kind) | (_VISION_SIZES if "vision" in name else {})
    return made(**given | more)


def tiny_model(config: Any, seed: int = 0) -> nn.Module:
    """The model of a configuration, with weights that are far from their initial values: so norms
    are no identities, and biases are not zero."""
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
    if size > _MOST:
        raise ValueError(f"{size:,} parameters, too many for this machine")
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return cast(nn.Module, model.eval())


def _small(made: Any, kind: str) -> dict[str, Any]:
    own = _OWN.get(kind, {})
    fields = vars(made())
    sizes = {name: size for name, size in _SIZES.items() if name in fields}
    # Tokens that stand for images and sounds: none of them is among the examples.
    sizes |= {n: VOCAB - 2 for n, v in fields.items() if _beyond(n, v)}
    return sizes | {n: v for n, v in own.items() if n in fields or n == "default_language"}


def _beyond(name: str, value: Any) -> bool:
    special = name.endswith(("token_id", "token_index")) and isinstance(value, int)
    other = any(kind in name for kind in ("image", "video", "audio"))
    return special and name not in _SIZES and (other or value >= VOCAB)
