"""Text to token ids and back, from tokenizer.json or from a GGUF file's own vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from fluxion_core.errors import (
    InvalidRequestError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from fluxion_core.generation.chat import ChatMessage, ChatTemplate
from fluxion_core.gguf_index import Metadata, open_gguf

_SPLIT_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL_TOKEN, _USER_DEFINED_TOKEN = 3, 4


class Tokenizer:
    """A model's vocabulary. Thread-safe. Made by `load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        bos_token_id: int | None,
        eos_token_ids: Sequence[int],
        add_bos: bool,
    ) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self._bos = [bos_token_id] if add_bos and bos_token_id is not None else []
        self.bos_token_id = bos_token_id
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        """Ids are below this."""
        vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items())
        self.fingerprint = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
        """SHA-256 of all tokens with their ids, hex."""

    @classmethod
    def load(cls, model_path: Path) -> Tokenizer:
        """The tokenizer of a GGUF file, or of a directory with tokenizer.json.

        Raises:
            ModelNotFoundError: there is none.
            ModelFileError: it is malformed.
            UnsupportedModelError: a kind of vocabulary that is not implemented.
        """
        return _from_directory(model_path) if model_path.is_dir() else _from_gguf(model_path)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised.

        With `add_special_tokens`, the beginning-of-text token comes first where the model has one.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return self._bos + ids if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no character become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a prompt; encode it without adding special tokens.

        Raises:
            InvalidRequestError: the model has no template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequestError("this model has no chat template; send text or token_ids")
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise ModelFileError if this vocabulary has ids that the model's embedding lacks."""
        if self.vocab_size > model_vocab_size:
            raise ModelFileError(
                f"wrong tokenizer: it has {self.vocab_size} tokens, the model {model_vocab_size}; "
                f"use the tokenizer that came with the model"
            )


class IncrementalDetokenizer:
    """Text of a growing list of tokens, in pieces that never split a character.

    A piece comes out once what it decodes to can no longer change: a token may hold a part of a
    character, and a decoder may treat a text's first token differently.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._start = 0
        """First token of the stretch that is decoded together."""
        self._shown = 0
        """Tokens whose text has come out."""

    def push(self, token_id: int) -> str:
        """Take a token; returns the text that became final, possibly empty."""
        self._token_ids.append(token_id)
        before = self._decode(self._start, self._shown)
        text = self._decode(self._start, len(self._token_ids))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not self._is_final(text, before):
            return ""
        return self._show(before, text)

    def flush(self) -> str:
        """What is left when no token will follow; an unfinished character becomes U+FFFD."""
        before = self._decode(self._start, self._shown)
        return self._show(before, self._decode(self._start, len(self._token_ids)))

    def _is_final(self, text: str, before: str) -> bool:
        # No character is longer than four bytes, and no token is empty: more pending tokens than
        # that, and the replacement character is in the text itself.
        return len(self._token_ids) - self._shown > 4 and len(text) > len(before)

    def _show(self, before: str, text: str) -> str:
        self._start, self._shown = self._shown, len(self._token_ids)
        return text[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(
            self._token_ids[start:end], skip_special_tokens=self._skip_special_tokens
        )


def _from_directory(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{directory} holds no tokenizer.json; fetch the model again")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare Exception for whatever is wrong with the file.
        raise ModelFileError(f"{path}: {error}") from None
    config = _read_json(directory / "tokenizer_config.json")
    model_config = _read_json(directory / "config.json")
    generation = _read_json(directory / "generation_config.json")
    special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
    template_file = directory / "chat_template.jinja"
    if template_file.is_file():
        template: object = template_file.read_text(encoding="utf-8")
    else:
        template = config.get("chat_template")
    eos: set[int] = set()
    for value in (model_config.get("eos_token_id"), generation.get("eos_token_id")):
        eos.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    bos_id = backend.token_to_id(special["bos_token"]) if special["bos_token"] else None
    # What the file's own post-processor puts before a text says whether the model wants it.
    starts = backend.encode("", add_special_tokens=True).ids
    return Tokenizer(
        backend,
        ChatTemplate(template, special) if isinstance(template, str) else None,
        bos_token_id=bos_id,
        eos_token_ids=sorted(eos),
        add_bos=bos_id is not None and starts[:1] == [bos_id],
    )


def _from_gguf(path: Path) -> Tokenizer:
    meta = Metadata(open_gguf(path), path)
    kind = meta.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModelError(f"{path}: vocabulary of kind {kind!r}; supported: gpt2 (BPE)")
    tokens = meta.strings("tokenizer.ggml.tokens")
    merges = meta.strings("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelFileError(f"{path}: tokenizer.ggml.merges has an entry that is no pair")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=cast(list[tuple[str, str]], pairs),
            # Qwen2 and Llama 3 take a known word whole, whatever the merges say.
            ignore_merges=meta.optional("tokenizer.ggml.pre") == "llama-bpe",
        )
    except Exception as error:
        raise ModelFileError(f"{path}: vocabulary and merges do not fit: {error}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(str(meta.optional("tokenizer.ggml.pre")), path)
    backend.decoder = decoders.ByteLevel()
    types = meta.optional("tokenizer.ggml.token_type")
    if isinstance(types, list) and len(types) == len(tokens):
        special = [t for t, k in zip(tokens, types, strict=True) if k == _CONTROL_TOKEN]
        user = [t for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED_TOKEN]
        backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
        backend.add_tokens([AddedToken(t, normalized=False) for t in user])
    bos = meta.optional_integer("tokenizer.ggml.bos_token_id")
    eos = {meta.optional_integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    eos_ids = sorted(token for token in eos if token is not None)
    for token_id in [bos, *eos_ids]:
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelFileError(f"{path}: special token {token_id} of {len(tokens)} tokens")
    template = meta.optional("tokenizer.chat_template")
    texts = {
        "bos_token": tokens[bos] if bos is not None else "",
        "eos_token": tokens[eos_ids[0]] if eos_ids else "",
    }
    add_bos = meta.optional("tokenizer.ggml.add_bos_token")
    if add_bos is None:
        # Files of Llama 3 do not say it.
        add_bos = meta.optional("tokenizer.ggml.pre") == "llama-bpe"
    return Tokenizer(
        backend,
        ChatTemplate(template, texts) if isinstance(template, str) else None,
        bos_token_id=bos,
        eos_token_ids=eos_ids,
        add_bos=bool(add_bos),
    )


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
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
            pattern = _SPLIT_LLAMA3
        case "qwen2":
            pattern = _SPLIT_QWEN2
        case "gpt-2" | "default":
            pattern = _SPLIT_GPT2
        case _:
            raise UnsupportedModelError(
                f"{path}: pre-tokenizer {name!r}; supported: smollm, llama-bpe, qwen2, gpt-2"
            )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level])


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from None
    return value if isinstance(value, dict) else {}


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
