"""The jinja2 environment that chat templates run in: no way out, and no way to run or grow without end.

Templates come with checkpoints and requests, so they are untrusted code. jinja2's sandbox keeps them from Python's
internals; what it lacks is a bound on work and memory, which is added here: loop rounds and calls are counted and
timed, and what can make a long string or list is measured before it is carried out.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 2_000_000
"""Loop rounds and calls of one rendering."""
MAX_SECONDS = 10.0
"""Time that one rendering may take; looked at with each step."""
MAX_LENGTH = 16 * 2**20
"""Characters of a string, and items of a list, that a template may build."""
ITEM_LENGTH = 16
"""Characters that an item of a list or mapping counts for beside its own."""
MAX_BITS = 4096
"""Size of the numbers that a template may compute with."""

TEXT_FILTERS = (
    "batch", "capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower", "pprint",
    "replace", "round", "slice", "string", "striptags", "sum", "title", "trim", "truncate", "upper", "urlencode", "urlize",
    "wordcount", "wordwrap", "xmlattr",
)  # fmt: skip
"""jinja2's filters that turn their argument to text, or can make much out of little."""

INSERTIONS: Mapping[str, Callable[[str, list[Any]], int]] = {
    "expandtabs": lambda text, given: text.count("\t"),
    "format": lambda text, given: text.count("%") + text.count("{"),
    "format_map": lambda text, given: text.count("{"),
    "indent": lambda text, given: text.count("\n") + 1,
    "replace": lambda text, given: text.count(str(given[0])) if given else 0,
    "translate": lambda text, given: len(text),
    "urlize": lambda text, given: len(text.split()),
    "wordwrap": lambda text, given: len(text),
}
"""How often an operation puts one of its arguments into the text, at most."""
UNSAFE_ATTRIBUTES = frozenset({"encode", "to_bytes"})
"""Ways to bytes, which are of no use in a template and whose growth is not measured."""


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What transformers offers to chat templates, within bounds; passing one raises TemplateError.

    ``start`` must be called before each rendering. Threads may render at the same time.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], finalize=_measured
        )
        self._local = threading.local()
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.globals.update(dict=_Dict(), namespace=_TemplateNamespace)
        for name in TEXT_FILTERS:
            self.filters[name] = _bounded_filter(name, self.filters[name])
        self.filters.update(tojson=_tojson, _counted=self._counted, _concatenated=_concatenated)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What macros, ``set`` blocks and the like join their output with."""
        return bounded_join(parts)

    def start(self) -> None:
        """Give the rendering that now begins in this thread its steps and its time."""
        self._local.steps = MAX_STEPS
        self._local.deadline = time.monotonic() + MAX_SECONDS

    def _step(self) -> None:
        self._local.steps -= 1
        if self._local.steps < 0:
            raise TemplateError(f"the template takes more than {MAX_STEPS} loop rounds and calls")
        if time.monotonic() > self._local.deadline:
            raise TemplateError(f"the template takes longer than {MAX_SECONDS:g} seconds")

    @pass_context  # keeps jinja2 from evaluating it when it compiles
    def _counted(self, context: Context, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _BoundWork().visit(super()._parse(source, name, filename))
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNSAFE_ATTRIBUTES and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._step()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # jinja2 wraps str.format
        if isinstance(owner, str):
            check_growth(__obj.__name__, owner, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            check_growth("format", left, right if isinstance(right, tuple) else (right,), {})
        elif (
            operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple))
        ):
            _check_length(len(left) + len(right))
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        return super().call_binop(context, operator, left, right)


class GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's tokens for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it an instance variable)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _BoundWork(NodeTransformer):
    """Has every loop counted, and every ``~`` measured, by a filter of the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_concatenated", [], [], None, None, lineno=node.lineno)


class _Dict:
    """``dict(...)`` for templates without handing them the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """``namespace(...)`` that takes no name with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def bounded_join(parts: Iterable[str]) -> str:
    """The parts put together, if that is at most ``MAX_LENGTH`` characters."""
    kept = []
    length = 0
    for part in parts:
        length += len(part)
        _check_length(length)
        kept.append(part)
    return "".join(kept)


