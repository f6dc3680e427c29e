from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from ormo_worker.tasks.images import import_torchvision
from system.programs import Stage, staged
from worker.fake_server import FakeServer

if find_spec("timm") and find_spec("torchvision"):
    # Before a library does: with the torchvision of the package index beside a CPU build of torch, only this can.
    import_torchvision()


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(300))  # a program that imports two large libraries, beside others
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # others' are not ours to mend


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as made:
        yield made


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer().start()
    yield fake
    fake.stop()
