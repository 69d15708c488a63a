"""Pre-tokenization: how a GGUF file's text is split before merging, by llama.cpp's names for it.

The patterns behind the names are those of the models' own tokenizer.json. A file without a name is
cut in llama.cpp's default way, which is no model's: that is said in the log.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from fluxion_core.errors import UnsupportedModelError
from fluxion_core.generation.text_pieces import (
    SPLIT_GPT2,
    SPLIT_LLAMA3,
    SPLIT_MARKS,
    SPLIT_NUMBER,
    SPLIT_NUMBERS,
    SPLIT_QWEN2,
    SPLIT_TEKKEN,
    SPLIT_THREE_DIGITS,
)
from fluxion_core.models.gguf_index import GgufFile
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
_KEY = "tokenizer.ggml.pre"
_FALLBACK = (SPLIT_MARKS, SPLIT_GPT2, SPLIT_NUMBERS, SPLIT_THREE_DIGITS)


@dataclass(frozen=True)
class PreTokenization:
    """The way in which text is split into words before merging."""

    patterns: tuple[str, ...]
    """Each cuts further what those before it have left."""
    ignores_merges: bool = False
    """Takes a known word whole, whatever the merges say."""
    begins_with_bos: bool = False
    """Unless the file says otherwise."""
    composes: bool = False
    """Brings the text into Unicode's form C first."""

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """All cuts, and bytes as characters after them."""
        splits = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, bytes_])


_LLAMA3 = PreTokenization((SPLIT_LLAMA3,), ignores_merges=True, begins_with_bos=True)
_QWEN2 = PreTokenization((SPLIT_QWEN2,), composes=True)
PRE_TOKENIZATIONS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenization((SPLIT_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "minerva-7b"),
        PreTokenization((SPLIT_NUMBER, SPLIT_GPT2)),
    ),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum"), PreTokenization((SPLIT_GPT2,))
    ),
    "tekken": PreTokenization((SPLIT_TEKKEN,), ignores_merges=True, begins_with_bos=True),
    "default": PreTokenization(_FALLBACK),
}


def read_pre_tokenization(file: GgufFile) -> PreTokenization:
    """The pre-tokenization that this file names.

    Raises:
        UnsupportedModelError: a name that is not known.
    """
    name = file.optional_text(_KEY)
    if not name:
        _log.warning(
            event(
                "no pre-tokenizer is named: text is cut in llama.cpp's default way, and answers "
                "are worse; convert the model again",
                file=file.path,
                missing=_KEY,
            )
        )
        return PRE_TOKENIZATIONS["default"]
    if name not in PRE_TOKENIZATIONS:
        raise UnsupportedModelError(
            f"{file.path}: pre-tokenizer {name!r}; supported: {', '.join(PRE_TOKENIZATIONS)}"
        )
    return PRE_TOKENIZATIONS[name]
