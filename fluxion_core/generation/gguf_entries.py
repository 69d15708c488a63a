"""Entries of a GGUF file that are about its text: all keys that begin with `tokenizer.`"""

from __future__ import annotations

from fluxion_core.models.entry_rules import EntryRules, Restriction

PREFIX = "tokenizer."
CHAT_TEMPLATE = "tokenizer.chat_template"

GGUF_TOKENIZER = EntryRules(
    read=frozenset(
        (
            *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.merges", "ggml.token_type"),
            *("ggml.add_bos_token", "ggml.add_eos_token", "chat_template", "chat_templates"),
            *(
                f"ggml.{name}_token_id"
                for name in (
                    *("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask"),
                    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
                )
            ),
        )
    ),
    harmless=frozenset(
        (
            # Of other vocabularies than byte-level BPE: llama.cpp does not look at them here.
            *("ggml.scores", "ggml.token_type_count", "ggml.remove_extra_whitespaces"),
            *("ggml.add_sep_token", "ggml.cls_token_id", "ggml.precompiled_charsmap"),
            # Old names of marks for filling in the middle.
            *("ggml.prefix_token_id", "ggml.suffix_token_id", "ggml.middle_token_id"),
            # The same vocabulary in another form.
            "huggingface.json",
        )
    ),
    restricted={
        "ggml.add_space_prefix": Restriction((False,), "a space before every text"),
        "ggml.suppress_tokens": Restriction(([],), "tokens that are forbidden"),
        "ggml.normalizer.lowercase": Restriction((False,), "a normaliser"),
        "ggml.normalizer.strip_accents": Restriction((False,), "a normaliser"),
        "rwkv.world": Restriction((), "another kind of vocabulary"),
    },
)
