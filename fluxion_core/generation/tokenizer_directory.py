"""The tokenizer of a model directory, as transformers reads it.

tokenizer.json cuts texts and says what stands around them; tokenizer_config.json, or
special_tokens_map.json and added_tokens.json of older models, name special tokens. Where files
contradict each other in what a token's number is, the model is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import AddedToken

from fluxion_core.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from fluxion_core.generation.chat_template_files import read_chat_template
from fluxion_core.generation.post_processor import Frame, frame_of
from fluxion_core.generation.tokenizer_class import apply_class, class_of, default_names
from fluxion_core.generation.tokenizer_entries import NAMED_TOKENS, TOKENIZER_CONFIG
from fluxion_core.generation.vocabulary import Vocabulary
from fluxion_core.models.json_files import flag, read_json_if_there, token_ids
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
_CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_TOKEN_ID = re.compile("[0-9]{1,9}")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def read_directory(directory: Path) -> Vocabulary:
    """The vocabulary of a directory with tokenizer.json.

    Raises:
        ModelNotFoundError: there is no tokenizer.json.
        ModelFileError: a file is malformed, or files contradict each other.
        UnsupportedModelError: a file asks for something that is not implemented.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{directory} holds no tokenizer.json; fetch the model again")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare Exception for whatever is wrong with the file.
        raise ModelFileError(f"{path}: {error}") from None
    dropout = getattr(backend.model, "dropout", None)
    if dropout:
        raise UnsupportedModelError(
            f"{path}: dropout is {dropout:.3g}: a text would be cut another way every time; set it "
            f"to null"
        )
    config = read_json_if_there(directory / _CONFIG)
    kind = class_of(config, read_json_if_there(directory / "config.json"))
    apply_class(kind, backend, config, directory / _CONFIG)
    config = {**default_names(kind, backend), **config}
    if backend.padding is not None:
        config.setdefault("pad_token", backend.padding["pad_token"])
    # State of the program that wrote the file, for its batches.
    backend.no_truncation()
    backend.no_padding()
    special = _special_tokens(directory, config)
    stored_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    _add(special, backend, directory)
    texts = special.texts
    TOKENIZER_CONFIG.check(
        {name: value for name, value in config.items() if name not in texts}, directory / _CONFIG
    )
    backend.encode_special_tokens = flag(config, "split_special_tokens", directory / _CONFIG)
    _check_clean_up(config, backend, directory)
    prefix, suffix = _frame(backend, path)
    _say_what_decides(config, directory, prefix, suffix)
    bos = backend.token_to_id(texts["bos_token"]) if "bos_token" in texts else None
    if bos is None and len(prefix) == 1:
        (bos,) = prefix
    template, without = read_chat_template(directory, config, texts)
    ends = _end_token_ids(directory, texts, backend)
    return Vocabulary(backend, template, without, bos, ends, prefix, suffix, stored_size)


def _frame(backend: tokenizers.Tokenizer, path: Path) -> Frame:
    """What stands around a text; the backend itself then adds nothing."""
    try:
        frame = frame_of(backend)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from None
    unknown = [token for ids in frame for token in ids if backend.id_to_token(token) is None]
    if unknown:
        raise ModelFileError(f"{path}: the post-processor adds {unknown}, which are no tokens")
    backend.post_processor = None
    return frame


@dataclass(frozen=True)
class _SpecialTokens:
    """Tokens that the files beside tokenizer.json name."""

    named: dict[str, AddedToken]
    """By name, as bos_token; templates refer to them."""
    unnamed: list[AddedToken]
    by_id: dict[int, AddedToken]
    """With the ids that the files give them."""
    by_id_path: Path

    @property
    def texts(self) -> dict[str, str]:
        return {name: str(token) for name, token in self.named.items()}


def _special_tokens(directory: Path, config: Mapping[str, object]) -> _SpecialTokens:
    path = directory / _CONFIG
    entries = dict(config)
    extra = entries.get("extra_special_tokens") or entries.get("additional_special_tokens")
    older: dict[str, object] = {}
    if "added_tokens_decoder" not in config:
        # Older models: what such a map names counts more than the config does.
        older = read_json_if_there(directory / _MAP)
        entries |= older
        if isinstance(more := older.get("extra_special_tokens"), dict):
            extra = more
        elif more:
            extra = [*_list(extra or [], path), *_list(more, directory / _MAP)]
        elif extra is None:
            extra = older.get("additional_special_tokens")
    groups = [extra, entries.get("model_specific_special_tokens")]
    more_named = {
        name: value for group in groups if isinstance(group, dict) for name, value in group.items()
    }
    named = {
        name: _added_token(value, path, name)
        for name, value in {**entries, **more_named}.items()
        if value is not None
        and (
            name in NAMED_TOKENS
            or name in more_named
            or (name.endswith("_token") and isinstance(value, str))
        )
    }
    unnamed = [] if isinstance(extra, dict) else _list(extra or [], path)
    tokens = [_added_token(value, path, "extra_special_tokens") for value in unnamed]
    if "added_tokens_decoder" in config:
        return _SpecialTokens(
            named, tokens, _tokens_by_id(config["added_tokens_decoder"], path), path
        )
    special = {str(token) for token in [*named.values(), *tokens]}
    path = directory / "added_tokens.json"
    by_id = {
        each: AddedToken(text, normalized=text not in special, special=text in special)
        for text, token_id in read_json_if_there(path).items()
        for each in token_ids(token_id, path)
    }
    return _SpecialTokens(named, tokens, by_id, path)


