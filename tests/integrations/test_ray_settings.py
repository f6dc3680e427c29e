"""What `ormo-ray` makes of its settings; no Ray is needed for it."""

import sys
from pathlib import Path

import pytest

from ormo_runtime.settings_loader import SettingsProblemsError, read_settings
from ormo_server.settings import ServerSettings
from ormo_worker.integrations.ray.cli import main
from ormo_worker.integrations.ray.settings import RaySettings, ScaleSettings
from ormo_worker.settings import RunSettings


def settings(*words: str) -> RaySettings:
    return read_settings(RaySettings, words, {}, program="ormo-ray")


def of_worker(*words: str) -> RunSettings:
    return read_settings(RunSettings, settings(*words).worker_words("head:50051")[1:], {}, program="ormo-worker run")


def of_server(*words: str) -> ServerSettings:
    given = settings(*words).server_words("127.0.0.1:50051", Path("/data/run"))
    return read_settings(ServerSettings, given[1:], {}, program="ormo-server serve")


def test_without_ray_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for words in ([], ["scale", "--workers", "2"]):
        assert main(words) == 2
        assert "Ray is not installed: pip install 'ormo-parameter-server[ray]'" in capsys.readouterr().err


def test_workers_are_told_server_task_and_credentials() -> None:
    told = of_worker("--task", "a.py:A", "--data-dir", "/data", "--tls-ca", "ca.pem", "--token-file", "token")
    assert (told.server, told.task, told.data_dir) == ("head:50051", "a.py:A", Path("/data"))
    assert (told.tls_ca, told.token_file, told.tls_cert) == (Path("ca.pem"), Path("token"), None)


@pytest.mark.parametrize(
    ("words", "device", "threads"),
    [
        ([], "cpu", 1),
        (["--gpus-per-worker", "0.5", "--cpus-per-worker", "0.5"], "cuda", 1),
        (["--gpus-per-worker", "1", "--cpus-per-worker", "8"], "cuda", 8),
        (["--worker-flags=--device auto --threads 3"], "auto", 3),
    ],
)
def test_workers_compute_on_what_ray_keeps_for_them(words: list[str], device: str, threads: int) -> None:
    told = of_worker(*words)
    assert (told.device, told.threads) == (device, threads)


def test_the_server_has_a_journal_and_room_for_twice_as_many_workers() -> None:
    assert of_server().journal
    assert of_server("--workers", "100").max_workers == 200
    told = of_server("--workers", "100", "--server-flags=--max-workers 300 --no-journal --learning-rate 0.5")
    assert (told.max_workers, told.journal, told.learning_rate) == (300, False, 0.5)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--server", "h:1", "--directory", "run"], "--server names one that runs already: give one or the other"),
        (["--server", "h:1", "--server-flags=--insecure"], "give one or the other"),
        (["--address", "ray://h:10001"], "expected auto or HOST:PORT, on a node of the cluster"),
        (["--address", "here"], "expected HOST:PORT"),
        (["--name", "a b"], "--name"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(words: list[str], sentence: str) -> None:
    with pytest.raises(SettingsProblemsError, match=sentence.replace("(", r"\(")):
        settings(*words)


def test_scale_goes_by_what_is_typed() -> None:
    assert read_settings(ScaleSettings, ["--workers", "3"], {"ORMO_WORKERS": "4"}, program="x").workers == 3
    with pytest.raises(SettingsProblemsError, match="--workers is missing"):
        read_settings(ScaleSettings, [], {"ORMO_WORKERS": "4"}, program="x")
