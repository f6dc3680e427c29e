"""The fuzz targets do what they say, on their own seeds and without a fuzzer; `make fuzz` goes on from there."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fuzz import corpus, fuzz_checkpoint, fuzz_exchange, fuzz_framing, fuzz_journal
from fuzz.fuzz_exchange import World
from fuzz.fuzz_framing import message
from ormo_protos.framing import Framing
from ormo_protos.tensors import Chunk, PayloadReceiver
from ormo_server.core.machine import StateMachine


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def variations(seeds: list[bytes], count: int) -> Iterator[bytes]:
    """Seeds put together, with some bytes changed."""
    dice = random.Random(0)
    for _ in range(count):
        made = bytearray(dice.choice(seeds) + dice.choice(seeds))
        for _ in range(dice.randrange(4)):
            made[dice.randrange(len(made))] = dice.randrange(256)
        yield bytes(made)


def test_seeds_of_the_framing_are_messages_of_each_kind_and_shape() -> None:
    read = {(kind, fuzz_framing.agree(kind, encoded)[0]) for kind, encoded in map(message, fuzz_framing.seeds())}
    assert read == {(kind, shape) for kind in fuzz_framing.KINDS for shape in ("chunk", "headed")}


def test_a_script_describes_fields_however_oddly_they_are_written() -> None:
    header, data = b"\x00\x00\x00\x00", b"\x02\x00\x90\x02ab"  # 0x90: four bytes too many for the length
    _, encoded = message(b"\x80" + b"\x01" + header + data)
    assert encoded == b"\x0a\x00" + b"\x1a\x82\x80\x80\x80\x00ab"


def test_framing_is_checked_on_variations_of_its_seeds() -> None:
    for fuzzed in variations(list(fuzz_framing.seeds()), 500):
        fuzz_framing.check(fuzzed)


def test_scripts_reach_each_way_in_which_an_exchange_can_end(world: World) -> None:
    endings = [fuzz_exchange.check(seed, world) for seed in fuzz_exchange.seeds()]
    assert {ending for ending, _ in endings} == {
        "OK",
        "GONE",
        "BAD_PAYLOAD",
        "BAD_REQUEST",
        "MANIFEST_DIGEST",
        "NOT_A_MEMBER",
        "REPLACED",
        "STALE_REQUEST",
    }
    assert {count for _, count in endings} == {0, 1, 2, 3}


def test_exchanges_are_checked_on_variations_of_their_scripts(world: World) -> None:
    endings = {fuzz_exchange.check(fuzzed, world) for fuzzed in variations(list(fuzz_exchange.seeds()), 500)}
    assert len(endings) > 10


# What was found once.

KEPT = {
    "fuzz_framing": fuzz_framing.check,
    "fuzz_exchange": fuzz_exchange.check,
    "fuzz_journal": fuzz_journal.check,
    "fuzz_checkpoint": fuzz_checkpoint.check,
}


@pytest.mark.parametrize(("target", "name"), [(target, name) for target in KEPT for name in corpus.found(target)])
def test_what_was_found_once_is_not_found_again(world: World, target: str, name: str) -> None:
    given = (world,) if target == "fuzz_exchange" else ()
    KEPT[target](corpus.found(target)[name], *given)


def test_what_is_kept_belongs_to_a_target_and_is_small() -> None:
    kept = list(corpus.FOLDER.rglob("*"))
    assert {path.name for path in kept if path.is_dir()} <= set(KEPT)
    assert sum(path.stat().st_size for path in kept if path.is_file()) < 100_000


# The targets find what they look for.


def found(check: Callable[[bytes], object], seeds: Iterator[bytes]) -> bool:
    for seed in seeds:
        try:
            check(seed)
        except AssertionError:
            return True
    return False


def test_framing_that_takes_one_byte_for_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Framing.decode

    def off_by_one(self: Framing, encoded: bytes) -> object:
        frame = decode(self, encoded)
        return Chunk(frame.offset + 1, frame.data) if isinstance(frame, Chunk) else frame

    assert not found(fuzz_framing.check, fuzz_framing.seeds())
    monkeypatch.setattr(Framing, "decode", off_by_one)
    assert found(fuzz_framing.check, fuzz_framing.seeds())


def test_gradient_that_is_applied_otherwise_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    step = StateMachine.step

    def more(self: StateMachine, *arguments: Any) -> object:
        effects = step(self, *arguments)
        self.state.params[0] += effects.redeemed is not None
        return effects

    monkeypatch.setattr(StateMachine, "step", more)
    assert found(lambda fuzzed: fuzz_exchange.check(fuzzed, world), fuzz_exchange.seeds())


def test_gradient_that_did_not_come_whole_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = PayloadReceiver.accept

    def be_content(self: PayloadReceiver, chunk: Chunk) -> PayloadReceiver:
        accept(self, chunk).complete = True
        return self

    monkeypatch.setattr(PayloadReceiver, "accept", be_content)
    assert found(lambda fuzzed: fuzz_exchange.check(fuzzed, world), fuzz_exchange.seeds())


def test_failure_of_the_server_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PayloadReceiver, chunk: Chunk) -> None:
        raise KeyError

    monkeypatch.setattr(PayloadReceiver, "accept", fail)
    assert found(lambda fuzzed: fuzz_exchange.check(fuzzed, world), fuzz_exchange.seeds())


def test_buffer_that_is_not_given_back_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.pool, "give", lambda payload: None)
    assert found(lambda fuzzed: fuzz_exchange.check(fuzzed, world), fuzz_exchange.seeds())


def test_a_journal_ends_in_each_way_there_is() -> None:
    assert {fuzz_journal.check(seed) for seed in fuzz_journal.seeds()} == {
        "whole",
        "doubled",
        "lost",
        "torn",
        "error",
    }


def test_journals_are_read_in_variations_of_the_seeds() -> None:
    for fuzzed in variations(list(fuzz_journal.seeds()), 200):
        fuzz_journal.check(fuzzed)


def test_checkpoints_are_read_or_refused() -> None:
    assert {fuzz_checkpoint.check(seed) for seed in fuzz_checkpoint.seeds()} == {"read", "refused"}
    for fuzzed in variations(list(fuzz_checkpoint.seeds()), 100):
        fuzz_checkpoint.check(fuzzed)
