"""What a program's settings are, and how `--help` and the pages show them; `settings_loader` reads them.

A program writes one subclass of `Settings`, whose fields have descriptions. Made directly, it takes nothing but its
arguments, so tests don't depend on the environment.
"""

import argparse
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from typing_extensions import override

# Some thirty years: Python can wait no more than about ten times as long, and fails if it is told to.
LONGEST_SECONDS = 1e9
# What an int64 of the contract holds.
MOST = 2**63 - 1
_PREFIX = "ORMO_"
_HOST_AND_PORT = re.compile(r"(?:[^:/@\s]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")
_SLOW_PART = re.compile(r"(\d+):(\d+(?:\.\d+)?)x")


# Of local steps: for workers, and for the simulator's.
InnerOptimizer = Literal["adamw", "muon", "sgd"]
InnerLearningRate = Annotated[float, Field(gt=0, le=1e6, description="its learning rate at the peak")]
InnerSchedule = Annotated[
    Literal["constant", "cosine"],
    Field(description="how that rate changes: `cosine` falls to 0 at the end of the run"),
]
InnerWarmup = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="share of the run over which that rate rises from near 0 once a worker has joined, 2000 local "
        "steps at the latest; 0: none",
    ),
]


class UsageError(Exception):
    """What was asked for can't be done; the message says in one sentence what came, what was expected, what to do."""


class Settings(BaseModel):
    """What a program was told, one field each; `tuple` and `list` fields read `a,b,c`.

    A field's `title` is the heading of it and of those after it, in `--help` and on the page. The first field of each
    class has one, of a subclass too: its fields come after those of its base.

    Attributes:
        flags_only: fields that neither the environment nor a file sets: what is done once, and only when it is typed,
            and where the variable of that name is meant for another of our programs.
        renamed: the new name of each field by its old one, which is still read, with a warning, until the next release.
    """

    flags_only: ClassVar[frozenset[str]] = frozenset()
    renamed: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        if isinstance(value, str) and _is_sequence(cls.model_fields[info.field_name].annotation):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value


# The names of one setting


def flag_of(name: str) -> str:
    """As it is typed."""
    return f"--{key_of(name)}"


def key_of(name: str) -> str:
    """As a file has it; there an underscore does as well."""
    return name.replace("_", "-")


def variable_of(name: str) -> str:
    """As the environment has it, in upper case; there lower case does as well."""
    return f"{_PREFIX}{name}".upper()


def variables_of(cls: type[Settings]) -> set[str]:
    """The environment variables that these settings are read from, in upper case, with those of their old names."""
    return {variable_of(name) for name in (*names_beside_flags(cls), "config")}


def names_beside_flags(cls: type[Settings]) -> set[str]:
    """The fields that environment and file set, by their new and old names."""
    new = cls.model_fields.keys() - cls.flags_only
    return new | {old for old, now in cls.renamed.items() if now in new}


# Forms that values of several programs have


def checked_address(value: str, *, lowest_port: int) -> str:
    """Return the value, if it is HOST:PORT.

    Args:
        value: as given.
        lowest_port: 0 where a server may pick a free port, else 1.

    Raises:
        ValueError: it is not.
    """
    match = _HOST_AND_PORT.fullmatch(value)
    if match is None or not lowest_port <= int(match.group(1)) <= 65535:
        raise ValueError(
            f"expected HOST:PORT with a port from {lowest_port} to 65535 and no scheme, as in 127.0.0.1:50051"
        )
    return value


def slow_factors(text: str, workers: int) -> list[float]:
    """How many times as long each worker takes for a gradient: 1 for most, the slow ones last.

    Args:
        text: COUNT:FACTORx, or several separated by commas; empty for none.
        workers: how many there are.

    Raises:
        ValueError: the text has another form, a factor below 1, or more slow workers than there are.
    """
    slow: list[float] = []
    for part in filter(None, text.split(",")):
        match = _SLOW_PART.fullmatch(part.strip())
        if match is None or float(match[2]) < 1:
            raise ValueError(f"{part!r} was given, expected COUNT:FACTORx with a factor of at least 1, such as 1:10x")
        slow += [float(match[2])] * int(match[1])
    if len(slow) > workers:
        raise ValueError(f"{text} makes {len(slow)} workers slower, but there are only {workers}")
    return [1.0] * (workers - len(slow)) + slow


# For people


def version_here() -> str:
    """This package's version, as it was installed."""
    return importlib.metadata.version("ormo-parameter-server")


def settings_table(cls: type[Settings], *, own: bool = False) -> str:
    """A Markdown table of the settings, a row per field: flag, environment variable, default, meaning.

    Args:
        cls: which settings.
        own: leave out those that it shares with other programs, from a base class.
    """
    head = ["| flag | environment | default | meaning |", "| --- | --- | --- | --- |"]
    rows: list[str] = []
    for name, info in cls.model_fields.items():
        if own and name not in cls.__annotations__:
            continue
        if info.title is not None:
            rows += ["", f"**{info.title}**", ""]
        if info.title is not None or not rows:
            rows += head
        meaning = (info.description or "").replace("|", "\\|")
        variable = "flag only" if name in cls.flags_only else f"`{variable_of(name)}`"
        rows.append(f"| `{flag_of(name)}` | {variable} | {_default(info)} | {meaning} |")
    return "\n".join(rows).strip() + "\n"


class FlagError(ValueError):
    """A command line that can't be taken apart."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is an exception, not usage text."""

    @override
    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message}; see --help")


def parser_of(cls: type[Settings], program: str) -> argparse.ArgumentParser:
    """The parser of the flags, and the author of `--help`. It knows old names, and does not show them.

    Its `parse_known_args` returns only what was typed, as strings, and raises `FlagError`.
    """
    summary = (cls.__doc__ or "").strip().split("\n")[0]
    parser = _Parser(prog=program, description=summary, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help=f"a TOML file with these settings [{variable_of('config')}]")
    parser.add_argument("--version", action="store_true", help="show the installed version and exit")
    group: argparse._ActionsContainer = parser
    for name, info in cls.model_fields.items():
        if info.title is not None:
            group = parser.add_argument_group(info.title)
        variable = "" if name in cls.flags_only else f"{variable_of(name)}; "
        text = f"{info.description or ''} [{variable}default: {_default(info).strip('`')}]"
        _add_flag(group, name, info, text.replace("%", "%%"))
    for old, new in cls.renamed.items():
        _add_flag(parser, old, cls.model_fields[new], argparse.SUPPRESS)
    return parser


def _add_flag(group: argparse._ActionsContainer, name: str, info: FieldInfo, text: str) -> None:
    if bool in types_of(info.annotation):
        group.add_argument(flag_of(name), dest=name, help=text, action=argparse.BooleanOptionalAction)
    else:
        group.add_argument(flag_of(name), dest=name, help=text, metavar=_metavar(info.annotation))


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, tuple | list):
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return "none" if value is None or value == "" else f"`{value}`"


def _metavar(annotation: Any) -> str:
    types = types_of(annotation)
    literals = [value for member in types if get_origin(member) is Literal for value in get_args(member)]
    if literals:
        return "|".join(map(str, literals))
    if any(map(_is_sequence, types)):
        return "A,B,..."
    return {int: "N", float: "X", Path: "PATH"}.get(types[0], "TEXT")


def types_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a field may have, `None` left out."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for member in get_args(annotation) if member is not type(None))
    return (annotation,)


def _is_sequence(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list)
