"""Variables that several programs share: a typo is told by the program that it was meant for, and by no other."""

import re

import pytest

from ormo_runtime.settings import Settings, flag_of, parser_of
from ormo_runtime.settings_loader import ALL_SETTINGS, misspelt_variables, read_settings
from ormo_server.console.settings import ControlSettings, StatusSettings
from ormo_server.settings import ServerSettings
from ormo_server.sim.plots import PlotSettings
from ormo_server.sim.reproduce.command import ReproduceSettings
from ormo_server.sim.settings import SimSettings
from ormo_worker.local.cluster import LocalSettings
from ormo_worker.settings import EvaluateSettings, RunSettings
from runtime.programs_settings import CLASSES


def test_all_settings_are_those_of_all_programs() -> None:
    assert {name for cls in CLASSES for name in cls.model_fields.keys() - cls.flags_only} == ALL_SETTINGS


@pytest.mark.parametrize(
    ("cls", "argv"),
    [
        (ControlSettings, ["--checkpoint"]),
        (SimSettings, []),
        (PlotSettings, ["--runs", "a", "--directory", "b"]),
        (ReproduceSettings, ["--suite", "digits"]),
        (LocalSettings, []),
    ],
)
def test_no_variable_says_what_is_done_or_overwritten(cls: type[Settings], argv: list[str]) -> None:
    """Those are what a pod sets for `serve`, which means other things by them, and what nobody sets for good."""
    names = ("directory", "trace", "learning_rate", "checkpoint", "drain", "runs", "into")
    environment = {f"ORMO_{name.upper()}": "0.125" for name in names if name in cls.flags_only}
    assert environment
    typed = read_settings(cls, argv, environment, program="any")
    assert typed == read_settings(cls, argv, {}, program="any")


@pytest.mark.parametrize(
    ("cls", "typed", "meant"),
    [
        (ServerSettings, "ORMO_LERNING_RATE", "ORMO_LEARNING_RATE"),
        (ServerSettings, "ORMO_LEARNING-RATE", "ORMO_LEARNING_RATE"),
        (ServerSettings, "ormo_checkpoint_second", "ORMO_CHECKPOINT_SECONDS"),
        (RunSettings, "ORMO_BATCHSIZE", "ORMO_BATCH_SIZE"),
        (StatusSettings, "ORMO_TSL_CA", "ORMO_TLS_CA"),
        (LocalSettings, "ORMO_WORKER", "ORMO_WORKERS"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_nearest_name(cls: type[Settings], typed: str, meant: str) -> None:
    (sentence,) = misspelt_variables(cls, {typed: "1", "HOME": "/"})
    assert sentence == f"the environment has {typed}, which no program reads: did you mean {meant}?"


@pytest.mark.parametrize(
    ("cls", "variable"),
    [
        (StatusSettings, "ORMO_LEARNING_RATE"),  # the server's
        (ServerSettings, "ORMO_BATCH_SIZE"),  # a worker's
        (ServerSettings, "ORMO_BATCHSIZE"),  # a worker tells it
        (ControlSettings, "ORMO_LERNING_RATE"),  # there it is a flag only
        (ServerSettings, "ORMO_CONFIG"),
        (ServerSettings, "ORMO_BIN"),  # somebody's own
        (LocalSettings, "ORMO_SERVER_PORT"),  # of a Service that is called ormo-server, as the others
        (RunSettings, "ORMO_SERVER_SERVICE_HOST"),
        (RunSettings, "ORMO_SERVER_PORT_50051_TCP_ADDR"),
        (RunSettings, "OHNE_BATCHSIZE"),
    ],
)
def test_a_variable_that_is_another_program_s_or_nobody_s_is_left_alone(cls: type[Settings], variable: str) -> None:
    assert misspelt_variables(cls, {variable: "1"}) == []


def test_an_empty_variable_says_nothing_however_it_is_spelt() -> None:
    assert misspelt_variables(ServerSettings, {"ORMO_LERNING_RATE": ""}) == []


def headings_in_help(cls: type[Settings]) -> dict[str, str]:
    """The heading that each flag stands under in `--help`, by flag."""
    found, heading = {}, ""
    for line in parser_of(cls, "any").format_help().splitlines():
        if line and not line[0].isspace() and line.endswith(":"):
            heading = line.removesuffix(":")
        elif flag := re.match(r"  (?:-h, )?(--[\w-]+)", line):
            found[flag[1]] = heading
    return found


@pytest.mark.parametrize("cls", CLASSES)
def test_each_option_stands_under_a_heading_of_its_program(cls: type[Settings]) -> None:
    headings = headings_in_help(cls)
    assert headings.keys() == {"--help", "--config", "--version", *map(flag_of, cls.model_fields)}
    assert {flag for flag, heading in headings.items() if heading == "options"} == {"--help", "--config", "--version"}


@pytest.mark.parametrize(
    ("cls", "heading", "flags"),
    [
        (RunSettings, "Logs and metrics", "--log-level --log-format --metrics-listen"),
        (RunSettings, "Mini-batches", "--batch-size --loader-processes --amp --slow-factor"),
        (RunSettings, "Name and transfer", "--worker-id --wire-dtype --in-flight"),
        (RunSettings, "Seed and end", "--seed --leave-after-gradients"),
        (EvaluateSettings, "Evaluation", "--batch-size --every-seconds --once"),
        (ServerSettings, "Seed and end of the run", "--seed --stop-after-gradients --stop-after-samples"),
        (ServerSettings, "How a run begins", "--fresh --model"),
        (ServerSettings, "How the server stops", "--exit-when-finished --drain-seconds"),
        (ServerSettings, "Speed and memory", "--threads --memory-limit-bytes"),
        (SimSettings, "Length, evaluation and output", "--epochs --target-accuracy --directory"),
        (ControlSettings, "What the server does", "--checkpoint --learning-rate --drain"),
        (LocalSettings, "Workers", "--workers --batch-size --in-flight"),
        (LocalSettings, "How to train", "--method --learning-rate --momentum"),
        (ReproduceSettings, "Output", "--directory --into --commit"),
    ],
)
def test_options_stand_under_the_heading_that_says_what_they_are(cls: type[Settings], heading: str, flags: str) -> None:
    headings = headings_in_help(cls)
    assert {headings[flag] for flag in flags.split()} == {heading}
