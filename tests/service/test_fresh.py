"""`--fresh` begins a new run where one was, and keeps what that one left."""

import logging
from pathlib import Path

import grpc
import pytest

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.service.server import Server
from ormo_server.store import StoreError
from service.wire import SMALL, Refused, WireWorker, connected, payload, served, settings


def trained(directory: Path, start: float, *, incarnation: int = 1, **changes: object) -> float:
    """What the parameters are after a gradient of 1 at a learning rate of 1, where a worker brings `start`."""
    with served(directory, **changes) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", incarnation=incarnation, start=start)
        worker.join()
        worker.pull()
        worker.push(payload(SMALL, 1.0))
        worker.pull()
        assert server.drain()
        return worker.params[0].item()


def aside_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("before-*"))


def test_a_new_run_has_its_own_workers_model_and_the_old_one_goes_on_from_where_it_was_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert trained(run, 5.0, journal=True) == 4.0
    (run / "notes.txt").write_text("mine")
    kept = {path.name for path in run.iterdir()} - {".lock", "notes.txt"}
    assert {"journal", "latest"} < kept
    with caplog.at_level(logging.INFO, "ormo_server"):
        assert trained(run, 9.0, fresh=True) == 8.0
    (aside,) = aside_in(run)
    assert f"the one that was in {run} is kept in {aside}" in caplog.text
    assert {path.name for path in aside.iterdir()} == kept
    assert (run / "notes.txt").read_text() == "mine"
    assert trained(aside, 0.0, incarnation=2) == 2.5, "4 − 1 − 0.5: its parameters and its momentum"


def test_where_no_run_was_there_is_nothing_to_move(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ormo_server"):
        assert trained(tmp_path / "run", 5.0, fresh=True) == 4.0
    assert aside_in(tmp_path / "run") == []
    assert "a new run begins" not in caplog.text


def test_a_new_run_may_start_from_the_model_of_the_one_that_is_moved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, 5.0)
    assert trained(run, 0.0, fresh=True, model=run / "latest") == 3.0
    assert len(aside_in(run)) == 1


def test_a_model_that_can_not_be_read_leaves_the_old_run_in_its_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, 5.0)
    with pytest.raises(StoreError, match="no model to start from"):
        Server(settings(run, fresh=True, model=tmp_path / "none.safetensors"))
    assert aside_in(run) == []
    assert trained(run, 0.0, incarnation=2) == 2.5


def test_a_run_whose_latest_checkpoint_is_gone_is_moved_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, 5.0)
    for path in run.glob("checkpoint-*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(StoreError, match="--directory for a new run"):
        Server(settings(run))
    assert trained(run, 9.0, fresh=True) == 8.0
    assert (aside_in(run)[0] / "latest").is_symlink()


def test_the_directory_of_a_server_that_runs_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with served(run) as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        with pytest.raises(StoreError, match="in use by another program"):
            Server(settings(run, fresh=True))
        assert aside_in(run) == []
        assert stub.GetStatus(pb.GetStatusRequest()).phase == pb.GetStatusResponse.PHASE_TRAINING


def test_a_worker_with_another_model_is_told_the_folder_and_the_flag(tmp_path: Path) -> None:
    with served(tmp_path / "run") as server, connected(server) as stub:
        WireWorker(stub, "w").join()
        with pytest.raises(Refused, match=f"run in {tmp_path / 'run'}: .* --fresh") as refused:
            WireWorker(stub, "other").ask_to_join(model_digest=b"x" * 32)
        assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_it_is_a_flag_only(tmp_path: Path) -> None:
    """In the environment of a container that restarts it would begin anew each time."""
    from ormo_runtime.settings_loader import read_settings
    from ormo_server.settings import ServerSettings

    assert not read_settings(ServerSettings, [], {"ORMO_FRESH": "true"}, program="serve").fresh
    assert read_settings(ServerSettings, ["--fresh"], {}, program="serve").fresh
