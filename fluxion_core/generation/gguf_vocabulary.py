"""The vocabulary of a GGUF file, as llama.cpp reads it: a tokenizer of the `tokenizers` library."""

from __future__ import annotations

import logging
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.generation.chat_template_files import choose_template
from fluxion_core.generation.gguf_entries import CHAT_TEMPLATE, GGUF_TOKENIZER, PREFIX
from fluxion_core.generation.gguf_pre_tokenization import PreTokenization, read_pre_tokenization
from fluxion_core.generation.vocabulary import Vocabulary
from fluxion_core.models.gguf_end_tokens import (
    UNKNOWN_TOKEN,
    USER_DEFINED_TOKEN,
    read_end_tokens,
    special_token_id,
    token_types,
)
from fluxion_core.models.gguf_index import GgufFile, open_gguf
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
# What templates call them, and what GGUF does.
_TEMPLATE_TOKENS = {
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "mask_token": "mask",
}


def read_gguf(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
        ModelFileError: it is missing, malformed or contradicts itself.
        UnsupportedModelError: a kind of vocabulary, or an entry, that is not implemented.
    """
    file = open_gguf(path)
    entries = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith(PREFIX) and not key.startswith(f"{CHAT_TEMPLATE}.")
    }
    GGUF_TOKENIZER.check(entries, path, prefix=PREFIX)
    pre_tokenization = read_pre_tokenization(file)
    ends = read_end_tokens(file)
    if ends.by_text:
        words = ", ".join(ends.by_text[:8])
        _log.warning(event("tokens taken for control tokens by text", file=path, tokens=words))
    tokens = file.strings("tokenizer.ggml.tokens")
    bos, eos = special_token_id(file, "bos"), special_token_id(file, "eos")
    named = {
        "bos_token": tokens[bos] if bos is not None else "",
        "eos_token": tokens[eos] if eos is not None else "",
    }
    for name, key in _TEMPLATE_TOKENS.items():
        if (token_id := special_token_id(file, key)) is not None:
            named[name] = tokens[token_id]
    prefix = _added(file, "bos", bos, default=pre_tokenization.begins_with_bos)
    # Written out at the beginning of a prompt, it must be recognised whatever its type.
    backend = _read_backend(file, pre_tokenization, ends.control_ids | {*prefix})
    # In llama.cpp a conversation begins with that token once, whatever its template writes.
    begins_with = named["bos_token"] if prefix else ""
    chosen, without = choose_template(_templates(file), named, begins_with=begins_with)
    suffix = _added(file, "eos", eos, default=False)
    return Vocabulary(
        backend, chosen, without, bos, ends.end_ids, prefix, suffix, stored_size=len(tokens)
    )


def _read_backend(
    file: GgufFile, pre_tokenization: PreTokenization, control_ids: frozenset[int]
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer."""
    kind = file.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModelError(
            f"{file.path}: vocabulary of kind {kind!r}; supported: gpt2 (byte-level BPE)"
        )
    texts = file.strings("tokenizer.ggml.tokens")
    # A text of its own for each token without one: nothing is written so.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(texts)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ModelFileError(f"{file.path}: token {twice!r:.60} comes twice in the vocabulary")
    pairs = [_pair(merge, file) for merge in file.strings("tokenizer.ggml.merges")]
    try:
        model = models.BPE(
            vocab=vocabulary, merges=pairs, ignore_merges=pre_tokenization.ignores_merges
        )
    except Exception as error:
        # The library raises bare Exception for whatever is wrong.
        raise ModelFileError(f"{file.path}: vocabulary and merges do not fit: {error}") from None
    backend = tokenizers.Tokenizer(model)
    if pre_tokenization.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenization.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    types = token_types(file)
    special = [
        token
        for index, token in enumerate(tokens)
        if index in control_ids or types[index] == UNKNOWN_TOKEN
    ]
    known = set(special)
    user = [
        token
        for token, kind in zip(tokens, types, strict=True)
        if kind == USER_DEFINED_TOKEN and token not in known
    ]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in user])
    return backend


def _pair(merge: str, file: GgufFile) -> tuple[str, str]:
    # A first token may be a space.
    at = merge.find(" ", 1)
    if at < 0:
        raise ModelFileError(f"{file.path}: tokenizer.ggml.merges has an entry that is no pair")
    return merge[:at], merge[at + 1 :]


def _templates(file: GgufFile) -> dict[str, str]:
    """By name, as the file gives them."""
    templates = {
        key.removeprefix(f"{CHAT_TEMPLATE}."): file.text(key)
        for key in file.metadata
        if key.startswith(f"{CHAT_TEMPLATE}.")
    }
    default = file.optional_text(CHAT_TEMPLATE)
    return templates if default is None else {**templates, "default": default}


def _added(file: GgufFile, name: str, token_id: int | None, *, default: bool) -> tuple[int, ...]:
    """The token that every text has at its beginning or end, if any."""
    said = file.optional_flag(f"tokenizer.ggml.add_{name}_token")
    if not (default if said is None else said):
        return ()
    if token_id is None:
        raise ModelFileError(
            f"{file.path}: texts have a {name} token, but tokenizer.ggml.{name}_token_id is missing"
        )
    return (token_id,)
