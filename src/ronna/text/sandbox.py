"""Jinja from strangers: a sandbox that reaches nothing, and in which nothing grows or goes on without end.

What a template makes is counted as it is made: turns of loops, characters and items of every intermediate value. Over
`BUDGET` of them, and `SHARE` for each character that it was given, the rendering ends. Whole numbers stay below
`LARGEST`, or one filter could ask for all memory.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ronna.base.errors import RonnaError

BUDGET, SHARE = 4_000_000, 20
LARGEST = 1_000_000
PRODUCT = 100_000_000  # of the sizes of what one operation works on
LONGEST = 256_000  # characters of a template

SIZED = (str, bytes, list, tuple, dict)


class TooMuch(TemplateError):
    """The template went over a limit."""


class Generation(Extension):
    """{% generation %}...{% endgeneration %}: what an assistant says, between marks that no text has."""

    tags = {"generation"}  # noqa: RUF012 - as jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        opening, closing = self.environment.marks  # type: ignore[attr-defined]
        return f"{opening}{caller()}{closing}"


class Counted(NodeTransformer):
    """Loops and joins go through the environment's account."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Call(nodes.EnvironmentAttribute("counted"), [node.iter], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, int) and abs(node.value) > LARGEST:
            raise TooMuch(f"the number {node.value} is too large")
        return node


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. `render` may be called many times, not from several threads at once."""

    intercepted_binops = frozenset(("+", "-", "*", "**", "%"))

    def __init__(self, marks: tuple[str, str]):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControls])
        self.marks, self.left = marks, BUDGET
        self.filters = {name: self.charged(function) for name, function in self.filters.items()}
        self.filters["tojson"] = self.charged(tojson)
        self.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        del self.filters["format"], self.globals["lipsum"]  # the one makes texts of any width, the other nonsense

    def load(self, source: str) -> None:
        """Raises jinja2's TemplateError for what is no template."""
        if len(source) > LONGEST:
            raise TooMuch(f"{len(source):,} characters; a template has {LONGEST:,} at most")
        tree = Counted().visit(self.parse(source))
        code = self.compile(tree, filename="<chat template>")
        self.template = self.template_class.from_code(self, code, self.make_globals(None))

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError (the template's own refusal, an undefined name, a limit)."""
        self.left = BUDGET + SHARE * len(repr(variables))
        try:
            parts = []
            for part in self.template.generate(**variables):
                self.charge(part)
                parts.append(part)
            return "".join(parts)
        except TemplateError:
            raise
        except (RecursionError, MemoryError) as error:
            raise TooMuch(type(error).__name__) from None
        except Exception as error:  # what the template does wrong, in Python's words
            raise TemplateError(f"{type(error).__name__}: {error}") from None

    # The account

    def charge(self, value: Any) -> Any:
        """Takes the size of a value off the budget and gives the value back."""
        self.left -= len(value) if isinstance(value, SIZED) else 1
        if self.left < 0:
            raise TooMuch("the template goes on for too long")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise TooMuch("the template makes numbers that are too large")
        return value

    def charged(self, function: Any) -> Any:
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.weigh(*args, *kwargs.values())
            return self.charge(function(*args, **kwargs))

        vars(filtered).update(getattr(function, "__dict__", {}))  # jinja marks functions that want its context
        return filtered

    def weigh(self, *values: Any) -> None:
        """Raises TooMuch for what could multiply into too much, as replacing or joining does."""
        sizes = [len(v) if isinstance(v, SIZED) else abs(v) if isinstance(v, int) else 1 for v in values]
        if math.prod(max(1, size) for size in sizes) > PRODUCT:
            raise TooMuch("the template makes texts that are too long")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.charge(None)
            yield item

    def joined(self, *parts: Any) -> str:
        return self.charge("".join(str(part) for part in parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 1000 and abs(right) <= 10):
            raise TooMuch("the template makes numbers that are too large")
        if operator == "*":
            self.weigh(left, right)
        if operator == "%" and isinstance(left, str):
            raise TooMuch("formatting with % is not allowed")
        return self.charge(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__name__", "") in ("format", "format_map"):
            raise TooMuch("formatting with str.format is not allowed")
        self.weigh(getattr(function, "__self__", None), *args, *kwargs.values())
        return self.charge(super().call(context, function, *args, **kwargs))


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def refuse(message: Any) -> None:
    raise TemplateError(str(message))


def compiled(source: str, marks: tuple[str, str], where: str) -> Sandbox:
    """Raises RonnaError for a template that cannot be read."""
    sandbox = Sandbox(marks)
    try:
        sandbox.load(source)
    except (TemplateError, RecursionError) as error:
        raise RonnaError(f"the chat template cannot be read: {error}", where=where, fix="mend it") from None
    return sandbox
