"""Entries of tokenizer_config.json: which are read, which mean nothing here, which are refused."""

from __future__ import annotations

from fluxion_core.models.entry_rules import EntryRules, Restriction

NAMED_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
"""The special tokens that every tokenizer may name; others end in `_token` too."""

TOKENIZER_CONFIG = EntryRules(
    read=frozenset(
        (
            *NAMED_TOKENS,
            *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
            *("chat_template", "split_special_tokens", "add_bos_token", "add_eos_token"),
            *("model_max_length", "max_len", "clean_up_tokenization_spaces"),
            *("model_specific_special_tokens", "tokenizer_class", "legacy", "add_prefix_space"),
        )
    ),
    harmless=frozenset(
        (
            # Names of classes and files: what they made is in tokenizer.json.
            *("processor_class", "name_or_path", "_name_or_path", "backend"),
            *("special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"),
            *("is_local", "local_files_only", "init_inputs", "trust_remote_code", "_commit_hash"),
            # Batches are not padded or truncated here; a too long prompt is refused.
            *("padding_side", "padding", "pad_token_type_id", "pad_to_multiple_of"),
            *("truncation_side", "truncation", "truncation_strategy", "max_length", "stride"),
            *("model_input_names", "return_token_type_ids"),
            # Of the conversion into tokenizer.json, which has happened.
            *("use_default_system_prompt", "sp_model_kwargs"),
            *("spaces_between_special_tokens", "errors", "from_slow", "use_fast", "do_lower_case"),
            # Of programs around the tokenizer.
            *(
                "verbose",
                "device_map",
                "response_template",
                "response_schema",
                "chat_control_tokens",
            ),
            "transformers_version",
        )
    ),
    restricted={
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": Restriction(
            (False,), "taking spaces out of the answers"
        ),
        "auto_map": Restriction(({},), "code that comes with the model"),
        "fast_tokenizer_files": Restriction(
            ([], ["tokenizer.json"]), "a tokenizer.json that depends on a program's version"
        ),
        "fix_mistral_regex": Restriction((False,), "another pre-tokenizer than tokenizer.json's"),
    },
)
