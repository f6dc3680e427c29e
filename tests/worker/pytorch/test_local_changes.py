"""What a program does to parameters between two steps is found, by whichever way it does it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ormo_worker.pytorch.devices import Arriving, Copies
from ormo_worker.pytorch.watch import LocalChanges

NAMES = ["large", "small", "turned", "columns", "half", "none"]


class Late:
    """Stands in for a device, from which answers come when they are let."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        self.let = 0

    def fetch(self, value: Tensor) -> Arriving:
        self.asked.append(value)
        number = len(self.asked)
        late = self

        class Event:
            def query(self) -> bool:
                return number <= late.let

            def synchronize(self) -> None:
                raise AssertionError("nobody should wait")

        return Arriving(value, Copies(Event()))


class Watched:
    """Parameters of several kinds, as loaded."""

    def __init__(self, fetch: Callable[[Tensor], Arriving] = lambda value: Arriving(value, Copies())) -> None:
        tensors = [
            torch.randn(100, 70),
            torch.randn(3),
            torch.randn(20, 30).t(),
            torch.randn(8, 10)[:, :4],
            torch.randn(9, dtype=torch.bfloat16),
            torch.randn(0, 4),
        ]
        self.parameters = dict(zip(NAMES, map(nn.Parameter, tensors), strict=True))
        self.values = [parameter.detach().float().clone() for parameter in self.parameters.values()]
        self.changes = LocalChanges(NAMES, list(self.parameters.values()), fetch)
        self.changes.note_loaded()

    def find(self, *known: str) -> list[str]:
        return self.changes.find(self.values, known)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.parameters[name]


def clamp(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.clamp_(-0.01, 0.01)


def clamp_data(parameter: nn.Parameter) -> None:
    parameter.data.clamp_(-0.01, 0.01)


def replace_data(parameter: nn.Parameter) -> None:
    parameter.data = torch.zeros_like(parameter)


def load(parameter: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = parameter
    holder.load_state_dict({"weight": torch.ones_like(parameter)})


def renormalise(parameter: nn.Parameter) -> None:
    torch.nn.functional.embedding(torch.tensor([0]), parameter, max_norm=0.01)


def one_element(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.view(-1)[-1] += 1.0


WAYS = [clamp, clamp_data, replace_data, load, nn.init.zeros_]


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_done_to_a_parameter_is_found(name: str, way: Callable[[nn.Parameter], object]) -> None:
    watched = Watched()
    way(watched[name])
    assert watched.find() == [name]
    assert watched.find("small", name) == []
    watched.changes.note_loaded()
    assert watched.find() == []


@pytest.mark.parametrize("way", [renormalise, one_element])
def test_a_few_elements_are_enough(way: Callable[[nn.Parameter], object]) -> None:
    watched = Watched()
    way(watched["large"])
    assert watched.find() == ["large"]


def test_nothing_is_found_where_nothing_was_done() -> None:
    assert Watched().find() == []


def test_values_that_were_put_back_are_no_change() -> None:
    """As of those who evaluate with averaged weights in between."""
    watched = Watched()
    kept = {name: parameter.detach().clone() for name, parameter in watched.parameters.items()}
    for way in (clamp, clamp_data, replace_data):
        for name, parameter in watched.parameters.items():
            way(parameter)
            parameter.data.copy_(kept[name])
        assert watched.find() == []


def test_memory_that_was_moved_is_watched_where_it_is_now() -> None:
    watched = Watched()
    watched["large"].data = watched["large"].data.clone()
    assert watched.find() == []
    watched.changes.note_loaded()
    clamp_data(watched["large"])
    assert watched.find() == ["large"]


def test_64_elements_of_a_tensor_are_looked_at_through_data_and_all_of_a_small_one() -> None:
    changed = 0
    for row in range(100):
        watched = Watched()
        watched["large"].data[row, :].add_(1.0)
        changed += watched.find() == ["large"]
    assert 60 <= changed <= 64
    for number in range(9):
        watched = Watched()
        watched["half"].data[number] += 1.0
        assert watched.find() == ["half"]


def test_answers_of_a_device_are_taken_when_they_are_there() -> None:
    device = Late()
    watched = Watched(device.fetch)
    clamp_data(watched["small"])
    assert watched.find() == []
    watched["small"].data.copy_(watched.values[1])
    device.let = 1
    assert watched.find() == ["small"]
    device.let = 10
    assert watched.find() == []
    assert len(device.asked) == 1  # for all tensors; on a real device in each step, changed or not


def test_a_change_that_its_version_tells_of_waits_for_no_answer() -> None:
    watched = Watched(Late().fetch)
    clamp(watched["small"])
    assert watched.find() == ["small"]


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[Tensor, ...] = (), kwargs: object = None
    ) -> object:
        self.operations += 1
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_a_step_without_changes_costs_a_few_operations_for_all_tensors_together() -> None:
    parameters = [torch.randn(100) for _ in range(500)]
    changes = LocalChanges([str(n) for n in range(500)], parameters, lambda value: Arriving(value, Copies()))
    changes.note_loaded()
    with Counting() as counted:
        assert changes.find(parameters, ()) == []
        changes.note_loaded()
    assert counted.operations < 10
