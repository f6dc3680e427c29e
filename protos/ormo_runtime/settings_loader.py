"""Settings from flags, environment and a TOML file; each complaint says where the value came from.

A program's entry point calls `load_settings`, or `dispatch` if it has several commands. pydantic checks the values;
what is read here by hand is what a library would not say: which of three places a value came from, which name was
probably meant, and that a name is an old one.
"""

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from ormo_runtime.logs import first_words, printable
from ormo_runtime.settings import (
    FlagError,
    Settings,
    flag_of,
    key_of,
    names_beside_flags,
    parser_of,
    types_of,
    variable_of,
    variables_of,
    version_here,
)

BAD_SETTINGS_EXIT_CODE = 2
# What any of our programs takes from the environment or a file, so that each leaves the others' alone. Server and
# worker may be installed without each other, so nobody can ask all of them; a test does.
ALL_SETTINGS = frozenset(
    """
    access address amp bandwidth_bytes_per_second batch_size bucket bucket_size checkpoint_seconds checkpoints_kept
    commit compute_seconds connect_timeout_seconds cosine_gradients cpus_per_worker crash data_dir delay_compensation
    delay_threshold device directory discard_delay drain_seconds epochs epsilon evaluate_every_gradients
    evaluate_every_seconds every_seconds exit_when_finished failure_timeout_seconds final_learning_rate
    give_up_after_seconds gpus_per_worker gradients in_flight initial_second_moment inner inner_lr inner_schedule
    inner_warmup insecure join journal journal_fsync journal_max_bytes json keep_freed_memory latency_seconds
    learning_rate learning_rates leave leave_after_gradients listen loader_processes local_steps local_steps_by_speed
    log_format log_level max_bytes_in_flight max_gradient_norm max_readers max_refused_share max_workers
    memory_limit_bytes method methods metrics_listen milestone_factor milestones min_workers mirror model momentum
    name once over_norm plots processes receive_window_bytes reflection restarts_per_worker schedule scheduler
    second_momentum seed seeds server server_flags setting slots slots_per_worker slow slow_factor sort
    staleness_bound step_scale stop_after_gradients stop_after_samples suite target_accuracy task test_samples threads
    ticket_timeout_seconds timeout_seconds tls_ca tls_cert tls_client_ca tls_key tls_server_name token_file trace
    track train_samples update_rule warmup_gradients weight_decay wire_dtype worker_flags worker_id worker_series
    workers working_dir workload
    """.split()  # noqa: SIM905 - a list would be a line for each
)
# What they were called before the names had units, until the next release.
OLD_SETTINGS = frozenset(
    """
    bandwidth compute_time connect_timeout evaluate_every failure_timeout give_up_after latency memory_limit
    receive_window stop_after ticket_timeout timeout
    """.split()  # noqa: SIM905
)
# Of 1. So ORMO_BATCHSIZE is near to a setting, and ORMO_SERVER_PORT, as Kubernetes says where a Service is, to none.
_NEAR = 0.8

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
    """Read the settings from flags, environment and file, in this order of precedence.

    Besides the fields' flags there are `--config FILE` (also as an environment variable), `--help` and `--version`.
    Old and misspelt names get a line each on stderr.

    Args:
        cls: which settings; its docstring's first line heads the help.
        argv: the arguments after the program's name (and its command, if it has several).
        program: how the user called it, as in "ormo-worker run", for help and errors.

    Raises:
        SystemExit: code 2 after one sentence per problem on stderr; code 0 after `--help` and `--version`.
    """
    given = _Given(cls)
    try:
        settings = given.read(argv, os.environ, program)
    except SettingsProblemsError as error:
        for sentence in (*given.warnings, *error.problems):
            sys.stderr.write(f"{program}: {printable(sentence)}\n")
        sys.exit(BAD_SETTINGS_EXIT_CODE)
    for sentence in given.warnings:
        first_words(program, sentence, getattr(settings, "log_format", "text"))
    return settings