def plain_data(value: Any) -> Any:
    """A copy made of JSON types (and tuples) alone, so that a template meets no object with methods of its own.

    Mappings and pydantic models become dicts; anything else that JSON does not have becomes "<its type>".
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(map(plain_data, value))
            if type(value) in (list, tuple)
            else list(map(plain_data, value))
        )
    dump = getattr(value, "model_dump", None)
    return plain_data(dump()) if callable(dump) else f"<{type(value).__name__}>"


def check_growth(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a text operation whose result could be longer than ``MAX_LENGTH``, judged by what goes in.

    Args:
        name: of the filter or the method of str.
        value: what it works on.
        args, kwargs: its other arguments.
    """
    given = [*args, *kwargs.values()]
    _check_length(_length((value, given)) + _inserted(name, value, given))
    numbers = [argument for argument in given if isinstance(argument, int)]
    if name in ("format", "format_map"):
        numbers = _widths(str(value), numbers)
    if name == "round" and max(map(abs, numbers), default=0) > MAX_BITS:
        raise TemplateError(f"round({numbers[0]}) is beyond the {MAX_BITS} digits that a template may use")
    _check_length(max(map(abs, numbers), default=0))


def _inserted(name: str, value: Any, given: list[Any]) -> int:
    """At most how many characters the operation inserts: how often it inserts, times the longest argument."""
    if name == "join":  # of the separator and the parts, either may be the value
        sizes = [len(item) for item in given if isinstance(item, (str, list, tuple))]
        return max(sizes, default=0) * (len(value) if isinstance(value, (str, list, tuple)) else 0)
    if name not in INSERTIONS:
        return 0
    sizes = [len(item) for item in given if isinstance(item, str)]
    sizes += [_length(item) for item in given if isinstance(item, (Mapping, list, tuple))]
    if name not in ("format", "format_map"):
        sizes += [item for item in given if isinstance(item, int)]
    return max(sizes, default=0) * INSERTIONS[name](str(value), given)


def _widths(text: str, values: list[int]) -> list[int]:
    """Field widths and precisions that a format string names, with those of the values that could serve as one."""
    text = text.replace("{{", "").replace("}}", "")
    fields = re.findall(r"%[-#0 +.\d]*\*?|\{[^{}]*\}", text)
    nested = any(field.endswith("*") for field in fields) or re.search(r"\{[^{}]*\{", text)
    return [
        *(values if nested else ()),
        *(int(width) for field in fields for width in re.findall(r"\d{1,20}", field)),
    ]


def _length(value: Any) -> int:
    """At least how many characters ``str(value)`` may have, without making it; raises as soon as it is too many.

    A few lists that hold each other can stand for a text of any length. An item counts as ``ITEM_LENGTH`` beside its
    own characters, which also bounds the time spent here.
    """
    length = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            length += len(item)
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        length += ITEM_LENGTH
        _check_length(length)
    return length


def _measured(value: Any) -> Any:
    """jinja2's ``finalize``: sees everything that is put out."""
    if isinstance(value, (list, tuple, dict)):
        _length(value)
    return value


def _concatenated(parts: list[Any]) -> str:
    _length(parts)
    return bounded_join(map(str, parts))


def _bounded_filter(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, measured before it runs; jinja2's mark for an extra first argument is kept."""
    passed = getattr(original, "jinja_pass_arg", None)

    def bounded(*args: Any, **kwargs: Any) -> Any:
        extra, (value, *rest) = (args[:1], args[1:]) if passed else ((), args)
        if isinstance(value, Iterator):
            value = list(value)
        check_growth(name, value, tuple(rest), kwargs)
        return original(*extra, value, *rest, **kwargs)

    if passed:
        bounded.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return bounded


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TemplateError(f"the template builds more than {MAX_LENGTH} characters or items")


def _check_product(operator: str, left: Any, right: Any) -> None:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
            _check_length(len(sequence) * times)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise TemplateError(f"the template computes with numbers of more than {MAX_BITS} bits")


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    _check_length(256 * len(format))  # the most that strftime makes of it
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes HTML; models were trained on plain JSON."""
    width = indent if isinstance(indent, int) else len(indent or "")
    _check_length(_length(value) * max(1, width))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
