"""A method is four independent choices, a run a method with its numbers: what fits together and what does not."""

import itertools
from typing import Any

import pytest

from core.driving import driver_of
from ormo_server.core.errors import SettingsError
from ormo_server.core.method import PRESETS, Method, Run
from ormo_server.core.rules import UPDATE_RULES
from ormo_server.core.scales import STEP_SCALES
from ormo_server.core.schedule import LearningRate
from ormo_server.core.schedulers import SCHEDULERS

RATE = LearningRate(0.5)


@pytest.mark.parametrize(
    ("preset", "rule", "scheduler"),
    [
        ("ormo", "ormo", "asynchronous"),
        ("asgd", "sgd", "asynchronous"),
        ("ssgdm", "ormo", "synchronous"),
        ("ssgd", "sgd", "synchronous"),
    ],
)
def test_a_preset_is_its_row_of_the_designs_table(preset: str, rule: str, scheduler: str) -> None:
    method = PRESETS[preset]
    assert (method.name, method.rule, method.scheduler) == (preset, rule, scheduler)
    assert (method.scale, method.discard_delay) == ("constant", None)


PRODUCT = list(itertools.product(UPDATE_RULES, STEP_SCALES, SCHEDULERS, [None, 2]))


@pytest.mark.parametrize(("rule", "scale", "scheduler", "discard"), PRODUCT)
def test_any_product_of_the_four_choices_trains(rule: str, scale: str, scheduler: str, discard: int | None) -> None:
    driver = driver_of(Run(RATE, Method(rule, scale, scheduler, discard)), "a")
    for _ in range(3):
        driver.request("a")
        driver.push("a", 1.0)
    assert driver.machine.state.iteration == 3
    assert driver.machine.state.params < 0


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"rule": "adam"}, "update rule 'adam' is not known: choose one of ormo, sgd"),
        ({"scale": "big"}, "step scale 'big' is not known: choose one of constant, delay-adaptive, inverse"),
        ({"scheduler": "lazy"}, "scheduler 'lazy' is not known: choose one of asynchronous, synchronous"),
        ({"discard_delay": 0}, "discard delay 0: expected at least 1"),
    ],
)
def test_a_method_that_is_not_there_is_refused_in_one_sentence(choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        Method(**choice)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"momentum": 1.0}, "momentum 1.0: expected at least 0 and below 1"),
        ({"momentum": -0.1}, "momentum -0.1: expected"),
        ({"momentum": float("nan")}, "momentum nan: expected"),
        ({"bucket_size": 0}, "bucket size 0: expected at least 1"),
        ({"min_workers": 0}, "min workers 0, max workers 64: expected 1 <= min <= max"),
        ({"min_workers": 5, "max_workers": 4}, "min workers 5, max workers 4: expected"),
        ({"stop_after_gradients": -1}, "a run stops after a number of gradients or samples of at least 0"),
        ({"stop_after_samples": -1}, "a run stops after a number of gradients or samples of at least 0"),
        ({"bucket_size": 2, "method": PRESETS["ssgdm"]}, "bucket size 2 with the synchronous scheduler"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        Run(RATE, **settings)


def test_the_smallest_values_that_make_sense_are_taken() -> None:
    run = Run(RATE, Method(discard_delay=1), momentum=0.0, bucket_size=1, min_workers=1, max_workers=1)
    assert (run.momentum, run.bucket_size, run.method.discard_delay) == (0.0, 1, 1)
