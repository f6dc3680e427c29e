"""The page's tracker, with the real MLflow and a file for its database."""

from pathlib import Path

import pytest

from integrations.trackers import FIGURES, simulate

mlflow = pytest.importorskip("mlflow", reason="`make test-integrations` installs it")


def test_a_run_is_kept_with_its_settings_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    written = simulate("mlflow", tmp_path, monkeypatch)
    assert "did not get to the tracker" not in capsys.readouterr().out
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("ordered-momentum")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert (run.data.params["method"], run.data.params["workers"]) == ("ormo", "2")
    assert FIGURES | {"samples", "seconds"} <= run.data.metrics.keys()
    history = client.get_metric_history(run.info.run_id, "test_loss")
    assert [(each.step, each.value) for each in history] == [(row["gradients"], row["test_loss"]) for row in written]
