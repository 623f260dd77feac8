"""Every family of causal and encoder-decoder models that transformers has, made small."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

# By the names that families have for the same things.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "dim_model"], 16),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "dff"], 32
    ),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"], 1),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"], 2),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "dim_head", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "num_experts_per_tok"], 2),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim"], 4),
    **dict.fromkeys(["mamba_d_state", "mamba_d_head", "mamba_head_dim", "mamba_headdim", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_chunk_size", "chunk_size"], 4),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["dropout", "dropout_rate", "dropout_prob", "attention_dropout", "activation_dropout"], 0.0),
    **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "hidden_dropout_prob"], 0.0),
    **dict.fromkeys(["attention_probs_dropout_prob", "emb_pdrop", "resid_dropout", "embed_dropout"], 0.0),
    **dict.fromkeys(["encoder_layerdrop", "decoder_layerdrop", "layerdrop", "residual_dropout"], 0.0),
    **dict.fromkeys(["router_jitter_noise", "input_jitter_noise"], 0.0),
    "mamba_d_ssm": 32,
    "max_position_embeddings": 128,
}
# What does not go together otherwise, or is needed for layers of each kind; ``None`` leaves the family's own.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": None} for name in ("axk1", "deepseek_v3", "youtu", "glm4_moe_lite", "xlstm")},
    **{name: {"num_hidden_layers": 4} for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text")},
    **{name: {"num_hidden_layers": 8} for name in ("bailing_hybrid", "lfm3")},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "codegen": {"n_head": 4, "rotary_dim": 4, "n_embd": 32},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "prophetnet": {"num_hidden_layers": None},
    "xlnet": {"max_position_embeddings": None},
    **{
        name: {"is_decoder": True}
        for name in (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        )
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}


def small(model_type: str) -> dict[str, Any]:
    """Options with which a family is small."""
    default = AutoConfig.for_model(model_type)
    options = {"model_type": model_type, **sizes(default), **OPTIONS.get(model_type, {})}
    return {name: value for name, value in options.items() if value is not None}


def sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Those of the sizes that a configuration has."""
    kind = type(config)
    fixed = {*kind.attribute_map, *(name for name in dir(kind) if isinstance(getattr(kind, name), property))}
    own = [name for name, value in vars(config).items() if name in SIZES and isinstance(value, int | float)]
    return {name: SIZES[name] for name in own if name not in fixed}


# They read pictures or sound too, by parts that have sizes of their own.
LARGE = (
    *("blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_text", "gemma4_unified", "git"),
    "gemma4_assistant",
    *("got_ocr2", "llama4", "longcat_flash", "mllama", "moss_transcribe_diarize", "phi4_multimodal", "qwen3_5"),
    *("qwen3_5_moe", "audioflamingo3", "encoder-decoder", "glmasr", "granite_speech", "granite_speech_plus"),
    *("musicflamingo", "nemo_speechlm", "qwen2_audio", "qwen3_asr", "t5gemma", "t5gemma2", "vibevoice_asr", "voxtral"),
    "voxtral_realtime",
)
CAUSAL = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
ENCODER_DECODER = list(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
