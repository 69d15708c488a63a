"""The chat template of a model directory: the default one, if there are several.

Files come before entries of tokenizer_config.json, as in transformers. A template may be one text,
or several by name; the names other than `default` are for requests that this service does not have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from fluxion_core.errors import ModelFileError
from fluxion_core.generation.chat import ChatTemplate
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)
_DEFAULT = "default"
NO_TEMPLATE = "this model has no chat template; send text or token_ids"


def read_chat_template(
    directory: Path, config: Mapping[str, object], special_tokens: Mapping[str, str]
) -> tuple[ChatTemplate | None, str]:
    """The default template; None with the reason if there is none.

    Raises:
        ModelFileError: a template does not compile, or is no text.
    """
    templates = _in_files(directory) or _in_config(config, directory / "tokenizer_config.json")
    if (directory / "chat_template.json").is_file():
        # Of processors for pictures; transformers' tokenizers do not look at it either.
        _log.warning(
            event("a processor's template is not used", file=directory / "chat_template.json")
        )
    return choose_template(templates, special_tokens)


def choose_template(
    templates: Mapping[str, str], special_tokens: Mapping[str, str], *, begins_with: str = ""
) -> tuple[ChatTemplate | None, str]:
    """The default of several templates by name; None with the reason if there is none."""
    others = ", ".join(sorted(name for name in templates if name != _DEFAULT))
    if _DEFAULT not in templates:
        if not templates:
            return None, NO_TEMPLATE
        return None, f"this model has chat templates for {others} alone; send text or token_ids"
    if others:
        _log.info(event("of several chat templates the default is used", others=others))
    return ChatTemplate(templates[_DEFAULT], special_tokens, begins_with=begins_with), ""


def _in_files(directory: Path) -> dict[str, str]:
    files = {
        path.stem: path
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))
    }
    main = directory / "chat_template.jinja"
    if main.is_file():
        files = {_DEFAULT: main, **files}
    templates = {}
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{path}: {error}") from None
    return templates


def _in_config(config: Mapping[str, object], path: Path) -> dict[str, str]:
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named if len(named) == len(value) else value
    match value:
        case None:
            return {}
        case str():
            return {_DEFAULT: value}
        case dict() if all(isinstance(each, str) for pair in value.items() for each in pair):
            return value
    raise ModelFileError(
        f"{path}: chat_template is {value!r:.60}; must be a text, or texts with different names"
    )
