"""Chat templates: programs that a model brings, run without trust."""

from __future__ import annotations

import pytest

from fluxion_core.errors import InvalidRequestError, ModelFileError
from fluxion_core.generation.chat import ChatMessage, ChatTemplate

HELLO = [ChatMessage("user", "hello")]


def render(source: str, messages: list[ChatMessage] = HELLO, **options: bool) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_messages_special_tokens_and_the_prompt_flag_reach_the_template():
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(source) == "<s>[user] hello\n[assistant]"
    assert render(source, add_generation_prompt=False) == "<s>[user] hello\n"


def test_block_tags_leave_no_white_space():
    assert render("{% if true %}\n  {% set x = 1 %}\nx\n{% endif %}\ny") == "x\ny"


def test_tools_are_none():
    assert render("{{ tools is none and documents is none }}") == "True"


def test_text_is_not_escaped_and_not_run():
    assert render("{{ messages[0].content }}", [ChatMessage("user", "<b>{{ 1 + 1 }}")]) == (
        "<b>{{ 1 + 1 }}"
    )


def test_no_messages_is_an_invalid_request():
    with pytest.raises(InvalidRequestError, match="at least one"):
        render("x", [])


def test_the_templates_own_refusal_is_passed_on():
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(1000000000) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(InvalidRequestError, match="refuses"):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ 'a'.join(5) }}", "{{ '%d' % 'x' }}"]
)
def test_a_template_that_fails_refuses_the_request(source):
    with pytest.raises(InvalidRequestError, match="refuses"):
        render(source)


@pytest.mark.parametrize("source", ["{% for", "{{ x | no_such_filter }}", "{% generation %}"])
def test_a_template_that_does_not_compile_is_the_models_fault(source):
    with pytest.raises(ModelFileError, match="does not compile"):
        ChatTemplate(source, {})
