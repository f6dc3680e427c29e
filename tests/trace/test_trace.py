"""The trace as a file: what is written comes back as it was, and what is no trace is refused in one sentence."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ormo_runtime.settings import UsageError
from ormo_server.core.effects import Redeemed
from ormo_server.core.inputs import Input, Join, Leave, Push, Request, Return, SetLearningRate, Withdraw
from ormo_server.settings import ServerSettings
from ormo_server.trace import Recorded, Refused, Start, read_trace
from ormo_server.trace.rows import ROWS, TracedSettings, line_of

EPOCH = 2**63 + 5


def start_of(machine_settings: ServerSettings | None = None, **changes: Any) -> Start:
    told = (machine_settings or ServerSettings()).model_dump(mode="json", include={"method", "momentum", "max_workers"})
    columns = {"iteration": 0, "fresh": True, "settings": told, "model": {"parameters": 9}, "time": 1.5}
    return Start.model_validate({"event": "start", "format": 1, "epoch": EPOCH} | columns | changes)


def written(path: Path, *entries: Input | Recorded | Refused, start: Start | None = None) -> Path:
    recorded = (Recorded(each) if isinstance(each, Input) else each for each in entries)
    path.write_bytes(b"".join(map(line_of, (start or start_of(), *recorded))))
    return path


# Every input comes back


SECONDS = st.floats(0, 1e12, allow_nan=False)
WORKER = st.text(st.sampled_from("abcXYZ019._-"), min_size=1, max_size=20)
WIDE, COUNT = st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)
SLOT, REQUEST = st.integers(0, 15), st.integers(1, 2**63 - 1)
STEP_SIZE = st.floats(0, allow_nan=False, allow_infinity=False)
REDEEMED = st.builds(Redeemed, COUNT, COUNT, SECONDS, COUNT, COUNT, STEP_SIZE, st.booleans(), COUNT, st.booleans())


@st.composite
def refusals(draw: st.DrawFn) -> Refused:
    worker, incarnation, slot, request = draw(st.tuples(WORKER, WIDE, SLOT, REQUEST))
    return Refused(
        seconds=draw(SECONDS),
        worker=worker,
        incarnation=incarnation,
        slot=slot,
        request=request,
        ticket=draw(st.integers(-(2**63), 2**63 - 1)),
        ticket_epoch=draw(WIDE),
        reason=draw(st.text()),
    )


PUSHES = st.builds(Push, SECONDS, WORKER, WIDE, SLOT, REQUEST, COUNT, WIDE, st.integers(0, 2**31 - 1))
OTHERS = st.one_of(
    st.builds(Join, SECONDS, WORKER, WIDE, st.integers(1, 16)),
    st.builds(Leave, SECONDS, WORKER, WIDE),
    st.builds(Request, SECONDS, WORKER, WIDE, SLOT, REQUEST),
    st.builds(Withdraw, WORKER, SLOT),
    st.builds(Return, SECONDS, WORKER, WIDE, COUNT, WIDE),
    st.builds(SetLearningRate, SECONDS, st.floats(min_value=0, exclude_min=True, allow_infinity=False)),
)
ENTRIES = st.one_of(OTHERS.map(Recorded), refusals(), st.builds(Recorded, PUSHES, REDEEMED))


@settings(max_examples=200, deadline=None)
@given(st.lists(ENTRIES, max_size=8))
def test_what_was_written_is_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[Recorded | Refused]
) -> None:
    path = written(tmp_path_factory.getbasetemp() / "trace.jsonl", *inputs)
    (segment,) = read_trace(path)
    assert segment.inputs == inputs
    assert (segment.start.epoch, segment.start.fresh, segment.start.model.parameters) == (EPOCH, True, 9)


@settings(max_examples=200, deadline=None)
@given(
    OTHERS.map(Recorded) | st.builds(Recorded, PUSHES | PUSHES.map(lambda push: replace(push, local_steps=3)), REDEEMED)
)
def test_a_row_is_written_as_its_columns_say(entry: Recorded) -> None:
    """Byte for byte as the model that reads it writes it: columns in order, and no more of them than are told."""
    line = line_of(entry)
    assert ROWS.validate_json(line).model_dump_json(exclude_none=True).encode() + b"\n" == line


def test_rows_are_what_people_see_in_a_table(tmp_path: Path) -> None:
    redeemed = Redeemed(10, 2, 1.25, 2, 1, 0.1, discarded=False, iteration_after=13)
    path = written(
        tmp_path / "t",
        Request(1.0, "a", 7, 0, 3),
        Withdraw("a", 0),
        Return(2.0, "a", 7, 4, EPOCH),
        Recorded(Push(2.5, "a", 7, 0, 3, 4, EPOCH, 32), redeemed),
        Refused(
            seconds=2.75,
            worker="a",
            incarnation=7,
            slot=0,
            request=4,
            ticket=5,
            ticket_epoch=EPOCH,
            reason="NON_FINITE",
        ),
        SetLearningRate(3.0, 0.5),
    )
    start, *rows = map(json.loads, path.read_text().splitlines())
    assert start["epoch"] == "0x8000000000000005"
    assert rows == [
        {"event": "requested", "seconds": 1.0, "worker": "a", "incarnation": f"{7:#018x}", "slot": 0, "request": 3},
        {"event": "withdrawn", "worker": "a", "slot": 0},
        {
            "event": "returned",
            "seconds": 2.0,
            "worker": "a",
            "incarnation": "0x0000000000000007",
            "ticket": 4,
            "ticket_epoch": "0x8000000000000005",
        },
        {
            "event": "pushed",
            "seconds": 2.5,
            "worker": "a",
            "incarnation": "0x0000000000000007",
            "slot": 0,
            "request": 3,
            "ticket": 4,
            "ticket_epoch": "0x8000000000000005",
            "iteration": 10,
            "bucket": 2,
            "handed_out_seconds": 1.25,
            "delay": 2,
            "lag": 1,
            "step_size": 0.1,
            "discarded": False,
            "samples": 32,
            "iteration_after": 13,
        },
        {
            "event": "refused",
            "seconds": 2.75,
            "worker": "a",
            "incarnation": "0x0000000000000007",
            "slot": 0,
            "request": 4,
            "ticket": 5,
            "ticket_epoch": "0x8000000000000005",
            "reason": "NON_FINITE",
        },
        {"event": "learning_rate_set", "seconds": 3.0, "learning_rate": 0.5},
    ]


def test_settings_of_the_start_row_make_the_run_that_was_served(tmp_path: Path) -> None:
    served = ServerSettings(method="smega2", momentum=0.3, min_workers=2, max_workers=5, learning_rate=0.1 + 0.2)
    told = {name: value for name, value in served.recorded().items() if name in TracedSettings.model_fields}
    (segment,) = read_trace(written(tmp_path / "t", start=start_of(settings=told)))
    assert segment.start.training().run() == served.run()


def test_a_start_row_without_the_rules_in_force_is_of_the_time_before_they_were_written() -> None:
    told = ServerSettings(method="asgd-da").recorded()
    now = {name: value for name, value in told.items() if name in TracedSettings.model_fields}
    before = {name: value for name, value in now.items() if name not in ("delay_threshold", "waits_for_idle")}
    runs = [start_of(settings=settings).training().run() for settings in (now, before)]
    assert [(run.method.delay_threshold, run.waits_for_idle) for run in runs] == [(1.0, False), (2.0, True)]


# What is no trace


def changed(**columns: Any) -> str:
    """A `joined` row with other columns; None leaves one out."""
    row = {"event": "joined", "seconds": 1.0, "worker": "a", "incarnation": "0x1", "slots": 1} | columns
    return json.dumps({name: value for name, value in row.items() if value is not None})


START = line_of(start_of()).decode().strip()
BAD = [
    ("{", "line 2: not JSON: EOF"),
    ("\udcff", "line 2: not JSON"),
    ("", "line 2: not JSON"),
    ("17", "line 2: event 17 is not known: expected one of start, joined, left"),
    ("{}", "line 2: event None is not known"),
    (changed(event="jumped"), "line 2: event 'jumped' is not known"),
    (changed(seconds=None), "line 2: a 'joined' row without 'seconds'"),
    (changed(seconds="soon"), "line 2: 'seconds' of a 'joined' row is 'soon': input should be a valid number"),
    (changed(seconds=float("nan")), "line 2: 'seconds' of a 'joined' row is nan: input should be a finite number"),
    (changed(slots=True), "line 2: 'slots' of a 'joined' row is True: input should be a valid integer"),
    (changed(slots=-1), "line 2: 'slots' of a 'joined' row is -1"),
    (changed(incarnation="0xyz"), "line 2: 'incarnation' of a 'joined' row is '0xyz': expected 0x and 1 to 16"),
    (changed(worker=5), "line 2: 'worker' of a 'joined' row is 5"),
    (changed(rank=5), "line 2: a 'joined' row with an unknown column 'rank'"),
    (START.replace('"format":1', '"format":2'), "line 2: the format is 2, and this program reads 1"),
    (START.replace('"format":1,', ""), "line 2: a 'start' row without 'format'"),
    (START.replace('"momentum":0.9', '"momentum":1.0'), "the settings can't be used: momentum is 1.0"),
    (START.replace('"method":"ormo"', '"method":"adam"'), "the settings can't be used: method 'adam' is not known"),
    (START.replace('"parameters":9', '"parameters":[]'), "'model.parameters' of a 'start' row is []"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD)
def test_row_that_does_not_parse_is_refused_with_its_place(tmp_path: Path, row: str, sentence: str) -> None:
    path = tmp_path / "t"
    path.write_text(f"{START}\n{row}\n{changed()}\n", errors="surrogateescape")
    with pytest.raises(UsageError) as refused:
        read_trace(path)
    assert str(refused.value).startswith(f"{path}, line 2: ")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_file_without_a_beginning_or_without_anything_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(changed() + "\n")
    with pytest.raises(UsageError, match=r"line 1: a 'joined' row came where a 'start' row was expected"):
        read_trace(path)
    path.write_text("")
    with pytest.raises(
        UsageError, match=r"has no whole row: expected a trace as `ormo-server serve --trace` writes it"
    ):
        read_trace(path)
    with pytest.raises(UsageError, match=r"missing can't be read: No such file"):
        read_trace(tmp_path / "missing")


def test_line_that_a_crash_cut_short_is_left_out_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = Recorded(Join(1.0, "a", 1, 1))
    text = written(tmp_path / "t", whole, Join(2.0, "b", 2, 1)).read_bytes()
    second = text.index(b"\n", text.index(b"\n") + 1) + 1
    for end in range(second, len(text) - 1):
        (tmp_path / "t").write_bytes(text[:end])
        (segment,) = read_trace(tmp_path / "t")
        assert segment.inputs == [whole]
    (tmp_path / "t").write_bytes(text[:-1])  # only the end of the line is missing
    assert len(read_trace(tmp_path / "t")[0].inputs) == 2


def test_long_trace_is_read_in_seconds(tmp_path: Path) -> None:
    redeemed = Redeemed(0, 0, 0.123456789, 0, 0, 0.01, discarded=False, iteration_after=1)
    row = line_of(Recorded(Push(1.23456789, "worker", 2**64 - 1, 0, 1, 1, EPOCH, 32), redeemed))
    (tmp_path / "t").write_bytes(line_of(start_of()) + row * 20_000)
    started = time.perf_counter()
    assert len(read_trace(tmp_path / "t")[0].inputs) == 20_000
    assert time.perf_counter() - started < 5.0  # 0.4 s on an idle core
