"""Which checkpoints stay, and what a write that fails leaves behind."""

import errno
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from ormo_server.core.errors import SettingsError
from ormo_server.store import Checkpoint, CheckpointStore, DirectoryLock, StoreError, checkpoints, files
from store.building import Net, at, checkpoint_of, iterations


def newest_iteration(store: CheckpointStore) -> int:
    newest = store.newest()
    assert newest is not None
    iteration: int = newest.checkpoint.snapshot.fields["iteration"]
    return iteration


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """A disk that takes no more than this of a file: writes fail half way, in safetensors too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_directory_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "not there", keep=1).newest() is None
    (tmp_path / "notes.txt").touch()
    assert CheckpointStore(tmp_path, keep=1).newest() is None


def test_the_directory_is_made_with_its_parents_by_the_first_write(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "runs" / "one", keep=1)
    assert store.write(at(0)).parent == tmp_path / "runs" / "one"


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (0, 50, 100, 1000):
        store.write(at(iteration))
    assert iterations(store) == [100, 1000]
    assert newest_iteration(store) == 1000


def test_a_store_keeps_at_least_one() -> None:
    with pytest.raises(SettingsError, match="expected at least 1"):
        CheckpointStore(Path(), keep=0)


def test_the_one_written_last_is_the_newest_even_at_a_lower_iteration(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.write(at(1000))
    store.write(at(900))
    assert iterations(store) == [900]
    assert newest_iteration(CheckpointStore(tmp_path, keep=1)) == 900


def test_an_iteration_that_is_written_twice_is_there_as_written_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    first = store.write(at(7))
    second = store.write(at(7))
    assert first != second
    assert store.paths() == [second]


def test_latest_points_at_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for iteration in (1, 2):
        path = store.write(at(iteration))
    assert (tmp_path / "latest").resolve() == path.resolve()
    assert store.paths() == [path]


def test_a_place_without_links_goes_without_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    store = CheckpointStore(tmp_path, keep=1)
    path = store.write(at(1))
    assert list(tmp_path.iterdir()) == [path]


def test_stale_directories_go_with_the_next_write_and_nothing_else_does(tmp_path: Path) -> None:
    stale = tmp_path / ".writing-checkpoint-00000001-iteration-5"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"coarse")
    (tmp_path / "notes.txt").touch()
    store = CheckpointStore(tmp_path, keep=1)
    assert store.newest() is None
    assert stale.exists()
    path = store.write(at(5))
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "latest", "notes.txt"}


def test_stale_directories_go_even_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / ".writing-checkpoint-00000001-iteration-5").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError):
        CheckpointStore(tmp_path, keep=1).write(at(5))
    assert not list(tmp_path.iterdir())


def test_an_old_one_that_can_not_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    store = CheckpointStore(tmp_path, keep=1)
    old = store.write(at(1))
    monkeypatch.setattr("shutil.rmtree", refuse)
    new = store.write(at(2))
    assert store.paths() == [old, new]
    assert f"{old} is no longer needed and can't be removed" in caplog.text


@pytest.mark.parametrize(
    ("tensor", "named", "bad"),
    [
        *((*of, bad) for of in (("params", "gain"), ("rule.momentum",) * 2) for bad in (math.nan, math.inf, -math.inf)),
        ("float_buffers", "norm.running_mean", math.nan),
    ],
)
def test_non_finite_values_are_refused_and_the_last_good_one_stays(
    tmp_path: Path, tensor: str, named: str, bad: float
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.write(checkpoint_of(Net()))
    before = content(tmp_path)
    broken = checkpoint_of(Net())
    spec = next((spec for spec in broken.manifest.tensors if spec.name == named), None)
    broken.snapshot.tensors[tensor][spec.offset if spec else 0] = bad
    with pytest.raises(StoreError, match=f"'{named}'.*NaN or infinite"):
        store.write(broken)
    assert content(tmp_path) == before


def test_a_parameter_that_overflows_in_bfloat16_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(Net())
    spec = next(spec for spec in checkpoint.manifest.tensors if spec.name == "coarse")
    checkpoint.snapshot.tensors["params"][spec.offset] = torch.finfo(torch.float32).max
    with pytest.raises(StoreError, match="'coarse'"):
        CheckpointStore(tmp_path, keep=1).write(checkpoint)


def test_counters_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be written as JSON"):
        CheckpointStore(tmp_path, keep=1).write(checkpoint_of(nn.Linear(2, 1), learning_rate=float("nan")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("calls_before", range(6))
def test_a_disk_that_is_full_at_any_sync_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.write(at(1))
    before, names = content(tmp_path), sorted(path.name for path in tmp_path.iterdir())
    calls = iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) >= calls_before:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"iteration 2 can't be written .*No space left on device.*make room"):
        store.write(at(2))
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    monkeypatch.undo()
    store.write(at(2))
    assert iterations(store) == [2]


def test_all_files_and_directories_are_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    path = CheckpointStore(tmp_path, keep=1).write(at(3))
    aside = f"{tmp_path}/.writing-{path.name}"
    assert set(synced[:-2]) == {f"{aside}/{file.name}" for file in path.iterdir()}
    assert synced[-2:] == [aside, str(tmp_path)]


def test_a_write_that_breaks_off_half_way_in_the_tensors_leaves_all_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.write(at(1))
    before = content(tmp_path)
    large: Checkpoint = checkpoint_of(nn.Linear(1000, 1000))
    with largest_file(2_000_000), pytest.raises(StoreError, match=r"model\.safetensors: .*File too large"):
        store.write(large)
    assert content(tmp_path) == before
    store.write(large)


def test_a_directory_that_is_a_file_is_one_clear_sentence(tmp_path: Path) -> None:
    place = tmp_path / "runs"
    place.touch()
    store = CheckpointStore(place, keep=1)
    with pytest.raises(StoreError, match=r"runs can't be read \(Not a directory\)"):
        store.newest()
    with pytest.raises(StoreError, match="runs"):
        store.write(at(1))


def test_one_whose_name_could_not_be_made_safe_never_looks_like_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    first = store.write(at(1))
    removed: list[str] = []
    monkeypatch.setattr(checkpoints, "sync", _fails)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path, **_: removed.append(path.name))
    with pytest.raises(StoreError, match="can't be written"):
        store.write(at(2))
    assert [name[:9] for name in removed] == [".writing-"]
    assert store.paths() == [first]


def _fails(path: Path) -> None:
    raise OSError(errno.EIO, "no disk")


def test_the_directory_of_a_run_and_those_above_it_are_made_to_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    DirectoryLock(tmp_path / "runs" / "mine").release()
    assert synced == [tmp_path / "runs", tmp_path]
