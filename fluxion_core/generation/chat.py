"""Chat templates: messages to a prompt, by the template that the model brings.

Templates are written for transformers, so they find here what they find there: its extensions, its
`tojson`, its functions, and the special tokens by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fluxion_core.errors import InvalidRequestError, ModelFileError

_PROGRAM_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    """As the model's template knows it: system, user, assistant."""
    content: str


class ChatTemplate:
    """A model's Jinja template, run in a sandbox.

    Args:
        source: the template.
        special_tokens: texts that templates refer to by name: bos_token, eos_token, pad_token, and
            whatever else the model's files name.
        begins_with: put before a prompt that does not begin with it.

    Raises:
        ModelFileError: the template does not compile.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, begins_with: str = ""
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _PlainDict(),
            "namespace": _PlainNamespace,
        }
        self._begins_with = begins_with
        self.source = source
        self.special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        # Jinja writes Python, which may refuse in its own words, as a `break` outside of a loop.
        except (jinja2.TemplateError, SyntaxError, *_PROGRAM_ERRORS) as error:
            raise ModelFileError(f"chat template does not compile: {error}") from None

    @property
    def portable_source(self) -> str:
        """The template for programs that put nothing before a prompt: it writes the start too."""
        if not self._begins_with:
            return self.source
        try:
            is_written = self._template.render(
                dict(self.special_tokens),
                messages=[{"role": "user", "content": ""}],
                add_generation_prompt=True,
            ).startswith(self._begins_with)
        except (jinja2.TemplateError, *_PROGRAM_ERRORS):
            is_written = True
        return self.source if is_written else f"{{{{ {self._begins_with!r} }}}}{self.source}"

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation.

        Raises:
            InvalidRequestError: no messages, or ones that the template refuses.
        """
        return "".join(self.pieces(messages, add_generation_prompt=add_generation_prompt))

    def pieces(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Iterator[str]:
        """The prompt in the pieces that the template writes, for a caller that may stop in between.

        Raises:
            InvalidRequestError: see `render`.
        """
        if not messages:
            raise InvalidRequestError("chat has no messages; send at least one")
        held = "" if self._begins_with else None
        try:
            for text in self._template.generate(
                dict(self.special_tokens),
                # Templates ask whether these are none.
                tools=None,
                documents=None,
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=add_generation_prompt,
            ):
                if held is None:
                    yield text
                    continue
                held += text
                if len(held) >= len(self._begins_with):
                    yield self._begun(held)
                    held = None
        # A template is a program: on messages that its author did not think of, it fails like one.
        except (jinja2.TemplateError, *_PROGRAM_ERRORS) as error:
            raise InvalidRequestError(f"the model's chat template refuses: {error}") from None
        if held is not None:
            yield self._begun(held)

    def _begun(self, start: str) -> str:
        return start if start.startswith(self._begins_with) else self._begins_with + start


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what a model said, for training; in a prompt it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - the name and the type are Jinja's

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PlainDict:
    """What `dict` is to a template: a function, not the class with all its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[object, object]:
        return dict.fromkeys(keys, value)


class _PlainNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, which reach into Python."""

    # No method of its own can be called: looking one up finds what the template put there.
    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter is for HTML: it escapes <, > and &, and sorts."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
