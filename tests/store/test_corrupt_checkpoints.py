"""A corrupt checkpoint is never used: the one before is, loudly."""

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ormo_server.store import CheckpointStore, StoreError
from store.building import at, iterations, reseal

Damage = Callable[[Path], None]


def truncate(name: str) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / name
        path.write_bytes(path.read_bytes()[:-10])

    return damage


def flip_a_bit(name: str) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / name
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    return damage


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def replace(name: str, text: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).write_text(text)

    return damage


def empty(name: str) -> Damage:
    return replace(name, "")


def sealed(damage: Damage) -> Damage:
    """The damage with checksums that fit, so that what lies behind them is met."""

    def damage_and_seal(directory: Path) -> None:
        damage(directory)
        reseal(directory)

    return damage_and_seal


def document(**changes: object) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "checkpoint.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def poison(directory: Path) -> None:
    tensors = load_file(directory / "state.safetensors")
    tensors["rule.momentum"][0] = float("nan")
    save_file(tensors, directory / "state.safetensors")


DAMAGES = {
    "a tensor file cut short": (truncate("state.safetensors"), "state.safetensors has the SHA-256"),
    "a flipped bit in the state": (flip_a_bit("state.safetensors"), "state.safetensors has the SHA-256"),
    "a flipped bit in the JSON": (flip_a_bit("checkpoint.json"), "checkpoint.json has the SHA-256"),
    "a flipped bit in the sums": (flip_a_bit("SHA256SUMS"), "SHA256SUMS is malformed"),
    "no state": (remove("state.safetensors"), "state.safetensors is missing"),
    "no JSON": (remove("checkpoint.json"), "checkpoint.json is missing"),
    "no sums": (remove("SHA256SUMS"), "SHA256SUMS is missing"),
    "empty JSON": (empty("checkpoint.json"), "checkpoint.json has the SHA-256"),
    "empty sums": (empty("SHA256SUMS"), "SHA256SUMS is malformed: it has no checksum for"),
    "no JSON in the JSON": (sealed(replace("checkpoint.json", "{")), "checkpoint.json is malformed"),
    "a list in the JSON": (sealed(replace("checkpoint.json", "[]")), "checkpoint.json is malformed"),
    "an unknown version": (sealed(document(format_version=99)), "has format version 99, and this server reads 1"),
    "an unknown field": (sealed(document(surprise=1)), "checkpoint.json is malformed"),
    "a manifest that contradicts itself": (sealed(document(manifest=[])), "checkpoint.json is malformed"),
    "NaN in the state": (sealed(poison), "state.safetensors has NaN or infinite values in 'rule.momentum'"),
    "no safetensors": (sealed(truncate("state.safetensors")), "state.safetensors is not a whole safetensors file"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES.keys())
def test_the_one_before_is_used_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage, told: str
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    good, bad = store.write(at(1)), store.write(at(2))
    damage(bad)
    newest = CheckpointStore(tmp_path, keep=3).newest()
    assert newest is not None
    assert newest.checkpoint.snapshot.fields["iteration"] == 1
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert told in record.getMessage()
    assert f"{good} is used instead" in record.getMessage()


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES.keys())
def test_if_all_are_corrupt_no_new_run_is_started(tmp_path: Path, damage: Damage, told: str) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for iteration in (1, 2):
        damage(store.write(at(iteration)))
    with pytest.raises(StoreError) as caught:
        store.newest()
    assert "none of the checkpoints" in str(caught.value)
    assert told in str(caught.value)


def test_an_older_one_no_longer_counts_as_drained(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    assert at(1).drained
    store.write(at(1))
    remove("checkpoint.json")(store.write(at(2)))
    newest = store.newest()
    assert newest is not None
    assert not newest.checkpoint.drained
    assert not newest.read_again().drained
    assert newest.skipped == 1


def test_corrupt_ones_do_not_count_among_those_kept_and_go_with_their_elders(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.write(at(1))
    truncate("state.safetensors")(store.write(at(2)))
    store.newest()
    store.write(at(3))
    assert iterations(store) == [1, 2, 3]
    store.write(at(4))
    assert iterations(store) == [3, 4]


def test_a_corrupt_one_is_neither_changed_nor_removed_by_reading(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    remove("checkpoint.json")(store.write(at(2)))
    with pytest.raises(StoreError, match="or choose another --directory for a new run"):
        store.newest()
    assert iterations(store) == [2]


@pytest.mark.parametrize(
    "damage", [truncate("model.safetensors"), flip_a_bit("model.safetensors"), remove("model.safetensors")]
)
def test_the_model_file_is_a_copy_and_nothing_is_lost_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    store.write(at(1))
    damage(store.write(at(2)))
    newest = store.newest()
    assert newest is not None
    assert (newest.checkpoint.snapshot.fields["iteration"], newest.checkpoint.drained, newest.skipped) == (2, True, 0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "nothing is lost: the state has the model too" in record.getMessage()


def test_a_folder_without_files_is_no_checkpoint_whatever_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stray = tmp_path / "checkpoint-99999999-iteration-5"
    (stray / "lost+found").mkdir(parents=True)
    store = CheckpointStore(tmp_path, keep=2)
    assert store.newest() is None
    store.write(at(1))
    newest = store.newest()
    assert newest is not None
    assert (newest.checkpoint.drained, newest.skipped, caplog.records) == (True, 0, [])
    assert store.write(at(2)).name == "checkpoint-00000002-iteration-2"
    assert stray.exists()


def test_a_name_that_a_stray_folder_has_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001-iteration-5" / "notes").mkdir(parents=True)
    assert CheckpointStore(tmp_path, keep=1).write(at(5)).name == "checkpoint-00000002-iteration-5"


def test_the_last_one_is_missed_where_latest_names_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    good, gone = store.write(at(1)), store.write(at(2))
    gone.rename(tmp_path / "moved")
    newest = store.newest()
    assert newest is not None
    assert (newest.checkpoint.snapshot.fields["iteration"], newest.checkpoint.drained, newest.skipped) == (1, False, 1)
    assert f"{gone} is missing, and {tmp_path / 'latest'} names it as the last one; {good} is used" in caplog.text
    assert store.write(at(1)).name == "checkpoint-00000003-iteration-1", "the missing one may come back"


def test_no_new_run_begins_where_all_are_missing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    path = store.write(at(1))
    path.rename(tmp_path / "moved")
    with pytest.raises(StoreError, match=f"none of the checkpoints in .*{path.name} is missing.*from a backup"):
        store.newest()


def test_latest_may_be_behind(tmp_path: Path) -> None:
    """Where it could not be pointed anew it may name one that has gone since."""
    store = CheckpointStore(tmp_path, keep=1)
    store.write(at(1))
    stays = (tmp_path / "latest").readlink()
    store.write(at(2))
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(stays)
    newest = store.newest()
    assert newest is not None
    assert (newest.checkpoint.drained, newest.skipped) == (True, 0)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_checkpoint_that_can_not_be_read_for_want_of_something_is_not_taken_for_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    newest = [store.write(at(iteration)) for iteration in (1, 2)][-1]
    read = Path.read_text

    def scarce(path: Path, *how: Any) -> str:
        if path.parent == newest:
            raise OSError(number, os.strerror(number))
        return read(path, *how)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", scarce)
        with pytest.raises(StoreError, match=os.strerror(number)):
            store.newest()
    found = store.newest()
    assert found is not None
    assert found.checkpoint.snapshot.fields["iteration"] == 2
    assert found.skipped == 0
