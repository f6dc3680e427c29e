"""Settings of a program from flags, environment and a TOML file: one frozen class, checked when it is made.

A program writes one subclass of `Settings` whose fields have descriptions, and calls `load_settings` in its
entry point. Made directly, a settings class takes nothing but its arguments: tests don't depend on the
environment.
"""

import argparse
import difflib
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ormo_protos.logs import printable

BAD_SETTINGS_EXIT_CODE = 2
# Some thirty years: Python can wait for no more than about ten times as long, and fails if it is told to.
LONGEST_SECONDS = 1e9
# What an int64 of the contract holds.
MOST = 2**63 - 1
_HOST_AND_PORT = re.compile(r"(?:[^:\s]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})")


class Settings(BaseSettings):
    """What a program was told, one field each; `tuple` and `list` fields read `a,b,c`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="ORMO_",
        env_ignore_empty=True,  # compose files and manifests write `ORMO_X=` for "not set"
        enable_decoding=False,  # lists are comma-separated everywhere, not JSON in one place
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object, info: Any) -> object:
        if isinstance(value, str) and _is_sequence(cls.model_fields[info.field_name].annotation):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave only the arguments: environment and file are `load_settings`' to read."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings  # passed by name
        return (init_settings,)


S = TypeVar("S", bound=Settings)


class SettingsProblemsError(ValueError):
    """Settings that can't be used.

    Attributes:
        problems: one sentence each, with the flag, where the value came from and what was expected.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def load_settings(cls: type[S], argv: Sequence[str], *, program: str) -> S:
    """The settings as flags, environment and file give them, in this order of precedence.

    Besides the fields' flags there are `--config FILE` (also as an environment variable) and `--help`.

    Args:
        cls: which settings; its docstring's first line heads the help.
        argv: the arguments after the program's name (and its command, if it has several).
        program: how the user called it, as in "ormo-worker run", for help and errors.

    Raises:
        SystemExit: code 2 after one sentence per problem on stderr; code 0 after `--help`.
    """
    try:
        return read_settings(cls, argv, os.environ, program=program)
    except SettingsProblemsError as error:
        for problem in error.problems:
            sys.stderr.write(f"{program}: {printable(problem)}\n")
        sys.exit(BAD_SETTINGS_EXIT_CODE)


def read_settings(cls: type[S], argv: Sequence[str], environment: Mapping[str, str], *, program: str) -> S:
    """As `load_settings`, with the environment as an argument and problems as an exception.

    Raises:
        SettingsProblemsError: an unknown flag or key, a missing or bad value, or a file that can't be read.
        SystemExit: code 0 after `--help`.
    """
    given = _Given(cls)
    given.read_flags(argv, program)
    given.read_environment(environment)
    given.read_file()
    if given.problems:
        raise SettingsProblemsError(given.problems)
    try:
        return cls(**given.values())
    except ValidationError as error:
        raise SettingsProblemsError([given.problem(details) for details in error.errors()]) from None


def dispatch(
    argv: Sequence[str], commands: Mapping[str, Callable[[list[str]], int]], *, program: str, usage: str
) -> int:
    """Run the command that the first argument names with the arguments after it; returns its exit code.

    Args:
        argv: the arguments after the program's name.
        commands: what to call for each command.
        program: the program's name, for errors.
        usage: what `--help` prints, and what follows after an unknown command.
    """
    arguments = list(argv)
    command = arguments.pop(0) if arguments else ""
    if command in commands:
        return commands[command](arguments)
    if command in ("-h", "--help", "help"):
        sys.stdout.write(usage)
        return 0
    expected = " or ".join(commands)
    sys.stderr.write(f"{program}: {command or 'no command'!r} came, expected {expected}\n{usage}")
    return BAD_SETTINGS_EXIT_CODE


def checked_address(value: str, *, lowest_port: int) -> str:
    """The value, if it is HOST:PORT.

    Args:
        value: as given.
        lowest_port: 0 where a server may pick a free port, else 1.

    Raises:
        ValueError: it is not.
    """
    match = _HOST_AND_PORT.fullmatch(value)
    if match is None or not lowest_port <= int(match.group(1)) <= 65535:
        raise ValueError(f"expected HOST:PORT with a port from {lowest_port} to 65535, as in 127.0.0.1:50051")
    return value


def settings_table(cls: type[Settings], *, own: bool = False) -> str:
    """A Markdown table of the settings, a row per field: flag, environment variable, default, meaning.

    Args:
        cls: which settings.
        own: leave out those that it shares with other programs, from a base class.
    """
    rows = ["| flag | environment | default | meaning |", "| --- | --- | --- | --- |"]
    for name, info in cls.model_fields.items():
        if own and name not in cls.__annotations__:
            continue
        meaning = (info.description or "").replace("|", "\\|")
        rows.append(f"| `{_flag(name)}` | `{_variable(cls, name)}` | {_default(info)} | {meaning} |")
    return "\n".join(rows) + "\n"


