"""What `ormo-local` says when the system starts no more programs."""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from ormo_worker.local import cluster
from ormo_worker.local.cluster import Cluster, ClusterError
from ormo_worker.local.settings import LocalSettings


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN])
def test_a_program_that_can_not_be_started_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def scarce(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cluster, "Child", scarce)
    local = Cluster(LocalSettings(directory=tmp_path))
    with pytest.raises(ClusterError, match=rf"server can't be started \({os.strerror(number)}\): take fewer --workers"):
        local.start(print)


def test_programs_have_its_settings_as_flags_and_the_rest_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port for metrics is the server's: with the variable, too, each worker would want the same one and end."""
    for name, value in {"METRICS_LISTEN": "127.0.0.1:9464", "CONFIG": "local.toml", "JOURNAL": "true"}.items():
        monkeypatch.setenv(f"ORMO_{name}", value)
    started: list[tuple[Sequence[str], Mapping[str, str]]] = []

    def child(name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> NoReturn:
        started.append((arguments, environment))
        raise OSError(errno.EMFILE, "enough")

    monkeypatch.setattr(cluster, "Child", child)
    with pytest.raises(ClusterError):
        Cluster(LocalSettings(directory=tmp_path, metrics_listen="127.0.0.1:9464")).start(print)
    ((arguments, environment),) = started
    assert "127.0.0.1:9464" in arguments
    ours = {name: value for name, value in environment.items() if name.startswith("ORMO_")}
    assert ours.items() >= {("ORMO_JOURNAL", "true")}
    assert not ours.keys() & {"ORMO_METRICS_LISTEN", "ORMO_CONFIG"}
    assert environment["PATH"] == os.environ["PATH"]
