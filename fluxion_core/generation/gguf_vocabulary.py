"""The vocabulary of a GGUF file as a tokenizer of the `tokenizers` library.

GGUF names the way in which text is cut before merging; the patterns behind the names are those of
the models' own tokenizer.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from fluxion_core.errors import ModelFileError, UnsupportedModelError
from fluxion_core.generation.chat_template_files import choose_template
from fluxion_core.generation.text_pieces import SPLIT_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2
from fluxion_core.generation.vocabulary import Vocabulary
from fluxion_core.gguf_index import CONTROL_TOKEN, USER_DEFINED_TOKEN, GgufFile, open_gguf


def read_gguf(path: Path) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
        ModelFileError: it is missing, malformed or contradicts itself.
        UnsupportedModelError: a kind of vocabulary that is not implemented.
    """
    file = open_gguf(path)
    backend = _read_backend(file)
    tokens = file.strings("tokenizer.ggml.tokens")
    bos = file.optional_integer("tokenizer.ggml.bos_token_id")
    eos = file.optional_integer("tokenizer.ggml.eos_token_id")
    for token_id in (bos, eos):
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelFileError(f"{path}: special token {token_id} of {len(tokens)} tokens")
    special = {
        "bos_token": tokens[bos] if bos is not None else "",
        "eos_token": tokens[eos] if eos is not None else "",
    }
    template = file.optional_text("tokenizer.chat_template")
    add_bos = file.optional("tokenizer.ggml.add_bos_token")
    if add_bos is None:
        # Files of Llama 3 do not say it.
        add_bos = file.optional("tokenizer.ggml.pre") == "llama-bpe"
    templates = {} if template is None else {"default": template}
    chosen, without = choose_template(templates, special)
    prefix = (bos,) if add_bos and bos is not None else ()
    ends = frozenset(file.end_token_ids())
    return Vocabulary(backend, chosen, without, bos, ends, prefix, ())


def _read_backend(file: GgufFile) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer.

    Raises:
        ModelFileError: vocabulary or merges are missing or contradict each other.
        UnsupportedModelError: another kind of vocabulary, or an unknown way of cutting.
    """
    kind = file.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModelError(
            f"{file.path}: vocabulary of kind {kind!r}; supported: gpt2 (byte-level BPE)"
        )
    tokens = file.strings("tokenizer.ggml.tokens")
    pairs = [tuple(merge.split(" ", 1)) for merge in file.strings("tokenizer.ggml.merges")]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelFileError(f"{file.path}: tokenizer.ggml.merges has an entry that is no pair")
    cutting = file.optional_text("tokenizer.ggml.pre") or "default"
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=cast(list[tuple[str, str]], pairs),
            # Llama 3 takes a known word whole, whatever the merges say.
            ignore_merges=cutting == "llama-bpe",
        )
    except Exception as error:
        # The library raises bare Exception for whatever is wrong.
        raise ModelFileError(f"{file.path}: vocabulary and merges do not fit: {error}") from None
    backend = tokenizers.Tokenizer(model)
    if cutting == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(cutting, file)
    backend.decoder = decoders.ByteLevel()
    types = file.optional("tokenizer.ggml.token_type")
    if isinstance(types, list) and len(types) == len(tokens):
        kinds = list(zip(tokens, types, strict=True))
        special = [token for token, kind in kinds if kind == CONTROL_TOKEN]
        user = [token for token, kind in kinds if kind == USER_DEFINED_TOKEN]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        backend.add_tokens([AddedToken(token, normalized=False) for token in user])
    return backend


def _pre_tokenizer(name: str, file: GgufFile) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging; `name` is llama.cpp's."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match name:
        case "smollm":
            cuts = [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
            return pre_tokenizers.Sequence(cuts)
        case "llama-bpe":
            pattern = SPLIT_LLAMA3
        case "qwen2":
            pattern = SPLIT_QWEN2
        case "gpt-2" | "default":
            pattern = SPLIT_GPT2
        case _:
            raise UnsupportedModelError(
                f"{file.path}: pre-tokenizer {name!r}; supported: smollm, llama-bpe, qwen2, gpt-2"
            )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])
