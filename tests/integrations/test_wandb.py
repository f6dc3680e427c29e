"""The page's tracker, with the real W&B and no network."""

import json
from pathlib import Path

import pytest

from integrations.trackers import FIGURES, simulate

wandb = pytest.importorskip("wandb", reason="`make test-integrations` installs it")


def test_a_run_is_kept_offline_with_its_settings_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal import datastore

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    written = simulate("wandb", tmp_path, monkeypatch)
    assert "did not get to the tracker" not in capsys.readouterr().out
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    store = datastore.DataStore()
    store.open_for_scan(str(file))
    rows, config, finished = [], {}, False
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        finished = finished or record.HasField("exit")
    assert finished
    assert (config["method"], config["workers"]) == ("ormo", 2)
    assert FIGURES | {"updates", "samples", "seconds"} <= {name for row in rows for name in row}
    assert [(row["updates"], row["test_loss"]) for row in rows] == [
        (row["gradients"], row["test_loss"]) for row in written
    ]
