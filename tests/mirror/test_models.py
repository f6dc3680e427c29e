"""`ormo-server export`, and where models come from."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mirror.mirrored import trained
from ormo_server.cli import main
from ormo_server.core.errors import SettingsError
from ormo_server.mirror.models import fetched
from ormo_server.store import CheckpointStore
from service.wire import SMALL, WireWorker, connected, served
from store.building import Net, checkpoint_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory, with a checkpoint of a model with all that is awkward."""
    CheckpointStore(tmp_path / "run", keep=1).write(checkpoint_of(Net()))
    return tmp_path / "run"


def export(model: object, into: object, kind: str = "safetensors") -> int:
    return main(["export", "--model", str(model), "--into", str(into), "--format", kind])


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


def test_a_model_is_written_as_pytorch_and_safetensors_load_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = load_file(run / "latest" / "model.safetensors")
    pt, safe = tmp_path / "below" / "model.pt", tmp_path / "model.safetensors"
    assert export(run, pt, "torch") == 0
    assert capsys.readouterr().out == f"{pt}: {len(expected)} tensors from {run}, torch\n"
    assert export(pt, safe) == 0
    for found in (torch.load(pt, weights_only=True), load_file(safe)):
        assert same(found, expected)
        Net().load_state_dict(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "model.safetensors", "run"]
    assert (safe.stat().st_mode & 0o777) == (run / "latest" / "model.safetensors").stat().st_mode & 0o777


def test_a_model_comes_from_the_newest_copy_in_a_mirror(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    trained(tmp_path / "run", mirror, 2, 3, drained=True)
    expected = load_file(tmp_path / "run" / "latest" / "model.safetensors")
    shutil.rmtree(tmp_path / "run")
    assert same(fetched(str(mirror)).weights, expected)
    assert same(fetched(mirror.as_uri()).weights, expected)
    with served(tmp_path / "new", model=mirror) as server, connected(server) as stub:
        worker = WireWorker(stub, "w", SMALL, start=77.0)
        worker.join()
        worker.pull()
        assert worker.params[0] == expected["weight"].flatten()[0]


@pytest.mark.parametrize(
    ("model", "into", "code", "said"),
    [
        ("none.pt", "model.pt", 1, "no model to start from: none.pt is missing; expected a file that safetensors"),
        ("empty", "model.pt", 1, "empty is a directory, but not a checkpoint, and has neither model.safetensors nor"),
        ("run", "run/latest/model.safetensors/x", 1, "can't be written"),
    ],
)
def test_what_can_not_be_exported_is_a_sentence(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    into: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(run.parent)
    Path("empty").mkdir()
    assert export(model, into) == code
    assert said in capsys.readouterr().err


def test_an_export_that_fails_leaves_what_was_there(run: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    assert export(tmp_path / "none", tmp_path / "model.pt") == 1
    assert (tmp_path / "model.pt").read_bytes() == before


def test_without_the_library_a_bucket_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "ormo_server.mirror.objects", raising=False)
    with pytest.raises(SettingsError, match=r"needs the library obstore, .*'ormo-parameter-server\[buckets\]'"):
        fetched("s3://bucket/model.pt", tmp_path)


def test_an_address_of_an_unknown_kind_is_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        export("ftp://a/b", "model.pt")
    assert ended.value.code == 2
    assert "begins with ftp://: expected s3://, gs://, az://, file:// or the path of a" in capsys.readouterr().err
