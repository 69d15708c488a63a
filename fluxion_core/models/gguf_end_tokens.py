"""Tokens of a GGUF file that end a text, and those that are control tokens whatever their type.

Files name one end, or none; models have two or three. llama.cpp therefore goes by tokens' texts,
and takes for control tokens what bad conversions typed otherwise, or not at all. So do we.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fluxion_core.errors import ModelFileError
from fluxion_core.models.gguf_index import GgufFile

NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN = 1, 2, 3, 4
_KEY = "tokenizer.ggml.{}_token_id"

_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>"),
        *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *(
            "<|return|>",
            "<|call|>",
            "<|calls|>",
            "<|flush|>",
            "<\uff5cend\u2581of\u2581sentence\uff5c>",
        ),
    )
)
# Ends of few models, and words like any other in the vocabularies of the rest.
_ENDS_IF_CONTROL = frozenset(("</s>", "<eos>", "<turn|>", "<|tool_response>", "[e~["))
# Filling in the middle: where one of these begins, the part that was asked for is over.
_FILL_ENDS = {
    "fim_pad": frozenset(("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    "fim_rep": frozenset(("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    "fim_sep": frozenset(("<|file_sep|>",)),
}
_FILL_MARKS = {
    "fim_pre": frozenset(
        (
            *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "▁<PRE>"),
            *("<\uff5cfim\u2581begin\uff5c>", "<|code_prefix|>", "<|prefix|>"),
        )
    ),
    "fim_suf": frozenset(
        (
            *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "▁<SUF>"),
            *("<\uff5cfim\u2581hole\uff5c>", "<|code_suffix|>", "<|suffix|>"),
        )
    ),
    "fim_mid": frozenset(
        (
            *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "▁<MID>"),
            *("<\uff5cfim\u2581end\uff5c>", "<|code_middle|>", "<|middle|>"),
        )
    ),
}


@dataclass(frozen=True)
class EndTokens:
    """Tokens that end a text, by what texts and entries of a file say together."""

    end_ids: frozenset[int]
    control_ids: frozenset[int]
    """Control tokens, by type or by text."""
    by_text: tuple[str, ...]
    """Those whose type says otherwise."""


def read_end_tokens(file: GgufFile) -> EndTokens:
    """Ends of text and control tokens of a file; none of a file without a vocabulary.

    Raises:
        ModelFileError: an entry names a token that is not there, or types are not those of tokens.
    """
    if file.optional("tokenizer.ggml.tokens") is None:
        named = (file.optional_integer(_KEY.format(name)) for name in ("eos", "eot", "eom"))
        return EndTokens(frozenset(each for each in named if each is not None), frozenset(), ())
    tokens, types = file.strings("tokenizer.ggml.tokens"), token_types(file)
    given = {name: special_token_id(file, name) for name in ("eos", "eot", "eom", *_FILL_ENDS)}
    ends = {each for each in given.values() if each is not None}
    control = {index for index, kind in enumerate(types) if kind == CONTROL_TOKEN}
    marked = control | {index for index, kind in enumerate(types) if kind == USER_DEFINED_TOKEN}
    looking: set[int] = set()
    by_text = {text: index for index, text in enumerate(tokens)}
    for text in _ENDS & by_text.keys():
        looking.add(by_text[text])
    ends |= looking
    ends |= {by_text[text] for text in _ENDS_IF_CONTROL & by_text.keys()} & control
    for name, texts in (_FILL_ENDS | _FILL_MARKS).items():
        # The file's own word counts more than the text.
        if special_token_id(file, name) is None:
            found = {by_text[text] for text in texts & by_text.keys()}
            # llama.cpp takes one of several: no plain word, where there is a marked one.
            found = found & marked or found
            looking |= found
            ends |= found if name in _FILL_ENDS else set()
    ends -= _not_ends(by_text)
    overridden = tuple(tokens[index] for index in sorted(looking - control))
    return EndTokens(frozenset(ends), frozenset(control | looking), overridden)


def token_types(file: GgufFile) -> list[int]:
    """The type of every token; all are normal where the file does not say."""
    tokens, types = (
        file.strings("tokenizer.ggml.tokens"),
        file.optional("tokenizer.ggml.token_type"),
    )
    if types is None:
        return [NORMAL_TOKEN] * len(tokens)
    if (
        not isinstance(types, list)
        or len(types) < len(tokens)
        or not all(type(kind) is int for kind in types)
    ):
        raise ModelFileError(
            f"{file.path}: tokenizer.ggml.token_type must have an integer for each of "
            f"{len(tokens)} tokens"
        )
    return types[: len(tokens)]


def special_token_id(file: GgufFile, name: str) -> int | None:
    """The token that the file names as bos, eos and so on, or None.

    Raises:
        ModelFileError: there is no such token.
    """
    token_id = file.optional_integer(_KEY.format(name))
    # The list itself has been looked at by whoever asks.
    num_tokens = len(cast(list[str], file.optional("tokenizer.ggml.tokens")))
    if token_id is not None and not 0 <= token_id < num_tokens:
        raise ModelFileError(
            f"{file.path}: {_KEY.format(name)}: special token {token_id} of {num_tokens} tokens"
        )
    return token_id


def _not_ends(by_text: dict[str, int]) -> set[int]:
    """In formats with channels, `<|end|>` ends a part of the answer; with tools, `</s>` nothing."""
    texts = by_text.keys()
    is_channelled = {"<|return|>", "<|call|>"} <= texts or (
        "<|flush|>" in texts and not texts.isdisjoint(("<|call|>", "<|calls|>"))
    )
    not_ends = {"<|end|>"} if is_channelled else set()
    not_ends |= {"</s>"} if "<|tool_response>" in texts else set()
    return {by_text[text] for text in not_ends & texts}
