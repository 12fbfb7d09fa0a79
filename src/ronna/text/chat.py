"""Chat templates: a conversation as the text that a model reads, and which parts of it an assistant said."""

import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError

from ronna.base.errors import RonnaError
from ronna.text.sandbox import compiled

# OpenAI's ChatML, for tokenizers that have its two marks.
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# For all others: headings in plain words, and the end token behind what the assistant says.
PLAIN = """{% for message in messages %}
{%- if message['role'] == 'assistant' -%}
{{ '### Assistant:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' }}
{%- elif message['role'] == 'system' -%}
{{ message['content'] + '\\n\\n' }}
{%- else -%}
{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"""

Message = Mapping[str, Any]
"""A role (system, user, assistant, tool) and its content."""


class Part(NamedTuple):
    """A run of a rendered conversation; `said` by the assistant, or to be read."""

    text: str
    said: bool


class ChatTemplate:
    """A Jinja template as `transformers` uses them, with the tokens it may name (bos_token, eos_token, ...)."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str = "chat template"):
        self.source, self.tokens, self.where = source, tokens, where
        # No text can have these by chance or by design.
        self.marks = (f"\0{secrets.token_hex(16)}<", f"\0{secrets.token_hex(16)}>")
        self.sandbox = compiled(source, self.marks, where)

    def render(self, messages: Sequence[Message], *, reply: bool = False, **more: Any) -> str:
        """The text of a conversation; with `reply`, up to where the assistant is to answer.

        Raises RonnaError where the template refuses the conversation or goes beyond its limits.
        """
        marked = self.marked(messages, reply=reply, **more)
        return marked.replace(self.marks[0], "").replace(self.marks[1], "")

    def marked(self, messages: Sequence[Message], *, reply: bool = False, **more: Any) -> str:
        variables = {**self.tokens, "tools": None, "documents": None, **more}
        try:
            return self.sandbox.render({**variables, "messages": messages, "add_generation_prompt": reply})
        except TemplateError as error:
            fix = "look at the order and the roles of the messages"
            raise RonnaError(f"the chat template refuses: {error}", where=self.where, fix=fix) from None

    @cached_property
    def tells(self) -> bool:
        """Whether the template itself marks what the assistant says."""
        return "generation" in self.source and "endgeneration" in self.source

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The rendered conversation, cut at where each assistant's message begins and ends.

        By the template's own {% generation %} marks; without them an assistant's message is what comes after the
        text that asks for it. Raises RonnaError for a template of which neither can be said.
        """
        if self.tells:
            return list(cut_at_marks(self.marked(messages), self.marks))
        parts, done = [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = self.render(messages[:i], reply=True), self.render(messages[: i + 1])
            if not asked.startswith(done) or not answered.startswith(asked):
                what = "the chat template writes earlier messages in another way once there are later ones"
                fix = "put {% generation %} and {% endgeneration %} around what the assistant says in it"
                raise RonnaError(what, where=self.where, fix=fix)
            parts += [Part(asked[len(done) :], False), Part(answered[len(asked) :], True)]
            done = answered
        whole = self.render(messages)
        return [*parts, Part(whole[len(done) :], False)] if whole.startswith(done) else parts


def cut_at_marks(text: str, marks: tuple[str, str]) -> list[Part]:
    parts = []
    for i, piece in enumerate(text.split(marks[0])):
        said, closed, rest = piece.rpartition(marks[1]) if i else ("", "", piece)
        parts += [Part(said, True)] if closed else []
        parts += [Part(rest, False)]
    return parts
