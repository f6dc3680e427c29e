import pytest

from journal.disk import Disk
from ormo_server.journal import writer


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small gradients, too, go into files of their own, as large ones do."""
    monkeypatch.setitem(writer.IN_LINE_BYTES, "always", 0)
