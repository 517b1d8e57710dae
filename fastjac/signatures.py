"""The options and the arguments of a penalty, and the errors of wrong ones.

Signatures are derived from the class of a penalty: its options from ``__init__``, its arguments
from the method that takes them (``call_parameters``). The errors are made when a call has failed,
so that a right call costs nothing.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

POSITIONAL = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
_STARS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def parameters_of(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a method but ``self``."""
    return list(inspect.signature(method).parameters.values())[1:]


def options_of(cls: type[Any]) -> list[inspect.Parameter]:
    """The options of a penalty: the keyword parameters of its ``__init__``.

    If an ``__init__`` passes ``**options`` on, the options of its base class follow. A parameter
    that is positional only (the model of a layer-wise penalty) is not an option.
    """
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        passed_on = False
        for parameter in parameters_of(vars(base)["__init__"]):
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                passed_on = True
            elif parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
                found.setdefault(parameter.name, parameter)
        if not passed_on:
            break
    return sorted(found.values(), key=lambda p: p.kind)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name, and a question that names the nearest known one."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {found[0]!r}?" if found else "."


def shown(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of length {len(value)}"
    if value is None:
        return "None"
    plain = isinstance(value, bool | int | float | str)
    return f"{type(value).__name__} {value!r}" if plain else f"an object of {type(value).__name__}"


def undefined(penalty: Any, method: str, what: str) -> TypeError:
    """The error of a penalty that does not define a method; ``what`` says what it returns."""
    own = {
        name
        for cls in type(penalty).__mro__
        if not cls.__module__.startswith(("fastjac.", "torch."))
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith("__")
    }
    found = difflib.get_close_matches(method, own, n=1)
    but = f", but {found[0]}" if found else ""
    return TypeError(f"{type(penalty).__name__} does not define {method}{but}: define {what}")


# ---- options


class Accepted:
    """What the constructor of a penalty accepts, as far as this is known before it runs."""

    def __init__(self, cls: type[Any]) -> None:
        parameters = parameters_of(cls.__init__)
        kinds = {p.kind for p in parameters}
        places = [p for p in parameters if p.kind in POSITIONAL]
        self.most = 2**31 if inspect.Parameter.VAR_POSITIONAL in kinds else len(places)
        # An ``__init__`` that takes **options may take some of them out before it passes them on.
        known = {p.name for p in options_of(cls)}
        self.names = None if inspect.Parameter.VAR_KEYWORD in kinds else frozenset(known)
        # A number, such as n_proj, for which a model is passed if the class is taken for a function
        self.number = bool(places) and isinstance(places[0].default, int | float)

    def refuses(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Whether the arguments of a constructor are wrong for certain."""
        if len(args) > self.most:
            return True
        if self.number and args and isinstance(args[0], Tensor | nn.Module):
            return True
        return self.names is not None and not options.keys() <= self.names


def wrong_options(cls: type[Any], args: tuple[Any, ...], options: Iterable[str]) -> TypeError:
    """The error of a constructor that was given something it does not know."""
    name, known = cls.__name__, [p.name for p in options_of(cls)]
    unknown = [option for option in options if option not in known]
    if unknown:
        return no_option(name, unknown[0], known)
    parameters = parameters_of(cls.__init__)
    places = [p.name for p in parameters if p.kind in POSITIONAL]
    given = ", ".join(type(a).__name__ for a in args)
    if any(isinstance(a, Tensor | nn.Module) for a in args) and places[:1] != ["model"]:
        return TypeError(
            f"{name} takes options when it is created, and was given ({given}): create the penalty "
            f"once, penalty = {name}(), and call it, penalty{form(cls)}"
        )
    attach = ""
    if places[:1] == ["model"]:
        attach = f". {name}(model) attaches the penalty, and {name}(){form(cls)} calls it"
    return TypeError(
        f"{name} takes {', '.join(places) or 'nothing'} by position, and was given ({given}): pass "
        f"options by name, such as weight=0.1{attach}. Its options are {', '.join(known)}"
    )


def no_option(name: str, unknown: str, known: list[str]) -> TypeError:
    """The error of an option that a penalty or a function does not have."""
    return TypeError(
        f"{name} has no option {unknown!r}{nearest(unknown, known)} Its options are "
        f"{', '.join(known)}"
    )


def with_base_called(cls: type[Any], has: str) -> None:
    """Makes a class raise if its ``__init__`` skips that of its base, which sets ``has``."""
    init = vars(cls).get("__init__")
    if init is None:
        return

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        if has not in vars(self):
            raise TypeError(
                f"{cls.__name__}.__init__ did not call the __init__ of its base class: take "
                "**options and begin with super().__init__(**options)"
            )

    cls.__init__ = checked


# ---- arguments of a call


def names_of(cls: type[Any], graph: bool) -> list[str]:
    """The names of the arguments of a call, in the graph form or in the model form."""
    names = [p.name for p in cls.call_parameters()]
    if names[1] == "output":  # both forms exist
        names[:2] = ("x", "output") if graph else ("model", "x")
    return names


def form(cls: type[Any], graph: bool = False) -> str:
    """The arguments of a call, ``(model, x, target)``."""
    shown = []
    for name, p in zip(names_of(cls, graph), cls.call_parameters(), strict=True):
        if p.kind is p.VAR_POSITIONAL:
            shown.append("...")
        elif p.kind is not p.VAR_KEYWORD:
            shown.append(name if p.default is p.empty else f"{name}=...")
    return f"({', '.join(shown)})"


def forms(cls: type[Any]) -> str:
    """How a penalty is called."""
    both = cls.call_parameters()[1].name == "output"
    return f"call it with {form(cls)}" + (f" or {form(cls, graph=True)}" if both else "")


def wrong_call(cls: type[Any], args: tuple[Any, ...], named: dict[str, Any]) -> TypeError | None:
    """The error of a call whose arguments the penalty does not take; None if it takes them."""
    name, parameters = cls.__name__, cls.call_parameters()
    names = names_of(cls, bool(args) and isinstance(args[0], Tensor))
    given = ", ".join(type(a).__name__ for a in args)
    if names[0] == "x" and len(args) > 1 and isinstance(args[1], nn.Module):
        return TypeError(
            f"{name} was called with ({given}), and the model comes first: {forms(cls)}"
        )
    kinds = {p.kind for p in parameters}
    by_name = {p.name for p in parameters[2:] if p.kind not in _STARS}
    for key in named:
        if key in by_name or kinds.intersection(_STARS):  # which go to a function of the user
            continue
        if key in {"model", "x", "output"}:
            return TypeError(f"{name} takes {key} by position: {forms(cls)}")
        if key in {p.name for p in options_of(cls)}:
            return TypeError(
                f"{key} is an option of {name} and not an argument of its call: pass it when the "
                f"penalty is created, {name}({key}=...)"
            )
        return TypeError(
            f"{name} has no argument {key!r}{nearest(key, by_name) or ':'} {forms(cls)}"
        )
    missing = [
        called
        for i, (called, p) in enumerate(zip(names, parameters, strict=True))
        if p.default is p.empty
        and p.kind not in _STARS
        and (i >= len(args) or p.kind is p.KEYWORD_ONLY)
        and called not in named
    ]
    if missing:
        return TypeError(f"{name} needs {' and '.join(missing)}: {forms(cls)}")
    places = sum(p.kind in POSITIONAL for p in parameters)
    if len(args) > places and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return TypeError(f"{name} was called with {len(args)} arguments ({given}): {forms(cls)}")
    return None


def functional_of(cls: type[Any], name: str) -> Callable[..., Any]:
    """The function ``name(x, output, *targets, **options)`` of a penalty class."""
    first, second, *rest = cls.call_parameters()
    if second.name == "output":  # which is the name of an option too
        first, second = first.replace(name="model_or_x"), second.replace(name="x_or_output")
    arguments = [p.replace(kind=inspect.Parameter.POSITIONAL_ONLY) for p in (first, second)] + rest
    options = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options_of(cls) if p.name != "every"
    ]
    option_names = frozenset(p.name for p in options)
    known = option_names | {p.name for p in rest}

    def function(*args: Any, **kwargs: Any) -> Any:
        unknown = kwargs.keys() - known
        if unknown:
            raise _unknown(cls, name, min(unknown), [p.name for p in [*rest, *options]])
        chosen = {key: kwargs.pop(key) for key in option_names & kwargs.keys()}
        return cls(**chosen)(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        sorted([*arguments, *options], key=lambda p: p.kind),
        return_annotation="Tensor | tuple[Any, Tensor]",
    )
    function.__doc__ = (
        f"The function of :class:`{cls.__name__}`: ``{cls.__name__}(**options)(...)``.\n"
        "\n    Takes the arguments of either call form and, by keyword, the options of the class\n"
        f"    (all but ``every``).\n\n    {(cls.__doc__ or '').strip()}\n    "
    )
    return function


def _unknown(cls: type[Any], name: str, key: str, known: list[str]) -> TypeError:
    """The error of a function that was given a keyword it does not know."""
    if key == "every":
        return TypeError(
            f"every is an option of the module alone, since {name}() cannot count its calls: "
            f"create penalty = {cls.__name__}(every=...) once, and call penalty{form(cls)}"
        )
    if key in ("model", "x", "output", "model_or_x", "x_or_output"):
        return TypeError(f"{name} takes the arguments before the options by position: {forms(cls)}")
    return no_option(name, key, known)
