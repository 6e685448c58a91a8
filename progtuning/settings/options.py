"""An option is one line: a field of a settings class, with its name, type, default, range and help.

    class TrainConfig(Options):
        batch_size: int = option(32, "examples an optimizer step", at_least=1)        # --batch-size

The command line (`add_options`, `given`), the check of each value (`Options.check`) and its name in messages
(`option_name`) are made from it. What ties two options is checked in the `__post_init__` of their class.
"""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from progtuning.base.checks import INFINITY, check_choice, check_choices, check_number


@dataclass(frozen=True)
class Option:
    """What an option is beside its field's name, type and default."""

    help: str  # without the default, which is added unless it is None; {choices} stands for them
    name: str | None = None  # None: the field's
    metavar: str | None = None  # how the help calls its value; None: by the last word of its name
    choices: tuple[str, ...] | None = None  # a field of a tuple takes several
    at_least: float | None = None  # None: any value
    at_most: float = INFINITY
    is_text: bool = False  # the command line hands its text on, for what reads it to know more
    is_flag: bool = False  # a bool without a --no- form
    beside: tuple[str, tuple[str, ...]] | None = None  # a field, and its values without which this says nothing


def option(default, help: str, **rule) -> Any:
    """Return a field of an `Options` class, with the default and an Option of `help` and `rule`."""
    return field(default=default, metadata={"option": Option(help, **rule)})


class Options:
    """Base of the frozen dataclasses of settings. Raises InputError that names the option that is out of range."""

    def __post_init__(self):
        self.check(**{name: getattr(self, name) for name in options(type(self))})

    @classmethod
    def check(cls, **values) -> None:
        """Raise InputError where one of these values, by field, is out of its option's range."""
        known = options(cls)
        for name, value in values.items():
            _check(known[name], value)


def options(settings: type) -> dict[str, Field]:
    """Return those fields of a settings class that are options, by name."""
    return {one.name: one for one in fields(settings) if "option" in one.metadata}


def _check(one: Field, value) -> None:
    rule, kind, flag = one.metadata["option"], _kind(one), _flag(one)
    if value is None and NoneType in get_args(one.type):
        return
    if rule.choices:
        (check_choices if kind is tuple else check_choice)(flag, value, rule.choices)
    elif rule.at_least is not None:
        check_number(flag, value, kind, rule.at_least, rule.at_most)


def _kind(one: Field) -> type:
    """Return int, float, bool, str or tuple: a field's type, without what a tuple holds and without None."""
    kind = get_args(one.type)[0] if isinstance(one.type, UnionType) else one.type
    return get_origin(kind) or kind


def _name(one: Field) -> str:
    return one.metadata["option"].name or one.name.replace("_", "-")


def _flag(one: Field) -> str:
    return f"--{_name(one)}"


def option_name(settings: type, path: str) -> str:
    """Return the option that sets a field of a settings class, or of settings in it: --lora-r for "peft/lora_r".

    A field that is not known, as of another version, has the option that its name would have.
    """
    name, _, rest = path.partition("/")
    inner = {one.name: one.type for one in fields(settings)}.get(name)
    if rest and is_dataclass(inner):
        return option_name(inner, rest)
    known = options(settings)
    return _flag(known[path]) if path in known else f"--{path.replace('/', '-').replace('_', '-')}"


def add_options(
    parser: argparse.ArgumentParser,
    settings: type,
    only: Collection[str] | None = None,
    defaults: Mapping[str, object] | None = {},
) -> None:
    """Add the options of a settings class (`only` these fields). One not given is absent, so that a recipe can tell.

    The help shows a field's default, or another that it has here by `defaults`; none where that is None.
    """
    for name, one in options(settings).items():
        if only is None or name in only:
            default = None if defaults is None else defaults.get(name, one.default)
            values = {"dest": _name(one), "default": argparse.SUPPRESS, "help": _help(one, default).replace("%", "%%")}
            parser.add_argument(_flag(one), **values, **_argument(one))


def _help(one: Field, default: object) -> str:
    rule = one.metadata["option"]
    text = rule.help
    if rule.choices:
        text = text.replace("{choices}", f"{', '.join(rule.choices[:-1])} or {rule.choices[-1]}")
    if default is None or rule.is_flag:
        return text
    shown = ",".join(default) if isinstance(default, tuple) else default
    return f"{text} ({str(shown).lower() if isinstance(shown, bool) else shown})"


def _argument(one: Field) -> dict:
    """Return how argparse reads the option."""
    rule, kind = one.metadata["option"], _kind(one)
    if kind is bool:
        return {"action": "store_true" if rule.is_flag else argparse.BooleanOptionalAction}
    metavar = rule.metavar or _name(one).rpartition("-")[2].upper()
    return {"type": str if rule.is_text else _split if kind is tuple else kind, "metavar": metavar}


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def given(args: argparse.Namespace, settings: type) -> dict:
    """Return the values of a settings class that are given on the command line, by field."""
    return {name: getattr(args, _name(one)) for name, one in options(settings).items() if hasattr(args, _name(one))}
