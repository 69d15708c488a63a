"""Chat templates: programs that a model brings, run without trust."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

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


@pytest.mark.parametrize(
    "source", ["{% for", "{{ x | no_such_filter }}", "{% generation %}", "{% break %}"]
)
def test_a_template_that_does_not_compile_is_the_models_fault(source):
    with pytest.raises(ModelFileError, match="does not compile"):
        ChatTemplate(source, {})


SPECIAL = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>", "turn_token": "<t>"}
TURNS = [ChatMessage("tool", "it's <b> & ü 🙂\n"), ChatMessage("assistant", "{{ x }}")]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content | tojson }}",
        "{{ messages | tojson }}",
        "{{ messages[0] | tojson(indent=2, sort_keys=True) }}",
        "{{ messages[0].content | tojson(ensure_ascii=True) }}",
        "{{ messages[0] | tojson(separators=(',', ':')) }}",
        "{% for m in messages %}\n  {%- generation -%}\n {{ loop.index }}{{ m.content }}\n"
        "{%- endgeneration -%}\n{% endfor %}\n",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% set ns = namespace(n=1) %}{% for m in messages %}{% generation %}"
        "{% set ns.n = ns.n + 1 %}{% endgeneration %}{% endfor %}{{ ns.n }}",
        "{% macro f(x) %}{% generation %}[{{ x }}]{% endgeneration %}{% endmacro %}{{ f(1) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
        "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a'], 1) | tojson }}{{ dict is mapping }}",
        "{{ namespace(self=1).self }}{{ namespace({'a': 1}).a }}",
        "{{ pad_token }}{{ turn_token }}{{ unk_token }}{{ unk_token is defined }}",
        "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ nothing is defined }}",
        "{{ lipsum is defined }}{{ cycler is defined }}{{ joiner is defined }}",
        "  {% if true %}\n a\n  {% endif %}\n\n\nend\n\n",
        "{{ strftime_now('%Y') | length }}",
        "{{ messages | map(attribute='role') | join(',') | upper | trim }}",
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_a_template_finds_what_it_finds_in_transformers(source, prompt):
    turns = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    ((expected,), _) = render_jinja_template(
        [turns], chat_template=source, add_generation_prompt=prompt, **SPECIAL
    )
    ours = ChatTemplate(source, SPECIAL).render(TURNS, add_generation_prompt=prompt)
    assert ours == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ namespace().__class__.__mro__ }}",
        "{{ namespace().__init__.__globals__ }}",
        "{{ dict.__class__.__base__ }}",
    ],
)
def test_what_reaches_into_python_is_refused_here_too(source):
    with pytest.raises(InvalidRequestError, match="refuses"):
        render(source)
