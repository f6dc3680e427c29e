"""What is planted in the files of a run is found by whoever reads them, and nothing in an untouched one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chaos.archive import Archive
from chaos.checker import violations
from chaos.closed_form import deviations
from chaos.evidence import Evidence, Told
from chaos.lives import read_lives
from chaos.loads import MARKS, manifest_of
from ormo_protos.manifest import FLOAT32
from ormo_protos.tensors import Payload, PayloadLayout
from ormo_server.journal.records import End, chain_lines, opening, parse
from ormo_server.service.server import Server
from service.wire import WireWorker, connected, served
from store.building import reseal

WORKERS, ELEMENTS = 2, 8


class Run:
    """Lives of a server in this process, of two workers each, which end without a drain."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.journal = changes["journal"]
        self.archive = folder / "archive"
        self.evidence = Evidence()
        self._archive = Archive(folder / "run", self.archive)
        self._counts = [0] * WORKERS
        for life in range(3):
            self._archive.begin_life()
            with served(folder / "run", checkpoint_seconds=3600.0, **changes) as server:
                self._live(server, life)
        self._archive.close()

    def _live(self, server: Server, life: int) -> None:
        with connected(server) as stub:
            workers = [WireWorker(stub, f"w{at}", manifest_of(ELEMENTS), incarnation=life + 1) for at in range(WORKERS)]
            for worker in workers:
                worker.join()
            for turn in range(4):
                for column, worker in enumerate(workers):
                    worker.pull()
                    self._push(worker, column)
                if turn % 2 or not self.journal:
                    self._archive.look()
                    assert server.host.checkpoint()
                    self._archive.look()

    def _push(self, worker: WireWorker, column: int) -> None:
        self._counts[column] += 1
        number, ticket = self._counts[column], worker.ticket
        assert ticket is not None
        gradient = Payload(PayloadLayout.of(manifest_of(ELEMENTS), FLOAT32, with_buffers=False))
        gradient.parameters.zero_()
        gradient.parameters[column], gradient.parameters[WORKERS + column] = 1, number % MARKS
        at = worker.push(gradient, samples=number).iteration
        self.evidence.tried[worker.name, number] = (ticket.epoch, ticket.number)
        self.evidence.told.append(Told((worker.name, number), at.epoch, at.number))

    def violations(self) -> list[str]:
        """What the whole harness would say."""
        read_lives(self.evidence, self.archive, journal=self.journal)
        found = violations(self.evidence, workers=WORKERS, bound_seconds=1.0, plain_sgd=False, long=False)
        return found + (deviations(self.archive, WORKERS) if self.journal else [])


def test_a_file_that_is_made_again_under_its_name_is_kept_as_it_is_now(tmp_path: Path) -> None:
    log = tmp_path / "run" / "journal" / "inputs-00000001.log"
    log.parent.mkdir(parents=True)
    archive = Archive(tmp_path / "run", tmp_path / "archive")
    life = archive.begin_life()
    log.touch()
    archive.look()
    log.unlink()
    log.write_bytes(b"a line\n")
    archive.close()
    assert (life / "journal" / log.name).read_bytes() == b"a line\n"


def whole_logs(archive: Path) -> list[Path]:
    return [path for path in sorted(archive.glob("life-*/journal/inputs-*.log")) if b"pushed" in path.read_bytes()]


