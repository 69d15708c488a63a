"""A tokenizer as the files of a model directory, for programs that read those.

Also of a GGUF file's tokenizer, which has none of its own.
"""

from __future__ import annotations

import io
import json
import zipfile

from fluxion_core.generation.tokenizer import Tokenizer

_SAME_TIME = (1980, 1, 1, 0, 0, 0)
"""Of every file in an archive: the same tokenizer makes the same bytes."""


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Contents of tokenizer.json, tokenizer_config.json and generation_config.json by name."""
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": tokenizer.splits_special_tokens,
    }
    if (template := tokenizer.chat_template) is not None:
        config |= {name: text for name, text in template.special_tokens.items() if text}
        config["chat_template"] = template.portable_source
    return {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False),
        "generation_config.json": json.dumps({"eos_token_id": sorted(tokenizer.eos_token_ids)}),
    }


def tokenizer_archive(tokenizer: Tokenizer) -> bytes:
    """A tokenizer's files as one ZIP archive. Takes a while; call it off the event loop."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in tokenizer_files(tokenizer).items():
            entry = zipfile.ZipInfo(name, _SAME_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return buffer.getvalue()
