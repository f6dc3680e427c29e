"""Inner optimizers by name, and the schedule of their learning rates."""

import math

import pytest
import torch
from torch import nn

from ormo_worker.errors import OptionRefused
from ormo_worker.pytorch.inner import Inner
from ormo_worker.pytorch.options import decay_groups
from ormo_worker.pytorch.recipes import InnerName, RateSchedule, named_optimizers


def network() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[3].bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    return model


def made(name: InnerName, model: nn.Module) -> list[torch.optim.Optimizer]:
    groups = decay_groups(model, lambda _, parameter: 0.0 if parameter.ndim == 1 else 0.5)
    return named_optimizers(name, model, groups, 0.01)


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    found = {parameter: name for name, parameter in model.named_parameters()}
    return {found[parameter] for parameter in group["params"]}  # type: ignore[attr-defined]


VECTORS = {"1.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", [("SGD", 0.0, VECTORS | {"0.weight", "1.weight", "3.weight"})]),
        ("adamw", [("AdamW", 0.0, VECTORS), ("AdamW", 0.005, {"0.weight", "1.weight", "3.weight"})]),
        (
            "muon",
            [
                ("Muon", 0.05, {"1.weight", "3.weight"}),
                ("AdamW", 0.0, VECTORS),
                ("AdamW", 0.005, {"0.weight"}),
            ],
        ),
    ],
)
def test_a_name_stands_for_optimizers_that_have_each_trained_parameter_once(
    name: InnerName, expected: list[tuple[str, float, set[str]]]
) -> None:
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = network()
    optimizers = made(name, model)
    Inner(optimizers, model, model.parameters())
    found = [
        (type(each).__name__, group["weight_decay"], names(model, group))
        for each in optimizers
        for group in each.param_groups
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert {group["lr"] for each in optimizers for group in each.param_groups} == {0.01}


def test_muon_is_asked_for_with_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(OptionRefused, match=r"--inner is muon, and PyTorch .* has none: install PyTorch 2\.9 or newer"):
        made("muon", network())


def test_a_cosine_falls_from_one_to_zero_over_the_run() -> None:
    schedule = RateSchedule("cosine")
    factors = [schedule.factor(progress, 0.0, 10**6) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert factors == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.0])


@pytest.mark.parametrize("joined_at", [0.0, 0.5])
def test_the_rate_rises_over_a_share_of_the_run_whenever_a_worker_joins(joined_at: float) -> None:
    schedule = RateSchedule(warmup=0.2)
    factors = [schedule.factor(joined_at + since, joined_at, 10) for since in (0.05, 0.1, 0.2, 0.3)]
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0])


def test_the_first_steps_move_and_a_run_without_an_end_gets_warm_too() -> None:
    schedule = RateSchedule(warmup=0.2)
    assert [schedule.factor(0.0, 0.0, steps) for steps in (0, 999, 1999, 5000)] == [0.0005, 0.5, 1.0, 1.0]