def rewrite(log: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """In all lives that it is linked in."""
    lines = change(log.read_bytes().splitlines(keepends=True))
    log.write_bytes(b"".join(lines))


def a_push(lines: list[bytes]) -> int:
    return next(at for at, line in enumerate(lines) if b'"pushed"' in line)


def drop_a_line(archive: Path) -> None:
    rewrite(whole_logs(archive)[2], lambda lines: [x for at, x in enumerate(lines) if at != a_push(lines)])


def drop_the_last_lines(archive: Path) -> None:
    rewrite(whole_logs(archive)[2], lambda lines: lines[: a_push(lines)])


def double_a_line(archive: Path) -> None:
    rewrite(whole_logs(archive)[2], lambda lines: lines[: a_push(lines) + 1] + lines[a_push(lines) :])


def file_elsewhere(archive: Path) -> None:
    def moved(lines: list[bytes]) -> list[bytes]:
        before = parse(lines[0], 0)
        assert isinstance(before, End)
        texts = [line[line.index(b"{") : -1] for line in lines[1:]]
        record = json.loads(texts[a_push(texts)])
        record["input"]["bucket"] -= 1
        texts[a_push(texts)] = json.dumps(record, separators=(",", ":")).encode()
        return [opening(before), chain_lines(before.turned_over(), texts)[0]]

    rewrite(whole_logs(archive)[3], moved)


def remove_a_log(archive: Path) -> None:
    name = whole_logs(archive)[2].name
    for path in archive.glob(f"life-*/journal/{name}"):
        path.unlink()


def middle(archive: Path) -> Path:
    return sorted(archive.glob("life-00002/checkpoint-*"))[-2]


def change(checkpoint: Path, file: str, tensor: str) -> None:
    """One bit of one element, in all lives that it is linked in; its checksum fits again."""
    tensors = load_file(checkpoint / file)
    tensors[tensor].view(torch.int32)[0] ^= 1
    save_file(tensors, checkpoint / "new")
    (checkpoint / file).write_bytes((checkpoint / "new").read_bytes())
    (checkpoint / "new").unlink()
    reseal(checkpoint)


def flip_the_state(archive: Path) -> None:
    change(middle(archive), "state.safetensors", "rule.momentum")


def flip_the_model(archive: Path) -> None:
    change(middle(archive), "model.safetensors", "weight")


def damage_a_file(archive: Path) -> None:
    path = middle(archive) / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


PLANTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a line dropped": (drop_a_line, "acknowledged entries"),
    "the end of a log dropped": (drop_the_last_lines, "differ from what the files before it lead to"),
    "a line doubled": (double_a_line, "acknowledged entries"),
    # A replay takes the bucket from the ticket that it has itself, and sees nothing.
    "another bucket": (file_elsewhere, "and the closed form of the journal's lines"),
    "a log removed": (remove_a_log, "the journal is not whole"),
    "the state flipped": (flip_the_state, "rule.momentum differ from what the files before it lead to"),
    "the model flipped": (flip_the_model, "is not that of its state"),
    "a checkpoint damaged": (damage_a_file, "has the SHA-256"),
}
SETTINGS = {"journal": True, "method": "ormo", "journal_fsync": "off"}


@pytest.mark.parametrize("method", ["ormo", "asgd"])
@pytest.mark.parametrize("journal", [True, False])
def test_nothing_is_wrong_with_an_untouched_run(tmp_path: Path, method: str, journal: bool) -> None:
    run = Run(tmp_path, **SETTINGS | {"method": method, "journal": journal})
    assert run.violations() == []
    assert len(run.evidence.starts) == 3
    assert run.evidence.end == 24


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_in_the_files_is_found(tmp_path: Path, name: str) -> None:
    plant, sentence = PLANTED[name]
    run = Run(tmp_path, **SETTINGS)
    plant(run.archive)
    found = run.violations()
    assert any(sentence in violation for violation in found), found


@pytest.mark.parametrize("name", ["a line dropped", "a line doubled", "another bucket", "a log removed"])
def test_the_closed_form_alone_finds_what_the_lines_say_wrong(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path, **SETTINGS)
    assert deviations(run.archive, WORKERS) == []
    PLANTED[name][0](run.archive)
    assert deviations(run.archive, WORKERS)


def test_without_a_journal_a_life_begins_with_the_newest_checkpoint(tmp_path: Path) -> None:
    """As if the server had come back with an older one: here a newer one is put where there was none."""
    run = Run(tmp_path, **SETTINGS | {"journal": False})
    newest = sorted((run.archive / "life-00002").glob("checkpoint-*"))[-1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert any("life-00003 began at iteration 16, and 14 was on the disk" in each for each in run.violations())


def test_of_a_checkpoint_that_was_being_removed_there_may_be_a_part(tmp_path: Path) -> None:
    run = Run(tmp_path, **SETTINGS | {"journal": False})
    (middle(run.archive) / "state.safetensors").unlink()
    assert run.violations() == []


def test_of_the_newest_checkpoint_there_may_not(tmp_path: Path) -> None:
    run = Run(tmp_path, **SETTINGS | {"journal": False})
    (sorted((run.archive / "life-00002").glob("checkpoint-*"))[-1] / "state.safetensors").unlink()
    assert any("state.safetensors is missing" in each for each in run.violations())
