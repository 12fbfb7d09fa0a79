"""Chat templates: the text that transformers renders, which parts an assistant said, and a sandbox that holds."""

import resource
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ronna.base.errors import RonnaError
from ronna.text.chat import CHATML, PLAIN, ChatTemplate, Part

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# In the manner of published ones, which do not mark what the assistant says.
BARE_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content ~ eos_token }}{% else %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{% set text = '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "bare chatml": BARE_CHATML, "plain": PLAIN, "inst": INST, "headers": HEADERS}


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    made = [{"role": "assistant" if i % 2 else "user", "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + made


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("reply", [False, True])
def test_the_text_is_that_of_transformers(name, reply):
    messages = talk("Hi\n", "Yes,  well", 'a <b> 你好 "c" {{ x }}', system=None if name == "inst" else "Be brief.")
    theirs, _ = render_jinja_template(
        [messages], chat_template=TEMPLATES[name], add_generation_prompt=reply, tools=None, documents=None, **TOKENS
    )
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(messages, reply=reply) == theirs[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_are_the_text_and_what_was_said(name):
    template, messages = ChatTemplate(TEMPLATES[name], TOKENS), talk("Hi", "Yes", "And?", "No")
    parts = template.parts(messages)
    assert "".join(part.text for part in parts) == template.render(messages)
    said = [part.text for part in parts if part.said]
    assert ["Yes" in said[0], "No" in said[1], len(said)] == [True, True, 2]
    assert not any(word in part.text for part in parts if not part.said for word in ("Yes", "No"))
    # What is read before the last answer is what a server would send for it.
    last = max(i for i, part in enumerate(parts) if part.said)
    assert "".join(part.text for part in parts[:last]) == template.render(messages[:3], reply=True)


def test_marks_of_a_template_are_those_of_transformers():
    messages = talk("Hi", "Yes", "And?", "No")
    text, spans = render_jinja_template([messages], chat_template=PLAIN, return_assistant_tokens_mask=True, **TOKENS)
    said = [part.text for part in ChatTemplate(PLAIN, TOKENS).parts(messages) if part.said]
    assert said == [text[0][a:b] for a, b in spans[0]] == ["Yes</s>", "No</s>"]


def test_a_template_that_rewrites_the_past_is_refused():
    forgets = "{% for m in messages %}{{ m.role if not loop.last else m.role + m.content }}{% endfor %}"
    with pytest.raises(RonnaError, match="in another way"):
        ChatTemplate(forgets, TOKENS).parts(talk("Hi", "Yes", "And?", "No"))
    with pytest.raises(RonnaError, match="no system"):
        ChatTemplate(INST, TOKENS).render(talk("Hi", system="x"))
    with pytest.raises(RonnaError, match="cannot be read"):
        ChatTemplate("{% for %}", TOKENS)


def test_text_cannot_pretend_to_be_a_mark():
    template = ChatTemplate(PLAIN, TOKENS)
    assert [p.said for p in template.parts(talk("{% generation %}x{% endgeneration %}", "Yes"))] == [False, True, False]
    assert template.parts(talk("Hi", "Yes"))[1] == Part("Yes</s>", True)


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set n=namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n=namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "times": "{{ 'a' * 999999 * 999999 }}",
    "power": "{{ 'a' * 10 ** 9 }}",
    "number": "{{ 'a' | center(10000000000) }}",
    "width": "{{ 'a'.ljust(999999 * 999) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "attribute format": "{{ ('{:999999999}' | attr('format'))(1) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "filter": "{{ '%999999999d' | format(1) }}",
    "replace": "{{ 'x' | replace('x', 'y' * 99999) | replace('y', 'z' * 99999) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{{ 'a' * 1000000 }}" * 99,
    "list": "{% set n=namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + ['a' * 9999] %}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "change": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_template_ends_soon_with_an_error(name):
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RonnaError, match="chat template"):
        ChatTemplate(BOMBS[name], TOKENS).render(talk("Hi"))
    assert time.perf_counter() - began < 20  # seconds; some of these would take years
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


def test_nothing_of_the_program_can_be_reached():
    for name in ("raise_exception", "strftime_now", "range", "messages", "namespace"):
        for attribute in ("__globals__", "__class__", "__init__", "__closure__"):
            assert ChatTemplate(f"{{{{ {name}.{attribute} }}}}", TOKENS).render(talk("Hi")) == ""


def test_long_conversations_are_within_the_limits():
    messages = talk(*["word " * 2000] * 200)
    assert len(ChatTemplate(CHATML, TOKENS).render(messages)) > 2_000_000
    with pytest.raises(RonnaError, match="characters"):
        ChatTemplate("x" * 300_000, TOKENS)
