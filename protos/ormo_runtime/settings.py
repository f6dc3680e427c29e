"""Settings of a program from flags, environment and a TOML file: one frozen class, checked when it is made.

A program writes one subclass of `Settings` whose fields have descriptions, and calls `load_settings` in its
entry point. Made directly, a settings class takes nothing but its arguments: tests don't depend on the
environment.
"""

import argparse
import difflib
import importlib.metadata
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ormo_runtime.all_settings import ALL_SETTINGS, nearest_variable
from ormo_runtime.logs import first_words, printable

BAD_SETTINGS_EXIT_CODE = 2
# Some thirty years: Python can wait for no more than about ten times as long, and fails if it is told to.
LONGEST_SECONDS = 1e9
# What an int64 of the contract holds.
MOST = 2**63 - 1
_HOST_AND_PORT = re.compile(r"(?:[^:/@\s]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})")


class Settings(BaseSettings):
    """What a program was told, one field each; `tuple` and `list` fields read `a,b,c`.

    A field's `title` is the heading of it and of those after it, in `--help` and on the page.

    Attributes:
        flags_only: fields that neither the environment nor a file sets: what is done once, and only when it is typed,
            and where the variable of that name is meant for another of our programs.
    """

    flags_only: ClassVar[frozenset[str]] = frozenset()

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

    Besides the fields' flags there are `--config FILE` (also as an environment variable), `--help` and `--version`.

    Args:
        cls: which settings; its docstring's first line heads the help.
        argv: the arguments after the program's name (and its command, if it has several).
        program: how the user called it, as in "ormo-worker run", for help and errors.

    Raises:
        SystemExit: code 2 after one sentence per problem on stderr; code 0 after `--help` and `--version`.
    """
    misspelt = misspelt_variables(cls, os.environ)
    try:
        settings = read_settings(cls, argv, os.environ, program=program)
    except SettingsProblemsError as error:
        for problem in (*misspelt, *error.problems):
            sys.stderr.write(f"{program}: {printable(problem)}\n")
        sys.exit(BAD_SETTINGS_EXIT_CODE)
    for sentence in misspelt:
        first_words(program, sentence, getattr(settings, "log_format", "text"))
    return settings


def read_settings(cls: type[S], argv: Sequence[str], environment: Mapping[str, str], *, program: str) -> S:
    """As `load_settings`, with the environment as an argument and problems as an exception.

    Raises:
        SettingsProblemsError: an unknown flag or key, a missing or bad value, or a file that can't be read.
        SystemExit: code 0 after `--help` and `--version`.
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


def variables_of(cls: type[Settings]) -> set[str]:
    """The environment variables that these settings are read from, in upper case."""
    return {_variable(cls, name) for name in cls.model_fields.keys() - cls.flags_only | {"config"}}


