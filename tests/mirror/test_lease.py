"""One writer at a time has a mirror, and one that is dead loses it by silence alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mirror.mirrored import replaces_only_what_was_read
from ormo_server.mirror.buckets import BucketError, Folder, Object
from ormo_server.mirror.identity import Writer, new_writer, read_writer, write_writer
from ormo_server.mirror.lease import LEASE, HeldError, Lease, LostError, read_record
from ormo_server.store import StoreError

SECONDS = 30.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Answers(Folder):
    """A folder whose next answers to a `replace` get lost, after or before it was done."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.faults: list[str] = []

    def replace(self, name: str, content: bytes, over: Any) -> Any:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "unheard":
            raise BucketError("no answer")
        version = super().replace(name, content, over)
        if fault == "done":
            raise BucketError("no answer")
        if fault == "asked twice":
            super().replace(name, content, over)
        return version


class Stage:
    def __init__(self, folder: Path) -> None:
        self.bucket, self.clock = Answers(folder), Clock()

    def lease(self, name: str, continues: Sequence[str] = (), before: str = "") -> Lease:
        return Lease(self.bucket, Writer(name, tuple(continues), before), SECONDS, self.clock)

    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((Path(self.bucket.address) / LEASE).read_bytes())
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_lease_that_is_nobodys_is_taken_and_renewed(stage: Stage) -> None:
    lease = stage.lease("a")
    assert read_record(stage.bucket) is None
    assert lease.take() is None
    assert (lease.held, stage.said()["writer"], stage.said()["iteration"]) == (True, "a", 0)
    stage.clock.now += SECONDS - 1
    lease.renew(7)
    stage.clock.now += SECONDS - 1
    assert (lease.held, stage.said()["iteration"]) == (True, 7)
    lease.renew(None)
    assert stage.said()["iteration"] == 7


def test_a_second_writer_is_refused_as_long_as_the_first_renews(stage: Stage) -> None:
    first, second = stage.lease("a"), stage.lease("b")
    first.take()
    first.renew(12)
    with pytest.raises(HeldError, match=r"which had iteration 12 at .*, writes there: stop it") as refused:
        second.take()
    assert refused.value.seconds == SECONDS
    stage.clock.now += SECONDS - 1
    first.renew(13)
    stage.clock.now += 2
    with pytest.raises(HeldError) as refused:
        second.take()
    assert refused.value.seconds == 0, "it has renewed it: it lives"


def test_the_lease_of_a_dead_writer_is_taken_after_its_time_of_silence(stage: Stage) -> None:
    first, second = stage.lease("a"), stage.lease("b", ["a"])
    first.take()
    first.renew(12)
    with pytest.raises(HeldError):
        second.take()
    stage.clock.now += SECONDS - 1
    with pytest.raises(HeldError) as refused:
        second.take()
    assert refused.value.seconds == pytest.approx(1.0)
    stage.clock.now += 1
    record = second.take()
    assert record is not None
    assert record.iteration == 12
    assert stage.said()["iteration"] == 12, "until the second one has more to say"


def test_a_writer_that_lost_its_lease_hears_of_it_and_never_gets_it_back(stage: Stage) -> None:
    first, second = stage.lease("a"), stage.lease("b", ["a"])
    first.take()
    with pytest.raises(HeldError):
        second.take()
    stage.clock.now += SECONDS
    assert not first.held, "before anybody has taken it"
    second.take()
    with pytest.raises(LostError, match="has taken it over"):
        first.renew(20)
    assert (first.held, second.held) == (False, True)
    second.renew(None, released=True)
    with pytest.raises(LostError, match="has gone on with the run of this directory"):
        stage.lease("a").take()


def test_a_lease_that_was_given_back_is_free_at_once(stage: Stage) -> None:
    first, second = stage.lease("a"), stage.lease("b")
    first.take()
    first.renew(5, released=True)
    assert not first.held
    second.take()
    assert second.held
    assert stage.said()["iteration"] == 0, "it is another run's"


@pytest.mark.parametrize("again", [("a", ""), ("b", "a")])
def test_the_same_directory_has_no_need_to_wait(stage: Stage, again: tuple[str, str]) -> None:
    stage.lease("a").take()
    lease = stage.lease(again[0], before=again[1])
    lease.take()
    assert lease.held


