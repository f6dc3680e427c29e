"""A method is four independent choices, a run a method with its numbers: what fits together and what does not."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from core.driving import driver_of
from ormo_server.core.errors import SettingsError
from ormo_server.core.method import PRESETS, Method, Run
from ormo_server.core.rules import UPDATE_RULES, Coefficients
from ormo_server.core.schedulers import SCHEDULERS
from ormo_server.core.step_size import STEP_SCALES, LearningRate
from ormo_server.settings import TrainingSettings

RATE = LearningRate(0.5)


# The table of methods in docs/algorithm.md.
DESIGN = """
    ormo          ormo          constant        asynchronous
    ormo-da       ormo          delay-adaptive  asynchronous
    ormo-vanilla  ormo-vanilla  constant        asynchronous
    asgd          sgd           constant        asynchronous
    asgd-da       sgd           delay-adaptive  asynchronous
    asgd-tau      sgd           inverse         asynchronous
    asgdm         naive         constant        asynchronous
    shifted       shifted       constant        asynchronous
    smega2        smega2        constant        asynchronous
    ssgdm         ormo          constant        synchronous
    ssgd          sgd           constant        synchronous
    ringmaster    sgd           constant        asynchronous
    rescaled      sgd           rescaled        asynchronous
    dc-asgd       dc            constant        asynchronous
    ormo-nesterov      ormo-nesterov     constant    asynchronous
    fadas              fadas             constant    asynchronous
    local-ormo         ormo-nesterov     constant    asynchronous
    local-ormo-polyak  ormo              constant    asynchronous
    diloco             ormo-nesterov     constant    synchronous
    local-sgd          sgd               constant    asynchronous
    local-sgd-poly     sgd               polynomial  asynchronous
    naive-nesterov     naive-nesterov    constant    asynchronous
    delayed-nesterov   delayed-nesterov  constant    asynchronous
