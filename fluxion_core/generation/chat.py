"""Chat templates: messages to a prompt, by the template that the model brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
        special_tokens: texts that templates refer to, such as bos_token and eos_token.

    Raises:
        ModelFileError: the template does not compile.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source = source
        self.special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFileError(f"chat template does not compile: {error}") from None

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation.

        Raises:
            InvalidRequestError: no messages, or ones that the template refuses.
        """
        if not messages:
            raise InvalidRequestError("chat has no messages; send at least one")
        try:
            return self._template.render(
                # Templates ask whether these are none.
                tools=None,
                documents=None,
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        # A template is a program: on messages that its author did not think of, it fails like one.
        except (jinja2.TemplateError, *_PROGRAM_ERRORS) as error:
            raise InvalidRequestError(f"the model's chat template refuses: {error}") from None


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
