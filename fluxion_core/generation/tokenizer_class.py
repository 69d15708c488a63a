"""Meaning of `tokenizer_class` beside tokenizer.json: names of tokens, and spaces at the beginning.

transformers builds the tokenizers of some classes anew from vocabulary, merges and a few entries of
tokenizer_config.json. For Llama's SentencePiece vocabularies so do we, because their tokenizer.json
is often of an older time. Of the byte-level classes, tokenizer.json says how the model's makers cut
text; only that it contradicts the config about a space before every text is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, pre_tokenizers

from fluxion_core.errors import ModelFileError
from fluxion_core.models.json_files import flag

_LLAMA = "LlamaTokenizer"
_END = "<|endoftext|>"
# What a class calls its tokens where no file does.
_NAMES: dict[str, dict[str, str]] = {
    _LLAMA: {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
}
_SPACE = "▁"


def class_of(config: Mapping[str, object], model_config: Mapping[str, object]) -> str:
    """The class by its plain name; empty where none is named that means anything here."""
    named = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    name = named.removesuffix("Fast") if isinstance(named, str) else ""
    if name != _LLAMA and model_config.get("model_type") == "qwen2":
        return "Qwen2Tokenizer"
    return name if name in _NAMES else ""


def default_names(name: str, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Special tokens of a class by name, as far as the vocabulary has them."""
    names = _NAMES.get(name, {})
    return {key: text for key, text in names.items() if backend.token_to_id(text) is not None}


def apply_class(
    name: str, backend: tokenizers.Tokenizer, config: Mapping[str, object], path: Path
) -> None:
    """Make a backend what its class is in transformers.

    Args:
        name: from `class_of`.
        backend: of tokenizer.json; changed for Llama's SentencePiece vocabularies.
        config: entries of tokenizer_config.json.
        path: of tokenizer_config.json.

    Raises:
        ModelFileError: the two files contradict each other.
    """
    is_byte_level = "ByteLevel" in _kinds(backend)
    if name == _LLAMA and not is_byte_level:
        _rebuild(backend, config, path)
    elif name not in ("", _LLAMA):
        wanted = flag(config, "add_prefix_space", path, default=False)
        found = '"add_prefix_space":true' in _state(backend.pre_tokenizer)
        if is_byte_level and wanted != found:
            raise ModelFileError(
                f"{path}: add_prefix_space is {wanted} for {name}, and {found} in tokenizer.json; "
                f"make them agree"
            )


def _rebuild(backend: tokenizers.Tokenizer, config: Mapping[str, object], path: Path) -> None:
    if not isinstance(backend.model, tokenizers.models.BPE):
        return
    has_space = flag(config, "add_prefix_space", path, default=True)
    # The older way puts one before the text after every special token too.
    scheme = "always" if flag(config, "legacy", path, default=False) else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme=scheme if has_space else "never", split=False
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_space:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)


def _kinds(backend: tokenizers.Tokenizer) -> str:
    return _state(backend.pre_tokenizer) + _state(backend.decoder)


def _state(part: pre_tokenizers.PreTokenizer | decoders.Decoder | None) -> str:
    """What the library writes of a part into a file, without spaces."""
    if part is None:
        return ""
    return json.dumps(json.loads(part.__getstate__()), separators=(",", ":"))
