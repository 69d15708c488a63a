"""Text to token ids and back, from tokenizer.json or from a GGUF file's own vocabulary."""

from __future__ import annotations

import codecs
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import decoders, processors

from fluxion_core.errors import InvalidRequestError, ModelFileError
from fluxion_core.generation.chat import ChatMessage, ChatTemplate
from fluxion_core.generation.chat_template_files import NO_TEMPLATE
from fluxion_core.generation.gguf_vocabulary import read_gguf
from fluxion_core.generation.text_pieces import BYTE_CHARACTERS, TextPieces, pieces_of
from fluxion_core.generation.tokenizer_directory import read_directory


class Tokenizer:
    """A model's vocabulary. Thread-safe. Made by `load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        bos_token_id: int | None,
        eos_token_ids: Collection[int],
        add_bos: bool = False,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        without_template: str = NO_TEMPLATE,
        stored_size: int | None = None,
    ) -> None:
        self._backend = backend
        self.chat_template = chat_template
        self._without_template = without_template
        bos = [bos_token_id] if add_bos and bos_token_id is not None else []
        self._prefix = [*bos, *prefix_ids]
        self._suffix = list(suffix_ids)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = frozenset(eos_token_ids)
        vocabulary = sorted(backend.get_vocab(with_added_tokens=True).items())
        self.vocab_size: int = max((token_id for _, token_id in vocabulary), default=-1) + 1
        """Ids are below this; there may be gaps."""
        self._stored_size = self.vocab_size if stored_size is None else stored_size
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        """Whether every token stands for bytes of UTF-8, see `token_bytes`."""
        added = backend.get_added_tokens_decoder()
        self._special_texts = {i: token.content for i, token in added.items() if token.special}
        self.fingerprint = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
        """SHA-256 of all tokens with their ids, hex."""
        self.pieces: TextPieces = pieces_of(backend)
        """Where texts may be cut, and how few tokens they can have."""

    @classmethod
    def load(cls, model_path: Path) -> Tokenizer:
        """The tokenizer of a GGUF file, or of a directory with tokenizer.json.

        Raises:
            ModelNotFoundError: there is none.
            ModelFileError: it is malformed.
            UnsupportedModelError: a kind of vocabulary that is not implemented.
        """
        found = read_directory(model_path) if model_path.is_dir() else read_gguf(model_path)
        return cls(
            found.backend,
            found.chat_template,
            bos_token_id=found.bos_token_id,
            eos_token_ids=found.eos_token_ids,
            prefix_ids=found.prefix_ids,
            suffix_ids=found.suffix_ids,
            without_template=found.without_template,
            stored_size=found.stored_size,
        )

    @property
    def splits_special_tokens(self) -> bool:
        """Whether a special token written out in a text is cut like any other text."""
        return self._backend.encode_special_tokens

    def special_tokens_in(self, text: str) -> list[tuple[str, int]]:
        """Special tokens written out in a text, with their ids; `decode` would leave them out."""
        return [(token, index) for index, token in self._special_texts.items() if token in text]

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised.

        With `add_special_tokens`, what the model wants before and after a text is there too: as a
        rule the beginning-of-text token, or nothing.

        Raises:
            InvalidRequestError: the vocabulary has no token for a part of the text, and no other.

        Cost: about half a second of CPU a MiB; see `encode_pieces` for texts of others.
        """
        pieces = self.encode_pieces(text, add_special_tokens=add_special_tokens)
        return [token_id for piece in pieces for token_id in piece]

    def encode_pieces(
        self, text: str, *, add_special_tokens: bool = True, max_piece_bytes: int = sys.maxsize
    ) -> Iterator[list[int]]:
        """Token ids of a text piece by piece, for a caller that may stop in between.

        Raises:
            InvalidRequestError: the vocabulary has no token for a part of the text, and no other;
                or a piece is too large, see `TextPieces.cut`.

        Cost: a piece has about 16 KiB, and takes some milliseconds, in which other threads run, and
            a hundred bytes of memory a byte. Tokenizers of which no place to cut is known take a
            text in one piece.
        """
        if add_special_tokens and self._prefix:
            yield self._prefix
        for piece in self.pieces.cut(text, max_piece_bytes=max_piece_bytes):
            yield self._encode_piece(piece)
        if add_special_tokens and self._suffix:
            yield self._suffix

    def _encode_piece(self, text: str) -> list[int]:
        try:
            # Of the library's ways this one lets other threads run meanwhile.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:
            # The library raises bare Exception, as for an unknown-token that is not there.
            raise InvalidRequestError(f"the model's tokenizer refuses the text: {error}") from None
        return encoding.ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no character become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out unless told otherwise."""
        return token_id in self._special_texts

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
        return "".join(
            self.render_chat_pieces(messages, add_generation_prompt=add_generation_prompt)
        )

    def render_chat_pieces(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Iterator[str]:
        """A conversation as a prompt, in pieces: a caller may stop in between.

        Raises:
            InvalidRequestError: see `render_chat`.
        """
        if self.chat_template is None:
            raise InvalidRequestError(self._without_template)
        yield from self.chat_template.pieces(messages, add_generation_prompt=add_generation_prompt)

    def to_json(self) -> str:
        """Contents of a tokenizer.json of the `tokenizers` library, which encodes as we do."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        prefix, suffix = (
            [cast(str, backend.id_to_token(token_id)) for token_id in ids]
            for ids in (self._prefix, self._suffix)
        )
        backend.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A", *suffix],
            pair=[*prefix, "$A", "$B", *suffix],
            special_tokens=list(
                zip([*prefix, *suffix], [*self._prefix, *self._suffix], strict=True)
            ),
        )
        return backend.to_str()

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise ModelFileError if this vocabulary has ids that the model's embedding lacks."""
        # A token that only a config names, as for padding, does no harm: a prompt with it is
        # refused, and the model cannot make it.
        if self._stored_size > model_vocab_size:
            raise ModelFileError(
                f"wrong tokenizer: it has {self._stored_size} tokens, the model "
                f"{model_vocab_size}; use the tokenizer that came with the model"
            )


class IncrementalDetokenizer:
    """Text of a growing list of tokens, in pieces that never split a character.

    All pieces together are what `Tokenizer.decode` makes of all tokens. A token may hold a part of
    a character; text comes out once what follows can no longer change it.

    Args:
        tokenizer: whose tokens they are.
        skip_special_tokens: leave their text out. Whoever looks for stop strings in what is left
            must look for special tokens by their ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._stream: _ByteStream | _DecodedWindow
        if tokenizer.is_byte_level:
            self._stream = _ByteStream(tokenizer, skip_special_tokens)
        else:
            self._stream = _DecodedWindow(tokenizer, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Take a token; returns the text that became final, possibly empty."""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """The text that is left when no token follows; an unfinished character becomes U+FFFD."""
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


_BYTE_OF_CHARACTER = {character: value for value, character in BYTE_CHARACTERS.items()}