"""
AVERAGED = {
    "local-ormo",
    "local-ormo-polyak",
    "diloco",
    "local-sgd",
    "local-sgd-poly",
    "naive-nesterov",
    "delayed-nesterov",
}


def test_the_presets_are_the_rows_of_the_documented_table() -> None:
    rows = [line.split() for line in DESIGN.strip().splitlines()]
    assert sorted(row[0] for row in rows) == sorted(PRESETS)
    for name, rule, scale, scheduler in rows:
        discard, threshold = 2 if name == "ringmaster" else None, 1.0 if name in ("asgd-da", "fadas") else 2.0
        bucket = "mean" if name in AVERAGED else "sum"
        expected = Method(
            rule, scale, scheduler, discard_buckets=discard, delay_threshold=threshold, bucket=bucket, name=name
        )
        assert PRESETS[name] == expected


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        (PRESETS["asgd"], None),
        (PRESETS["ringmaster"], 10),
        (replace(PRESETS["ringmaster"], discard_delay=3), 3),
        (Method(discard_delay=3), 3),
        (Method(discard_buckets=1), 5),
    ],
)
def test_the_discard_delay_is_the_one_set_or_so_many_buckets_of_5(method: Method, limit: int | None) -> None:
    assert method.discard_limit(5) == limit


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method(), "ormo × constant × asynchronous"),
        (Method("dc", "inverse", "bounded-staleness", staleness_bound=7), "dc × inverse × bounded-staleness 7"),
        (Method("sgd", "delay-adaptive", delay_threshold=1.5), "sgd × delay-adaptive from 1.5K × asynchronous"),
        (Method("sgd", discard_buckets=2), "sgd × constant × asynchronous × discard from 2K"),
        (Method("sgd", discard_buckets=2, discard_delay=9), "sgd × constant × asynchronous × discard from 9"),
    ],
)
def test_a_method_that_is_no_preset_is_spelt_out(method: Method, words: str) -> None:
    assert method.spelt_out() == words


PRODUCT = list(itertools.product(UPDATE_RULES, STEP_SCALES, SCHEDULERS, [None, 2]))


@pytest.mark.parametrize(("rule", "scale", "scheduler", "discard"), PRODUCT)
def test_any_product_of_the_four_choices_trains(rule: str, scale: str, scheduler: str, discard: int | None) -> None:
    bound = 1 if scheduler == "bounded-staleness" else None
    driver = driver_of(Run(RATE, Method(rule, scale, scheduler, discard, staleness_bound=bound)), "a")
    for _ in range(3):
        driver.request("a")
        driver.push("a", 1.0)
    assert driver.machine.state.iteration == 3
    assert driver.machine.state.params < 0


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (
            {"rule": "adam"},
            "update rule 'adam' is not known: choose one of ormo, ormo-vanilla, ormo-nesterov, sgd, naive, shifted",
        ),
        (
            {"scale": "big"},
            "step scale 'big' is not known: choose one of constant, delay-adaptive, inverse, polynomial, rescaled",
        ),
        (
            {"scheduler": "lazy"},
            "scheduler 'lazy' is not known: choose one of asynchronous, synchronous, bounded-staleness",
        ),
        ({"discard_delay": 0}, "discard delay 0: expected at least 1"),
        ({"delay_threshold": 0.0}, "delay threshold 0.0: expected 0.01 to 1e\\+06, in multiples of K"),
        ({"delay_threshold": float("nan")}, "delay threshold nan: expected"),
        ({"discard_buckets": 0}, "discard delay of 0 buckets: expected at least 1"),
        ({"scheduler": "bounded-staleness"}, "the bounded-staleness scheduler needs a staleness bound"),
        ({"scheduler": "bounded-staleness", "staleness_bound": -1}, "staleness bound -1: expected at least 0"),
        ({"staleness_bound": 3}, "staleness bound 3 with the asynchronous scheduler, which has none: leave it out"),
        ({"scheduler": "synchronous", "staleness_bound": 0}, "staleness bound 0 with the synchronous scheduler"),
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
        ({"delay_compensation": -0.1}, "delay compensation -0.1: expected a finite number of at least 0"),
        ({"delay_compensation": float("nan")}, "delay compensation nan: expected"),
        ({"delay_compensation": float("inf")}, "delay compensation inf: expected"),
        ({"second_momentum": 1.0}, "second momentum 1.0: expected at least 0 and below 1"),
        ({"epsilon": 0.0}, "epsilon 0.0: expected 1e-10 to 1"),
        ({"epsilon": float("nan")}, "epsilon nan: expected"),
        ({"initial_second_moment": -1.0}, r"initial second moment -1.0: expected 0 to 1e\+06"),
        ({"bucket_size": 0}, "bucket size 0: expected at least 1"),
        ({"min_workers": 0}, "min workers 0, max workers 64: expected 1 <= min <= max"),
        ({"min_workers": 5, "max_workers": 4}, "min workers 5, max workers 4: expected"),
        ({"stop_after_gradients": -1}, "a run stops after a number of gradients or samples of at least 0"),
        ({"stop_after_samples": -1}, "a run stops after a number of gradients or samples of at least 0"),
        ({"bucket_size": 2, "method": PRESETS["ssgdm"]}, "bucket size 2 with the synchronous scheduler"),
        ({"local_steps": -1}, "local steps -1: expected at least 0 \\(0 for gradients\\)"),
        ({"local_steps_by_speed": True}, "local steps by speed in a run without local steps"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        Run(RATE, **settings)


def test_the_smallest_values_that_make_sense_are_taken() -> None:
    method = Method(scheduler="bounded-staleness", discard_delay=1, discard_buckets=1, staleness_bound=0)
    run = Run(RATE, method, momentum=0.0, bucket_size=1, min_workers=1, max_workers=1, delay_compensation=0.0)
    assert (run.momentum, run.bucket_size, run.delay_compensation) == (0.0, 1, 0.0)
    assert (run.method.discard_delay, run.method.discard_buckets, run.method.staleness_bound) == (1, 1, 0)


# The names as people give them


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_chosen_by_its_name(name: str) -> None:
    assert TrainingSettings(method=name).run().method == PRESETS[name]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "adam"}, f"method 'adam' is not known: choose one of {', '.join(PRESETS)}"),
        ({"update_rule": "adam"}, "update rule 'adam' is not known: choose one of"),
        ({"scheduler": "bounded-staleness"}, "the bounded-staleness scheduler needs a staleness bound"),
        ({"staleness_bound": 3}, "staleness bound 3 with the asynchronous scheduler"),
        ({"staleness_bound": -1}, "greater than or equal to 0"),
        ({"delay_compensation": -1.0}, "greater than or equal to 0"),
        ({"delay_compensation": float("nan")}, "should be a finite number"),
        ({"second_momentum": 1.0}, "less than 1"),
        ({"epsilon": 0.0}, "greater than or equal to 0.0000000001"),
        ({"initial_second_moment": -1.0}, "greater than or equal to 0"),
        ({"method": "fadas", "bucket": "mean"}, "bucket 'mean' with the update rule 'fadas', which averages by itself"),
        ({"discard_delay": 0}, "greater than or equal to 1"),
        ({"delay_threshold": 0.0}, "greater than or equal to 0.01"),
        ({"delay_threshold": 2e6}, "less than or equal to 1000000"),
        ({"local_steps": -1}, "greater than or equal to 0"),
        ({"local_steps": 2**31}, "less than or equal to 2147483647"),
        ({"local_steps_by_speed": True}, "local steps by speed in a run without local steps"),
        (
            {"local_steps": 8, "weight_decay": 0.1},
            "--weight-decay 0.1 with --local-steps: weights decay in the workers' own optimizers, so set it there, and "
            "leave --weight-decay at 0",
        ),
    ],
)
def test_settings_that_make_no_method_are_refused_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainingSettings(**settings)


def test_a_choice_replaces_the_presets_and_the_method_is_then_called_by_its_choices() -> None:
    method = TrainingSettings(method="ringmaster", update_rule="ormo", discard_delay=4).run().method
    assert (method.rule, method.discard_limit(1)) == ("ormo", 4)
    assert method.name == "ormo × constant × asynchronous × discard from 4"
    method = TrainingSettings(method="asgd-da", delay_threshold=2.0).run().method
    assert (method.delay_threshold, method.name) == (2.0, "sgd × delay-adaptive from 2K × asynchronous")
    assert TrainingSettings(delay_compensation=0.5).run().coefficients == Coefficients(0.9, 0.5, delay_threshold=2.0)
    told = {"momentum": 0.8, "second_momentum": 0.7, "epsilon": 0.5, "initial_second_moment": 3.0}
    assert TrainingSettings(method="fadas", **told).run().coefficients == Coefficients(0.8, 0.04, 0.7, 0.5, 3.0, 1.0)


@pytest.mark.parametrize(
    ("given", "bucket", "rate"),
    [
        ({}, "sum", 0.01),
        ({"local_steps": 8}, "mean", 0.4),
        ({"local_steps": 8, "method": "ssgdm"}, "mean", 0.4),
        ({"local_steps": 8, "bucket": "sum"}, "sum", 0.4),
        ({"local_steps": 8, "learning_rate": 1.0}, "mean", 1.0),
        ({"local_steps": 8, "update_rule": "smega2"}, "sum", 0.4),  # it averages by itself
        ({"bucket": "mean"}, "mean", 0.01),
    ],
)
def test_with_local_steps_buckets_are_means_and_the_rate_is_the_outer_one_unless_set(
    given: dict[str, Any], bucket: str, rate: float
) -> None:
    run = TrainingSettings(**given).run()
    assert (run.method.bucket, run.learning_rate) == (bucket, LearningRate(rate))
    assert run.momentum == 0.9