def read_settings(cls: type[S], argv: Sequence[str], environment: Mapping[str, str], *, program: str) -> S:
    """As `load_settings`, with the environment as an argument, without warnings, and with problems as an exception.

    Raises:
        SettingsProblemsError: an unknown flag or key, a missing or bad value, or a file that can't be read.
        SystemExit: code 0 after `--help` and `--version`.
    """
    return _Given(cls).read(argv, environment, program)


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
    sys.stderr.write(f"{program}: {repr(command) if command else 'no command'} was given, expected {expected}\n{usage}")
    return BAD_SETTINGS_EXIT_CODE


def misspelt_variables(cls: type[Settings], environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that no program of ours reads and whose name is nearest to one of these settings'.

    One that is nearer to another program's setting is that program's to tell.
    """
    sentences = []
    for variable in (name for name, value in environment.items() if value):
        meant = _nearest_setting(variable)
        if meant is not None and variable_of(meant) in variables_of(cls):
            now = variable_of(cls.renamed.get(meant, meant))
            sentences.append(f"the environment has {variable}, which no program reads: did you mean {now}?")
    return sentences


def _nearest_setting(variable: str) -> str | None:
    """The setting, by its new or old name, that was meant by a variable that no program of ours reads; else None."""
    known, prefix = ALL_SETTINGS | OLD_SETTINGS, variable_of("").lower()
    name = variable.lower().removeprefix(prefix)
    if not variable.lower().startswith(prefix) or name in known | {"config"}:
        return None
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=_NEAR)), None)


def under_new_names(
    cls: type[Settings], given: Mapping[str, Any], spell: Callable[[str], str], place: str
) -> tuple[dict[str, Any], list[str]]:
    """Give what came by an old name its new one.

    Args:
        cls: which settings.
        given: values by name, all from one place.
        spell: how a name is written there.
        place: where that is, for sentences, as in "in the environment".

    Returns:
        The values by their new names, and a sentence for each old one.

    Raises:
        SettingsProblemsError: a setting has both its names there.
    """
    old = [name for name in cls.renamed if name in given]
    twice = [name for name in old if cls.renamed[name] in given]
    if twice:
        raise SettingsProblemsError(
            [
                f"{spell(cls.renamed[name])} and {spell(name)}, its old name, are both given {place}: "
                f"leave {spell(name)} out"
                for name in twice
            ]
        )
    sentences = [
        f"{spell(name)}, given {place}, is now called {spell(cls.renamed[name])}: change it, for the next release will "
        "not know the old name"
        for name in old
    ]
    return {cls.renamed.get(name, name): value for name, value in given.items()}, sentences


@dataclass
class _Given(Generic[S]):
    """What the three places said, kept apart so that a complaint can name the place."""

    cls: type[S]
    flags: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    config_is_shared: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def read(self, argv: Sequence[str], environment: Mapping[str, str], program: str) -> S:
        """Read the three places, and check what they said; `warnings` are complete even if this raises."""
        self.warnings += misspelt_variables(self.cls, environment)
        self._read_flags(argv, program)
        self._read_environment(environment)
        self._read_file()
        if self.problems:
            raise SettingsProblemsError(self.problems)
        try:
            return self.cls(**self._values())
        except ValidationError as error:
            # A default that goes by other settings is missing only because one of these is bad.
            found = [details for details in error.errors() if details["type"] != "default_factory_not_called"]
            raise SettingsProblemsError([self._problem(details) for details in found]) from None

    def _read_flags(self, argv: Sequence[str], program: str) -> None:
        try:
            given, unknown = parser_of(self.cls, program).parse_known_args(argv)
        except FlagError as error:
            self.problems.append(str(error))
            return
        flags = vars(given)
        if flags.pop("version", False):
            sys.stdout.write(f"{program} {version_here()}\n")
            sys.exit(0)
        self.config = flags.pop("config", None)
        self.flags = self._take_old_names(flags, flag_of, "as a flag")
        self.problems += _unknown_arguments(self.cls, unknown)

    def _read_environment(self, environment: Mapping[str, str]) -> None:
        # Compose files and manifests write `ORMO_X=` for "not set".
        told = {name.upper(): value for name, value in environment.items() if value}
        names = names_beside_flags(self.cls)
        found = {name: told[variable_of(name)] for name in names if variable_of(name) in told}
        self.environment = self._take_old_names(found, variable_of, "in the environment")
        if self.config is None:
            self.config = told.get(variable_of("config"))
            self.config_is_shared = True

    def _read_file(self) -> None:
        if self.config is None:
            return
        try:
            table = tomllib.loads(Path(self.config).read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or str(error)
            self.problems.append(f"the settings file {self.config} can't be read: {reason}")
        except ValueError as error:  # TOML's and UTF-8's
            self.problems.append(f"the settings file {self.config} is not valid TOML: {error}")
        else:
            read = names_beside_flags(self.cls)
            keys = {key.replace("-", "_"): value for key, value in table.items()}
            given = self._take_old_names(keys, key_of, f"in the settings file {self.config}")
            self.file = {name: value for name, value in given.items() if name in read}
            self.problems += [self._not_read(name) for name in given if name not in read | self._of_others()]

    def _take_old_names(self, given: Mapping[str, Any], spell: Callable[[str], str], place: str) -> dict[str, Any]:
        # Per place, before the places are merged: an old name on the command line wins over a new one in a file.
        try:
            renamed, sentences = under_new_names(self.cls, given, spell, place)
        except SettingsProblemsError as error:
            self.problems += error.problems
            return {}
        self.warnings += sentences
        return renamed

    def _of_others(self) -> frozenset[str]:
        """Keys that a file may have for other programs: the environment names one file for all of them."""
        return ALL_SETTINGS | OLD_SETTINGS if self.config_is_shared else frozenset()

    def _not_read(self, name: str) -> str:
        key = key_of(name)
        if name in self.cls.flags_only:
            return f"the settings file {self.config} has the key {key!r}, which is a flag only: type {flag_of(name)}"
        return f"the settings file {self.config} has an unknown key {key!r}{_guess(self.cls, key, key_of)}"

    def _values(self) -> dict[str, Any]:
        return self.file | self.environment | self.flags

    def _problem(self, details: ErrorDetails) -> str:
        """One sentence for what pydantic found."""
        message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if not details["loc"]:
            return f"{message}{self._from_environment(message)}"
        name = str(details["loc"][0])
        if details["type"] == "missing" and name in self.cls.flags_only:
            return f"{flag_of(name)} is missing"
        if details["type"] == "missing":
            return (
                f"{flag_of(name)} is missing: give it as a flag, in the environment as "
                f"{variable_of(name)}, or in the file that --config names"
            )
        return f"{flag_of(name)} is {self._shown(name, details)}{self._place(name)}: {_lower_first(message)}"

    def _shown(self, name: str, details: ErrorDetails) -> str:
        if SecretStr in types_of(self.cls.model_fields[name].annotation):
            return "not usable (its value is not shown)"
        return repr(self._values().get(name, details["input"]))

    def _from_environment(self, message: str) -> str:
        """Which of the flags that a sentence names nobody typed."""
        named = re.findall(r"--[\w-]+", message)
        untyped = [name for name in self.environment if name not in self.flags and flag_of(name) in named]
        return "".join(f" ({flag_of(name)} is from the environment, {variable_of(name)})" for name in untyped)

    def _place(self, name: str) -> str:
        if name in self.flags:
            return ""
        if name in self.environment:
            return f" (from the environment, {variable_of(name)})"
        return f" (from {self.config})" if name in self.file else " (its default)"


def _unknown_arguments(cls: type[Settings], unknown: Sequence[str]) -> list[str]:
    words = [argument.split("=")[0] for argument in unknown if argument.startswith("-")]
    # A value that follows an unknown flag is no problem of its own.
    return [f"unknown flag {word}{_guess(cls, word, flag_of)}" for word in words] or [
        f"unexpected argument {argument!r}: settings are given as flags" for argument in unknown
    ]


def _guess(cls: type[Settings], word: str, spell: Callable[[str], str]) -> str:
    # An old name with a slip in it may be nearer to the old name than to the new one, which is the one to tell.
    meant = {spell(name): spell(cls.renamed.get(name, name)) for name in (*cls.model_fields, *cls.renamed, "config")}
    near = difflib.get_close_matches(word, list(meant), n=1)
    return f": did you mean {meant[near[0]]}?" if near else "; --help lists what there is"


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]
