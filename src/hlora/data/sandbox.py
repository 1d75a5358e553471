"""Templates from files that others wrote: they see a row's values, and end soon.

Jinja2's sandbox keeps them from Python. Here loops, calls and sizes are bounded as well, since a
template of one line can run for years or fill the memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from jinja2.visitor import NodeTransformer

from hlora.errors import one_line

SECONDS = 2.0
"""What one rendering may take."""
LARGEST = 1_000_000
"""Characters, items, or a number that says how many."""


class Sandbox(SandboxedEnvironment):
    """An environment whose templates are bounded in time and size.

    Args:
        finalize: looks at every value that is printed.
        options: of jinja2's environment.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(
        self, finalize: Callable[[Any], Any] = lambda value: value, **options: Any
    ) -> None:
        usual = {"undefined": jinja2.StrictUndefined, "keep_trailing_newline": True}
        super().__init__(finalize=lambda value: _small(finalize(value)), **(options or usual))
        self.globals = {k: self.globals[k] for k in ("range", "dict", "namespace")}
        self.filters = {name: _bounded(f) for name, f in self.filters.items()}
        self.filters |= {"_ticking": self._ticking, "_joined": _joined}
        self.until = 0.0

    def rendered(self, template: str, values: dict[str, Any]) -> str:
        """The text of a template.

        Raises:
            ValueError: it is wrong, or does what it may not; says what.
        """
        try:
            return _compiled(self, template).render(**values)
        except jinja2.UndefinedError as error:
            raise KeyError(str(error)) from None
        except (MemoryError, RecursionError):
            raise ValueError("it takes too much") from None
        except Exception as error:  # a filter may raise anything
            raise ValueError(one_line(error)) from None

    def from_string(self, *args: Any, **kwargs: Any) -> jinja2.Template:
        template = super().from_string(*args, **kwargs)
        render = template.render

        def timed(*values: Any, **named: Any) -> str:
            self.until = time.monotonic() + SECONDS
            return render(*values, **named)

        template.render = timed  # type: ignore[method-assign]
        return template

    def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Bounds().visit(source), *args, **kwargs)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        _check(__obj, args, kwargs)
        return _small(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if hasattr(v, "__len__") else abs(v) for v in (left, right)]
        if operator == "**" or (
            operator == "*" and any(hasattr(v, "__len__") for v in (left, right))
        ):
            if sizes[0] * sizes[1] > LARGEST or (operator == "**" and max(sizes) > 1000):
                raise SecurityError(f"the result of {operator} is too large")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("% on text is not allowed")
        return _small(super().call_binop(context, operator, left, right))

    def _tick(self) -> None:
        if time.monotonic() > self.until:
            raise SecurityError(f"it runs for more than {SECONDS:g} s")

    def _ticking(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._tick()
            yield value


class ChatSandbox(Sandbox, ImmutableSandboxedEnvironment):
    """The same in place of the environment that transformers renders chat templates in."""

    def from_string(self, *args: Any, **kwargs: Any) -> jinja2.Template:
        self.filters["tojson"] = _bounded(self.filters["tojson"])  # transformers put in its own
        return super().from_string(*args, **kwargs)


@lru_cache(maxsize=256)
def _compiled(environment: Sandbox, template: str) -> jinja2.Template:
    return environment.from_string(template)


class _Bounds(NodeTransformer):
    """Puts the bounds where the compiled code would have none: into loops and `~`."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_ticking")
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
        self.generic_visit(node)
        return _filter(jinja2.nodes.List(node.nodes, lineno=node.lineno), "_joined")


def _filter(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _joined(values: list[Any]) -> str:
    return str(_small("".join(map(str, values))))


def _bounded(filter: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(filter)  # with the marks by which jinja2 knows what to pass
    def call(*args: Any, **kwargs: Any) -> Any:
        _check(filter, args, kwargs)
        return _small(filter(*args, **kwargs))

    return call


def _check(what: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    """Before a filter or method makes something large of small arguments."""
    given = [*args, *kwargs.values()]
    name = getattr(what, "__name__", "")
    if any(isinstance(v, int) and abs(v) > LARGEST for v in given):
        raise SecurityError(f"a number beyond {LARGEST:,}")
    if "format" in name:
        raise SecurityError("format is not allowed")
    if any(word in name for word in ("replace", "join", "indent")):
        owner = getattr(what, "__self__", None)
        lengths = sorted(len(v) for v in (owner, *given) if isinstance(v, (str, list, tuple)))
        if len(lengths) > 1 and lengths[-1] * lengths[-2] > 100 * LARGEST:
            raise SecurityError(f"{name} of texts that are too long")


def _small(value: Any) -> Any:
    """The value, if it would print as a text that is not too long."""
    left, waiting = LARGEST, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (str, bytes, list, tuple, dict, set)):
            left -= len(one)
        if left < 0:
            raise SecurityError(f"a value of more than {LARGEST:,} characters or items")
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set)):
            waiting += one
    return value
