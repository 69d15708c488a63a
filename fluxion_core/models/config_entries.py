"""Entries of config.json and generation_config.json: read, meaningless here, or refused by name."""

from __future__ import annotations

from fluxion_core.models.entry_rules import EntryRules, Restriction

_NO: tuple[object, ...] = (False, 0)
_NONE_GIVEN: tuple[object, ...] = ([], {}, "")

# What a request says of sampling is what counts; a model's suggestions are named in the log.
SAMPLING_SUGGESTIONS = frozenset(
    (
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "no_repeat_ngram_size", "length_penalty", "diversity_penalty"),
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "renormalize_logits"),
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "seed"),
    )
)
_OF_A_PROGRAM = frozenset(
    (
        # Which program wrote the file, from what, and how it runs models.
        *("transformers_version", "transformers.js_config", "_name_or_path", "name_or_path"),
        *("_commit_hash", "_from_model_config", "unsloth_version", "unsloth_fixed", "model_name"),
        *("use_cache", "cache_implementation", "cache_config", "return_legacy_cache"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict", "return_dict_in_generate", "torchscript", "num_return_sequences"),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
        *("_flash_attn_2_enabled", "use_flash_attn", "use_bfloat16", "remove_invalid_values"),
        *("disable_compile", "compile_config", "low_memory", "prefill_chunk_size"),
        "_experts_implementation",
    )
)
_LAYERS_DIFFER = "layers that differ from each other"
_WINDOW = "attention over a window"
_EXPERTS = "a mixture of experts"
_SCALED = "hidden states, scores or logits multiplied by a factor"
_CAPPED = "capped scores or logits"
_NORMED = "normalised queries and keys"
_BIASED = "scores that depend on distance"
_PARALLEL = "attention and feed-forward beside each other"

MODEL_CONFIG = EntryRules(
    read=frozenset(
        (
            *("architectures", "model_type", "hidden_act", "vocab_size", "hidden_size"),
            *("intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
            *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
            *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
            *("original_max_position_embeddings", "tie_word_embeddings"),
            *("attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "layer_types"),
            *("use_sliding_window", "sliding_window", "max_window_layers"),
        )
    ),
    harmless=frozenset(
        (
            *_OF_A_PROGRAM,
            # As old models have them here; transformers ignores them in this place.
            *SAMPLING_SUGGESTIONS,
            *("num_beams", "num_beam_groups", "early_stopping", "bad_words_ids"),
            *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
            *("begin_suppress_tokens", "exponential_decay_length_penalty"),
            # Training.
            *("initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop"),
            *("embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "gradient_checkpointing"),
            *("attention_probs_dropout_prob", "router_aux_loss_coef", "max_sequence_length"),
            # How weights are stored and split: the files themselves say it, settings choose it.
            *("dtype", "torch_dtype", "pretraining_tp", "tensor_parallel"),
            # Tasks that are not served.
            *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
            *("task_specific_params", "tokenizer_class", "prefix", "decoder_start_token_id"),
            *("sep_token_id", "pad_token_id", "unk_token_id", "cls_token_id", "tf_legacy_loss"),
            *("chunk_size_feed_forward", "is_decoder", "tie_last_hidden_states"),
        )
    ),
    restricted={
        "quantization_config": Restriction(
            _NONE_GIVEN, "a quantised model in safetensors (use GGUF for that); it"
        ),
        "auto_map": Restriction(_NONE_GIVEN, "code that comes with the model"),
        "compression_config": Restriction(
            _NONE_GIVEN, "a compressed model (use GGUF for that); it"
        ),
        "per_layer_config": Restriction(_NONE_GIVEN, _LAYERS_DIFFER),
        "block_configs": Restriction(_NONE_GIVEN, _LAYERS_DIFFER),
        "pruned_heads": Restriction(_NONE_GIVEN, "heads taken out of the model"),
        "is_encoder_decoder": Restriction(_NO, "an encoder"),
        "add_cross_attention": Restriction(_NO, "attention to another sequence"),
        "cross_attention_hidden_size": Restriction(_NO, "attention to another sequence"),
        "tie_encoder_decoder": Restriction(_NO, "an encoder"),
        "is_causal": Restriction((True,), "attention to what follows"),
        "use_bidirectional_attention": Restriction(_NO, "attention to what follows"),
        "attention_chunk_size": Restriction(_NO, _WINDOW),
        "interleaved_sliding_window": Restriction((*_NONE_GIVEN, *_NO), _WINDOW),
        "sliding_window_pattern": Restriction(_NO, _WINDOW),
        "num_experts": Restriction((*_NO, 1), _EXPERTS),
        "num_local_experts": Restriction((*_NO, 1), _EXPERTS),
        "n_routed_experts": Restriction(_NO, _EXPERTS),
        "embedding_multiplier": Restriction((1,), _SCALED),
        "residual_multiplier": Restriction((1,), _SCALED),
        "attention_multiplier": Restriction((), _SCALED),
        "attn_scale": Restriction((), _SCALED),
        "query_pre_attn_scalar": Restriction((), _SCALED),
        "logits_scaling": Restriction((1,), _SCALED),
        "logit_scale": Restriction((1,), _SCALED),
        "scale_emb": Restriction((1,), _SCALED),
        "scale_depth": Restriction((), _SCALED),
        "dim_model_base": Restriction((), _SCALED),
        "scale_attn_weights": Restriction((True,), _SCALED),
        "scale_attn_by_inverse_layer_idx": Restriction(_NO, _SCALED),
        "attn_temperature_tuning": Restriction(_NO, _SCALED),
        "attn_logit_softcapping": Restriction(_NO, _CAPPED),
        "final_logit_softcapping": Restriction(_NO, _CAPPED),
        "clip_qkv": Restriction(_NO, _CAPPED),
        "use_qk_norm": Restriction(_NO, _NORMED),
        "qk_norm": Restriction(_NO, _NORMED),
        "qk_layernorm": Restriction(_NO, _NORMED),
        "alibi": Restriction(_NO, _BIASED),
        "use_alibi": Restriction(_NO, _BIASED),
        "position_embedding_type": Restriction(("absolute", "rope", "rotary"), _BIASED),
        "parallel_attn": Restriction(_NO, _PARALLEL),
        "use_parallel_residual": Restriction(_NO, _PARALLEL),
        "no_rope_layers": Restriction(_NONE_GIVEN, "layers without positions"),
        "no_rope_layer_interval": Restriction(_NO, "layers without positions"),
        "rotary_pct": Restriction((1,), "a rotary embedding over a part of the channels"),
        "rope_interleaved": Restriction(_NO, "rotary pairs beside each other"),
        "use_mrope": Restriction(_NO, "positions of pictures"),
        "num_nextn_predict_layers": Restriction(_NO, "layers that predict several tokens"),
        "kv_lora_rank": Restriction(_NO, "compressed keys and values"),
        "vision_config": Restriction(_NONE_GIVEN, "pictures"),
        "audio_config": Restriction(_NONE_GIVEN, "sound"),
        "text_config": Restriction(_NONE_GIVEN, "a model within a model"),
    },
)

_FORBIDS = "tokens that are forbidden, forced or preferred"
_BEAMS = "a search over several answers"
_ENDS = "another end than a token"

GENERATION_CONFIG = EntryRules(
    read=frozenset(("eos_token_id", "bos_token_id", *SAMPLING_SUGGESTIONS)),
    harmless=frozenset(
        (
            *_OF_A_PROGRAM,
            *("pad_token_id", "unk_token_id", "decoder_start_token_id", "early_stopping"),
            *("assistant_confidence_threshold", "assistant_early_exit", "num_assistant_tokens"),
            *("num_assistant_tokens_schedule", "assistant_lookbehind", "target_lookbehind"),
            *("max_matching_ngram_size", "prompt_lookup_num_tokens", "is_assistant"),
            *("chat_format", "max_window_size", "generation_kwargs", "use_model_defaults"),
        )
    ),
    restricted={
        "num_beams": Restriction((1, 0), _BEAMS),
        "num_beam_groups": Restriction((1, 0), _BEAMS),
        "penalty_alpha": Restriction((0,), _BEAMS),
        "dola_layers": Restriction(_NONE_GIVEN, _BEAMS),
        "guidance_scale": Restriction((1, 0), _BEAMS),
        "bad_words_ids": Restriction(_NONE_GIVEN, _FORBIDS),
        "force_words_ids": Restriction(_NONE_GIVEN, _FORBIDS),
        "constraints": Restriction(_NONE_GIVEN, _FORBIDS),
        "forced_bos_token_id": Restriction((), _FORBIDS),
        "forced_eos_token_id": Restriction((), _FORBIDS),
        "forced_decoder_ids": Restriction(_NONE_GIVEN, _FORBIDS),
        "suppress_tokens": Restriction(_NONE_GIVEN, _FORBIDS),
        "begin_suppress_tokens": Restriction(_NONE_GIVEN, _FORBIDS),
        "sequence_bias": Restriction(_NONE_GIVEN, _FORBIDS),
        "watermarking_config": Restriction(_NONE_GIVEN, _FORBIDS),
        "token_healing": Restriction(_NO, "a prompt whose end is written anew"),
        "stop_strings": Restriction(_NONE_GIVEN, _ENDS),
        "exponential_decay_length_penalty": Restriction(_NONE_GIVEN, _ENDS),
    },
)

# What a suggestion is when it suggests nothing: defaults of the program that wrote the file.
NO_SUGGESTION: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(SAMPLING_SUGGESTIONS, (None, 0, False, 1)),
    "top_k": (None, 0, 50),
    "max_length": (None, 20),
}