def misspelt_variables(cls: type[Settings], environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that no program of ours reads and whose name is nearest to one of these settings'.

    One that is nearer to another program's setting is that program's to tell.
    """
    known = variables_of(cls)
    guesses = {name: nearest_variable(name) for name, value in environment.items() if value}
    return [
        f"the environment has {name}, which no program reads: did you mean {guess}?"
        for name, guess in guesses.items()
        if guess in known
    ]


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
    if command == "--version":
        sys.stdout.write(f"{program} {version_here()}\n")
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
        raise ValueError(
            f"expected HOST:PORT with a port from {lowest_port} to 65535 and no scheme, as in 127.0.0.1:50051"
        )
    return value


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
        variable = "flag only" if name in cls.flags_only else f"`{_variable(cls, name)}`"
        rows.append(f"| `{_flag(name)}` | {variable} | {_default(info)} | {meaning} |")
    return "\n".join(rows).strip() + "\n"


def version_here() -> str:
    """This package's version, as it was installed."""
    return importlib.metadata.version("ormo-parameter-server")


@dataclass
class _Given:
    """What the three places said, kept apart so that a complaint can name the place."""

    cls: type[Settings]
    flags: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    config_is_shared: bool = False
    problems: list[str] = field(default_factory=list)

    def read_flags(self, argv: Sequence[str], program: str) -> None:
        try:
            given, unknown = _parser(self.cls, program).parse_known_args(argv)
        except _FlagError as error:
            self.problems.append(str(error))
            return
        self.flags = vars(given)
        if self.flags.pop("version", False):
            sys.stdout.write(f"{program} {version_here()}\n")
            sys.exit(0)
        self.config = self.flags.pop("config", None)
        self.problems += _unknown_arguments(self.cls, unknown)

    def read_environment(self, environment: Mapping[str, str]) -> None:
        source = EnvSettingsSource(self.cls)
        source.env_vars = {name.lower(): value for name, value in environment.items() if value}
        self.environment = {name: value for name, value in source().items() if name not in self.cls.flags_only}
        if self.config is None:
            self.config = environment.get(_variable(self.cls, "config")) or None
            self.config_is_shared = True

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
            given = {key.replace("-", "_"): value for key, value in table.items()}
            taken = self.cls.model_fields.keys() - self.cls.flags_only
            self.file = {name: value for name, value in given.items() if name in taken}
            self.problems += [self._not_taken(name) for name in given if name not in taken | self._of_others()]

    def _of_others(self) -> frozenset[str]:
        """Keys that a file may have for other programs: the environment names one file for all of them."""
        return ALL_SETTINGS if self.config_is_shared else frozenset()

    def _not_taken(self, name: str) -> str:
        key, known = name.replace("_", "-"), [name.replace("_", "-") for name in self.cls.model_fields]
        if name in self.cls.flags_only:
            return f"the settings file {self.config} has the key {key!r}, which is a flag only: type {_flag(name)}"
        return f"the settings file {self.config} has an unknown key {key!r}{_guess(key, known)}"

    def values(self) -> dict[str, Any]:
        return self.file | self.environment | self.flags

    def problem(self, details: ErrorDetails) -> str:
        """One sentence for what pydantic found."""
        message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if not details["loc"]:
            return f"{message}{self._from_environment(message)}"
        name = str(details["loc"][0])
        if details["type"] == "missing" and name in self.cls.flags_only:
            return f"{_flag(name)} is missing"
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

    def _from_environment(self, message: str) -> str:
        """Which of the flags that a sentence names nobody typed."""
        named = re.findall(r"--[\w-]+", message)
        untyped = [name for name in self.environment if name not in self.flags and _flag(name) in named]
        return "".join(f" ({_flag(name)} is from the environment, {_variable(self.cls, name)})" for name in untyped)

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
    parser.add_argument("--version", action="store_true", help="show the installed version and exit")
    group: argparse._ActionsContainer = parser
    for name, info in cls.model_fields.items():
        if info.title is not None:
            group = parser.add_argument_group(info.title)
        variable = "" if name in cls.flags_only else f"{_variable(cls, name)}; "
        text = f"{info.description or ''} [{variable}default: {_default(info).strip('`')}]"
        text = text.replace("%", "%%")
        if bool in _members(info.annotation):
            group.add_argument(_flag(name), dest=name, help=text, action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(_flag(name), dest=name, help=text, metavar=_metavar(info.annotation))
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


class UsageError(Exception):
    """What was asked for can't be done; the message says in one sentence what came, what was expected, what to do."""


_PART = re.compile(r"(\d+):(\d+(?:\.\d+)?)x")


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
        match = _PART.fullmatch(part.strip())
        if match is None or float(match[2]) < 1:
            raise ValueError(f"{part!r} came, expected COUNT:FACTORx with a factor of at least 1, such as 1:10x")
        slow += [float(match[2])] * int(match[1])
    if len(slow) > workers:
        raise ValueError(f"{text} makes {len(slow)} workers slower, but there are only {workers}")
    return [1.0] * (workers - len(slow)) + slow
