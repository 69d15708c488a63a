"""Text to token ids and back, from tokenizer.json or from a GGUF file's own vocabulary."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import decoders, processors

from fluxion_core.errors import InvalidRequestError, ModelFileError, ModelNotFoundError
from fluxion_core.generation.chat import ChatMessage, ChatTemplate
from fluxion_core.generation.gguf_vocabulary import read_backend
from fluxion_core.gguf_index import open_gguf
from fluxion_core.json_files import read_json_if_there, token_ids


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
        self.chat_template = chat_template
        self._bos = [bos_token_id] if add_bos and bos_token_id is not None else []
        self.bos_token_id = bos_token_id
        self.eos_token_ids = frozenset(eos_token_ids)
        vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items())
        self.vocab_size: int = max((token_id for _, token_id in vocabulary), default=-1) + 1
        """Ids are below this; there may be gaps."""
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        """Whether every token stands for bytes of UTF-8, see `token_bytes`."""
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)
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
        return self.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised.

        With `add_special_tokens`, the beginning-of-text token comes first where the model has one.

        Raises:
            InvalidRequestError: the vocabulary has no token for a part of the text, and no other.
        """
        try:
            # Of the library's ways this one lets other threads run meanwhile.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:
            # The library raises bare Exception, as for an unknown-token that is not there.
            raise InvalidRequestError(f"the model's tokenizer refuses the text: {error}") from None
        return self._bos + encoding.ids if add_special_tokens else encoding.ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no character become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out unless told otherwise."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a byte-level vocabulary's token; none for an unknown id."""
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        values = [_BYTE_OF_CHARACTER.get(character) for character in token]
        # Added tokens may hold any character; such a token stands for its own text.
        if any(value is None for value in values):
            return token.encode()
        return bytes(cast(list[int], values))

    def render_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a prompt; encode it without adding special tokens.

        Raises:
            InvalidRequestError: the model has no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template; send text or token_ids")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def to_json(self) -> str:
        """Contents of a tokenizer.json of the `tokenizers` library, which encodes as we do."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        bos = [backend.id_to_token(token_id) for token_id in self._bos]
        backend.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A"],
            pair=[*bos, "$A", "$B"],
            special_tokens=list(zip(bos, self._bos, strict=True)),
        )
        return backend.to_str()

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise ModelFileError if this vocabulary has ids that the model's embedding lacks."""
        if self.vocab_size > model_vocab_size:
            raise ModelFileError(
                f"wrong tokenizer: it has {self.vocab_size} tokens, the model {model_vocab_size}; "
                f"use the tokenizer that came with the model"
            )


class IncrementalDetokenizer:
    """Text of a growing list of tokens, in pieces that never split a character.

    All pieces together are what `Tokenizer.decode` makes of all tokens. A token may hold a part of
    a character; text comes out once what follows can no longer change it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._stream: _ByteStream | _DecodedWindow
        if tokenizer.is_byte_level:
            self._stream = _ByteStream(tokenizer, skip_special_tokens)
        else:
            self._stream = _DecodedWindow(tokenizer, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Take a token; returns the text that became final, possibly empty."""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """What is left when no token will follow; an unfinished character becomes U+FFFD."""
        return self._stream.flush()


class _ByteStream:
    """Tokens are bytes of UTF-8: Llama 3, Qwen2, SmolLM2. Exact, and constant work a token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _DecodedWindow:
    """Any other decoder, such as SentencePiece's with byte fallback.

    The last tokens are decoded with and without the new one, and the difference comes out. Some
    tokens before stay in the window, because decoders treat a text's first token differently.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_shown = 0
        """Tokens of the window whose text has come out."""
        self._shown = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        # A run of bytes that is no text yet ends like this, one per byte.
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if piece:
            del self._window[: self._num_shown]
            self._shown = self._decode(self._window)
        self._num_shown = len(self._window)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _from_directory(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{directory} holds no tokenizer.json; fetch the model again")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare Exception for whatever is wrong with the file.
        raise ModelFileError(f"{path}: {error}") from None
    config = read_json_if_there(directory / "tokenizer_config.json")
    special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
    template = _template_source(directory, config)
    eos: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        entries = read_json_if_there(directory / name)
        eos.update(token_ids(entries.get("eos_token_id"), directory / name))
    bos_id = backend.token_to_id(special["bos_token"]) if special["bos_token"] else None
    # What the file's own post-processor puts before a text says whether the model wants it.
    starts = backend.encode("", add_special_tokens=True).ids
    return Tokenizer(
        backend,
        ChatTemplate(template, special) if template is not None else None,
        bos_token_id=bos_id,
        eos_token_ids=sorted(eos),
        add_bos=bos_id is not None and starts[:1] == [bos_id],
    )


def _from_gguf(path: Path) -> Tokenizer:
    file = open_gguf(path)
    backend = read_backend(file)
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
    return Tokenizer(
        backend,
        ChatTemplate(template, special) if template is not None else None,
        bos_token_id=bos,
        eos_token_ids=file.end_token_ids(),
        add_bos=bool(add_bos),
    )


def _template_source(directory: Path, config: dict[str, object]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{path}: {error}") from None
    template = config.get("chat_template")
    # Several templates by name: tool use, retrieval, and the one for conversations.
    if isinstance(template, list):
        named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
        template = named.get("default", {}).get("template")
    return template if isinstance(template, str) else None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 for itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    table = {chr(value): value for value in printable}
    return table | {chr(0x100 + index): value for index, value in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