@dataclass
class _Given:
    """What the three places said, kept apart so that a complaint can name the place."""

    cls: type[Settings]
    flags: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    problems: list[str] = field(default_factory=list)

    def read_flags(self, argv: Sequence[str], program: str) -> None:
        try:
            given, unknown = _parser(self.cls, program).parse_known_args(argv)
        except _FlagError as error:
            self.problems.append(str(error))
            return
        self.flags = vars(given)
        self.config = self.flags.pop("config", None)
        self.problems += _unknown_arguments(self.cls, unknown)

    def read_environment(self, environment: Mapping[str, str]) -> None:
        source = EnvSettingsSource(self.cls)
        source.env_vars = {name.lower(): value for name, value in environment.items() if value}
        self.environment = source()
        if self.config is None:
            self.config = environment.get(_variable(self.cls, "config")) or None

    def read_file(self) -> None:
        if self.config is None:
            return
        try:
            table = tomllib.loads(Path(self.config).read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or str(error)
            self.problems.append(f"the settings file {self.config} can't be read: {reason}")
        except ValueError as error:  # TOML's and UTF-8's
            self.problems.append(f"the settings file {self.config} is no valid TOML: {error}")
        else:
            self.file = {key.replace("-", "_"): value for key, value in table.items()}
            self.problems += self._unknown_keys(table)

    def _unknown_keys(self, keys: Iterable[str]) -> list[str]:
        known = [name.replace("_", "-") for name in self.cls.model_fields]
        unknown = [key.replace("_", "-") for key in keys if key.replace("-", "_") not in self.cls.model_fields]
        return [f"the settings file {self.config} has an unknown key {k!r}{_guess(k, known)}" for k in unknown]

    def values(self) -> dict[str, Any]:
        return self.file | self.environment | self.flags

    def problem(self, details: ErrorDetails) -> str:
        """One sentence for what pydantic found."""
        message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if not details["loc"]:
            return message
        name = str(details["loc"][0])
        if details["type"] == "missing":
            return (
                f"{_flag(name)} is missing: give it as a flag, in the environment as "
                f"{_variable(self.cls, name)}, or in the file that --config names"
            )
        return f"{_flag(name)} is {self._shown(name, details)}{self._place(name)}: {_lowered(message)}"

    def _shown(self, name: str, details: ErrorDetails) -> str:
        if SecretStr in _members(self.cls.model_fields[name].annotation):
            return "not usable (its value is not shown)"
        return repr(self.values().get(name, details["input"]))

    def _place(self, name: str) -> str:
        if name in self.flags:
            return ""
        if name in self.environment:
            return f" (from the environment, {_variable(self.cls, name)})"
        return f" (from {self.config})" if name in self.file else " (its default)"


class _FlagError(ValueError):
    """A command line that can't be taken apart."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is an exception, not usage text."""

    def error(self, message: str) -> NoReturn:
        raise _FlagError(f"{message}; see --help")


def _parser(cls: type[Settings], program: str) -> argparse.ArgumentParser:
    summary = (cls.__doc__ or "").strip().split("\n")[0]
    parser = _Parser(prog=program, description=summary, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    variable = _variable(cls, "config")
    parser.add_argument("--config", metavar="FILE", help=f"a TOML file with these settings [{variable}]")
    for name, info in cls.model_fields.items():
        text = f"{info.description or ''} [{_variable(cls, name)}; default: {_default(info).strip('`')}]"
        text = text.replace("%", "%%")
        if bool in _members(info.annotation):
            parser.add_argument(_flag(name), dest=name, help=text, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(_flag(name), dest=name, help=text, metavar=_metavar(info.annotation))
    return parser


def _unknown_arguments(cls: type[Settings], unknown: Sequence[str]) -> list[str]:
    known = [_flag(name) for name in (*cls.model_fields, "config")]
    problems = []
    for argument in unknown:
        word = argument.split("=")[0]
        if word.startswith("-"):
            problems.append(f"unknown flag {word}{_guess(word, known)}")
    # A value that follows an unknown flag is no problem of its own.
    return problems or [f"unexpected argument {argument!r}: settings are given as flags" for argument in unknown]


def _guess(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {near[0]}?" if near else "; --help lists what there is"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(cls: type[Settings], name: str) -> str:
    return f"{cls.model_config.get('env_prefix', '')}{name}".upper()


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
    members = _members(annotation)
    literals = [value for member in members if get_origin(member) is Literal for value in get_args(member)]
    if literals:
        return "|".join(map(str, literals))
    if any(_is_sequence(member) for member in members):
        return "A,B,..."
    return {int: "N", float: "X", Path: "PATH"}.get(members[0], "TEXT")


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that a field may have, `None` left out."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for member in get_args(annotation) if member is not type(None))
    return (annotation,)


def _is_sequence(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list)


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
