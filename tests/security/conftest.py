from collections.abc import Iterator
from pathlib import Path

import pytest

from security.authority import Authority
from system.programs import Stage, staged


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path) as made:
        yield made