@pytest.mark.parametrize("faults", [["asked twice"], ["done"], ["unheard", "done"], ["done", "done", "asked twice"]])
def test_answers_that_get_lost_cost_nobody_the_lease(stage: Stage, faults: list[str]) -> None:
    lease = stage.lease("a")
    lease.take()
    stage.bucket.faults = faults
    for iteration in range(len(faults)):
        try:
            lease.renew(iteration)
        except BucketError:
            continue
    lease.renew(99)
    assert (lease.held, stage.said()["iteration"]) == (True, 99)


def test_time_is_counted_from_when_a_renewal_was_sent(stage: Stage) -> None:
    lease = stage.lease("a")
    replace: Callable[..., Any] = stage.bucket.replace

    def slowly(*arguments: Any) -> Any:
        stage.clock.now += 20
        return replace(*arguments)

    stage.bucket.replace = slowly  # type: ignore[method-assign]
    lease.take()
    stage.clock.now += 9
    assert lease.held
    stage.clock.now += 1
    assert not lease.held


def test_an_object_that_somebody_removed_is_written_again(stage: Stage) -> None:
    lease = stage.lease("a")
    lease.take()
    stage.bucket.remove([LEASE])
    lease.renew(3)
    assert (lease.held, stage.said()["iteration"]) == (True, 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "is malformed"), (b'{"writer": "a"}', "is malformed"), (b"\xff", "is malformed")],
)
def test_a_lease_that_makes_no_sense_is_not_taken(stage: Stage, content: bytes, said: str) -> None:
    stage.bucket.replace(LEASE, content, None)
    with pytest.raises(StoreError, match=said):
        stage.lease("a").take()


def test_a_lease_of_a_later_format_is_not_taken(stage: Stage) -> None:
    stage.lease("a").take()
    record = stage.said() | {"format_version": 2, "more": 1}
    (Path(stage.bucket.address) / LEASE).write_text(json.dumps(record))
    with pytest.raises(StoreError, match="format version 2, and this server reads 1"):
        stage.lease("b").take()


def test_of_two_that_take_it_at_once_one_gets_it(stage: Stage) -> None:
    class Late(Answers):
        def read(self, name: str) -> Object | None:
            found = super().read(name)
            if found is None:
                stage.lease("a").take()  # just after it was looked at
            return found

    late = Lease(Late(Path(stage.bucket.address)), Writer("b"), SECONDS, stage.clock)
    with pytest.raises(HeldError, match="has just begun to write there"):
        late.take()
    assert (late.held, stage.said()["writer"]) == (False, "a")


# Which writer a directory is


def test_a_directory_knows_who_it_is(tmp_path: Path) -> None:
    assert read_writer(tmp_path) is None
    writer = new_writer(("older",))
    write_writer(tmp_path, writer)
    assert read_writer(tmp_path) == writer
    assert new_writer().name != new_writer().name


def test_a_copy_of_a_directory_is_not_the_same_writer(tmp_path: Path) -> None:
    write_writer(tmp_path, new_writer())
    other = tmp_path / "other"
    other.mkdir()
    (other / "mirror.json").write_bytes((tmp_path / "mirror.json").read_bytes())
    assert read_writer(other) is None


def test_an_identity_that_can_not_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mirror.json").write_text("[]")
    with pytest.raises(StoreError, match="remove it, and the directory is mirrored as a new one"):
        read_writer(tmp_path)


# A folder as a bucket


def test_a_folder_replaces_only_what_was_read(tmp_path: Path) -> None:
    replaces_only_what_was_read(Folder(tmp_path))


def test_a_folder_that_is_not_there_can_not_be_read(tmp_path: Path) -> None:
    """It may be a disk that is not mounted: taken for an empty mirror, a new run would begin."""
    folder = Folder(tmp_path / "none")
    for use in (folder.sizes, lambda: folder.read("x"), lambda: folder.replace("x", b"", None)):
        with pytest.raises(BucketError, match="No such file or directory"):
            use()
    with pytest.raises(BucketError):
        folder.upload(tmp_path / "x", "y")
    assert not (tmp_path / "none").exists()
