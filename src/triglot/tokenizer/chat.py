"""Conversations as the text that a model was trained on: the Jinja template that came with it, in a sandbox.

A template is a program of somebody else. It reaches no attribute that begins with an underscore and changes nothing;
rounds of loops, calls of macros, numbers of ranges and characters that it joins or repeats are counted, so that it
ends. Only what a single method or filter builds is bounded by memory alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, ext, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from triglot.errors import ConfigError, require
from triglot.tokenizer.ids import Message

STEPS = 10_000_000
"""What a template may count up to, a character or a number being one."""
ROUND = 100
"""What a round of a loop counts."""


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The text of a conversation; ConfigError where the template refuses it, fails, or does not come to its end."""
    fits = not isinstance(messages, str) and all(isinstance(one, Mapping) and "role" in one for one in messages)
    require(fits and len(messages) > 0, "messages", "one message or more, each with its role", messages, ConfigError)
    try:
        plain = json.loads(json.dumps({"messages": list(map(dict, messages)), **variables}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"`messages` must be what JSON can hold, but are not: {error}.") from error
    try:
        return _Environment().bounded(template).render(plain)
    except Exception as error:  # which a program of somebody else can raise, whatever it is
        raise ConfigError(
            f"The chat template can not say this conversation: {error or type(error).__name__}"
        ) from error


class _Environment(ImmutableSandboxedEnvironment):
    """What a template sees, as it is elsewhere; counts what can repeat or grow."""

    intercepted_binops = frozenset(["+", "*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        self.left = STEPS
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "range": self._range}

    def bounded(self, source: str) -> Any:
        """The template, which counts whenever a loop goes round and a macro is called, and what it joins."""
        tree = self.parse(source)
        for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
            for node in list(tree.find_all(kind)):
                node.body.insert(0, nodes.ExprStmt(_call("count")))  # type: ignore[attr-defined]  # each of them has one
        for loop in list(tree.find_all(nodes.For)):
            loop.test = loop.test and nodes.And(_call("count"), loop.test)
        self._join_by_calls(tree)
        return self.from_string(tree)

    def _join_by_calls(self, node: nodes.Node) -> None:
        for name, value in list(node.iter_fields()):
            parts = value if isinstance(value, list) else [value]
            for at, part in enumerate(parts):
                if isinstance(part, nodes.Node):
                    self._join_by_calls(part)
                if isinstance(part, nodes.Concat):
                    parts[at] = _call("joined", part.nodes)
            if not isinstance(value, list):
                setattr(node, name, parts[0])

    def count(self, steps: int = ROUND) -> bool:
        """Spend some of what there is."""
        self.left -= steps
        if self.left < 0:
            raise SecurityError(f"it goes on for more than {STEPS:,} steps")
        return True

    def concat(self, parts: Iterable[str]) -> str:
        """What a template, a macro or a block has written."""
        held = list(parts)
        self.count(sum(map(len, held)))
        return "".join(held)

    def joined(self, *parts: Any) -> str:
        """What `~` joins."""
        return self.concat(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A sum, product or power, counted by its size before it is made."""
        sizes = _size(left), _size(right)
        repeats = [number for number in (left, right) if isinstance(number, int)]
        if operator == "+" or len(repeats) != 1 + (operator == "**"):
            self.count(sum(sizes))
        else:
            self.count(max(sizes) * abs(repeats[-1]))
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once what would only be refused when it is used."""
        raise SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}")

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.count(len(numbers))
        return numbers


class _Generation(Extension):
    """`{% generation %}` marks what the model writes, for training elsewhere; here it is text as any other."""

    tags = frozenset(["generation"])  # type: ignore[assignment]  # of which nothing is ever added

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _call(method: str, arguments: Sequence[nodes.Expr] = ()) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


def _size(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else len(value) if hasattr(value, "__len__") else 1


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
