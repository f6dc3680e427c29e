"""What `ormo-local` says when the system starts no more programs."""

import errno
import os
from pathlib import Path

import pytest

from ormo_worker.local import cluster
from ormo_worker.local.cluster import Cluster, ClusterError
from ormo_worker.local.config import LocalSettings


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