def _add(special: _SpecialTokens, backend: tokenizers.Tokenizer, directory: Path) -> None:
    """Make these tokens added tokens, as far as tokenizer.json does not say so already.

    Raises:
        ModelFileError: a token has another id than its file says.
    """
    stored = {str(token): token for token in backend.get_added_tokens_decoder().values()}
    by_id = {str(token): token for token in special.by_id.values()}
    # Of tokens without an id, what one with an id says counts; tokenizer.json's counts most, unless
    # the newer kind of config says otherwise.
    known = {**stored, **by_id} if special.by_id_path.name == _CONFIG else {**by_id, **stored}
    missing: dict[str, AddedToken] = {}
    for said in [*special.by_id.values(), *special.named.values(), *special.unnamed]:
        token = known.get(str(said), said)
        if repr(token) != repr(stored.get(str(token))):
            missing.setdefault(str(token), token)
    if new := [text for text in missing if backend.token_to_id(text) is None]:
        words = ", ".join(new[:8])
        _log.warning(event("tokens that tokenizer.json lacks", file=directory, tokens=words))
    backend.add_tokens(list(missing.values()))
    for token_id, token in special.by_id.items():
        found = backend.token_to_id(str(token))
        if found != token_id:
            raise ModelFileError(
                f"{special.by_id_path}: token {str(token)!r} is {token_id}, but {found} in "
                f"tokenizer.json; fetch both from the same place"
            )


def _tokens_by_id(value: object, path: Path) -> dict[int, AddedToken]:
    if not isinstance(value, dict) or not all(map(_TOKEN_ID.fullmatch, value)):
        raise ModelFileError(f"{path}: added_tokens_decoder is {value!r:.60}; must be by token id")
    tokens = {
        int(key): _added_token(token, path, "added_tokens_decoder") for key, token in value.items()
    }
    return dict(sorted(tokens.items()))


def _added_token(value: object, path: Path, name: str) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {flag: value[flag] for flag in _FLAGS if flag in value}
        if all(isinstance(flag, bool) for flag in flags.values()):
            # Named tokens are special, whether they say so or not.
            if name not in ("added_tokens_decoder", "extra_special_tokens"):
                flags["special"] = True
            return AddedToken(value["content"], **flags)
    raise ModelFileError(f"{path}: {name} holds {value!r:.60}; must be a token")


def _end_token_ids(
    directory: Path, texts: Mapping[str, str], backend: tokenizers.Tokenizer
) -> frozenset[int]:
    """Ends of text that the model's configs name; if they name none, the tokenizer's."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        entries = read_json_if_there(directory / name)
        ids.update(token_ids(entries.get("eos_token_id"), directory / name))
    if not ids and "eos_token" in texts:
        ids.add(cast(int, backend.token_to_id(texts["eos_token"])))
    return frozenset(ids)


def _check_clean_up(
    config: Mapping[str, object], backend: tokenizers.Tokenizer, directory: Path
) -> None:
    # Made for word pieces. transformers too leaves the answers of byte-pair encodings as they are.
    asked = flag(config, "clean_up_tokenization_spaces", directory / _CONFIG)
    if asked and not isinstance(backend.model, tokenizers.models.BPE):
        raise UnsupportedModelError(
            f"{directory / _CONFIG}: clean_up_tokenization_spaces is true: taking spaces out of "
            f"the answers is not supported"
        )


def _say_what_decides(
    config: Mapping[str, object], directory: Path, prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> None:
    """What a text begins and ends with is said in two places; tokenizer.json decides."""
    said = {"add_bos_token": bool(prefix), "add_eos_token": bool(suffix)}
    for name, is_added in said.items():
        if flag(config, name, directory / _CONFIG, default=is_added) != is_added:
            _log.warning(
                event(
                    "the post-processor of tokenizer.json decides what stands around a text",
                    file=directory / _CONFIG,
                    entry=f"{name} {config[name]}",
                    prefix=list(prefix),
                    suffix=list(suffix),
                )
            )


def _list(value: object, path: Path) -> list[object]:
    if not isinstance(value, list):
        raise ModelFileError(f"{path}: special tokens are {value!r:.60}; must be a list")
    return value
