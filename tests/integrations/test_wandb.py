"""The page's tracker, with the real W&B and no network."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.trackers import FIGURES, simulate

wandb = pytest.importorskip("wandb", reason="`make test-integrations` installs it")


_BLOCK, _HEADER = 32768, 7


def records(data: bytes) -> Iterator[bytes]:
    """What a file of W&B's holds: after 7 bytes of its own a log as LevelDB has it, in blocks of 32 KiB."""
    at, parts = _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # no room for a header: the rest of the block is empty
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def finished(file: Path) -> list[bytes]:
    """What a run has kept, once its end is there, too: W&B's own process writes it some time after all else."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list(records(file.read_bytes()))
        if found and wandb_internal_pb2.Record.FromString(found[-1]).HasField("exit"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"the run did not end in {file}")


def test_a_run_is_kept_offline_with_its_settings_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.proto import wandb_internal_pb2

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    written = simulate("wandb", tmp_path, monkeypatch)
    assert "did not get to the tracker" not in capsys.readouterr().out
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    kept = [wandb_internal_pb2.Record.FromString(data) for data in finished(file)]
    config = {item.key: json.loads(item.value_json) for record in kept for item in record.run.config.update}
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in kept
        if record.HasField("history")
    ]
    assert (config["method"], config["workers"]) == ("ormo", 2)
    assert FIGURES | {"updates", "samples", "seconds"} <= {name for row in rows for name in row}
    assert [(row["updates"], row["test_loss"]) for row in rows] == [
        (row["gradients"], row["test_loss"]) for row in written
    ]
