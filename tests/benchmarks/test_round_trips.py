"""The benchmark of the data plane, on little: that it runs, and that its figures are what they say."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.round_trips import kernel, report
from benchmarks.round_trips.contenders import NAMES, ORMO, SOCKET, STREAM
from benchmarks.round_trips.measure import Case, Row, measured
from benchmarks.round_trips.place import LEARNING_RATE, Model
from benchmarks.round_trips.team import Turn
from benchmarks.soak import Memory, soaked

CASE = Case(1_000_000, 2)


def row(contender: str, seconds: list[float], ratios: list[float]) -> Row:
    turns = [Turn(trips=10, seconds=each, processor_seconds=0.5) for each in seconds]
    return Row(CASE, contender, turns, ratios, peak_bytes=300_000_000, stages={"send": 0.002, "apply": 0.003})


def test_row_is_the_median_of_its_turns() -> None:
    mine = row(ORMO, [0.1, 0.4, 0.2], [1.0, 4.0, 2.0])
    assert mine.seconds_per_trip == pytest.approx(0.02)
    assert mine.gigabytes_per_second == pytest.approx(0.1)  # 1 MB there and 1 MB back in 20 ms
    assert mine.processor_seconds_per_gigabyte == pytest.approx(1.5 / 0.06)
    assert (
        report.line(mine)
        == "| 1 MB, 2 workers | ormo | 20.00 | 2.00 (1.00–4.00), 0.50 of its rate | 0.10 | 25.00 | 300 |"
    )
    assert report.summary([mine]).splitlines()[-1] == "| 1 MB, 2 workers | 2.00 (1.00–4.00) |"
    assert report.stages(mine) == "1 MB, 2 workers, ms by stage: apply 3.00, send 2.00"


def test_fastest_contender_from_elsewhere_is_what_ours_is_compared_with() -> None:
    rows = [row(SOCKET, [0.1, 0.1], []), row(ORMO, [0.2, 0.3], [2.0, 3.0])]
    assert report.beside_the_best(rows) == []
    rows += [
        row("pyzmq", [0.4], [4.0, 4.0]),
        row("grpcio + protobuf", [0.1], [1.0, 2.0]),
        row(STREAM, [0.1], [1.0, 1.0]),
    ]
    assert report.beside_the_best(rows) == [
        "1 MB, 2 workers: 1.75 (1.50–2.00) times the time of grpcio + protobuf, the fastest elsewhere"
    ]


def test_figures_are_written(tmp_path: Path) -> None:
    rows = [row(SOCKET, [0.1, 0.1], []), row(ORMO, [0.2, 0.3], [2.0, 3.0])]
    report.write_csv(rows, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["contender"], float(line["ratio"])) for line in lines] == [
        (SOCKET, 1.0),
        (SOCKET, 1.0),
        (ORMO, 2.0),
        (ORMO, 3.0),
    ]
    report.draw(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_all_contenders_make_the_same_update() -> None:
    model, array = Model(4), np.ones(4, dtype=np.float32)
    model.exchange(array, array)
    assert array == pytest.approx(-LEARNING_RATE)


# Those that are ours, each two processes that import PyTorch; `make bench FLAGS=--quick`, in CI, starts the others too.
CONTENDERS = [SOCKET, *(name for name in NAMES if name.startswith(ORMO))]


@pytest.mark.timeout(300)  # it starts each of them
def test_contenders_take_turns_with_the_socket() -> None:
    rows = measured(Case(4096, 1), CONTENDERS, pairs=2, window=0.1)
    assert [each.contender for each in rows] == CONTENDERS
    assert len(rows[0].turns) == 2 * (len(CONTENDERS) - 1)
    for each in rows[1:]:
        assert len(each.turns) == len(each.ratios) == 2
        assert all(ratio > 0 for ratio in each.ratios)
        assert each.peak_bytes > 50_000_000
    (mine,) = (each for each in rows if each.contender == ORMO)
    assert set(mine.stages) >= {"receive", "check", "lock", "apply", "copy", "send"}


def test_several_workers_work_at_once() -> None:
    socket, mine = measured(Case(4096, 2), [ORMO], pairs=1, window=0.3)
    assert (socket.contender, mine.contender) == (SOCKET, ORMO)
    assert mine.turns[0].trips > 2


def test_every_update_rule_is_measured_beside_a_copy() -> None:
    updates = kernel.measured(4_000_000, pairs=2)
    assert {(update.rule, update.opens) for update in updates} >= {("ormo", False), ("ormo", True), ("dc", False)}
    assert all(ratio > 0 for update in updates for ratio in update.ratios)
    assert kernel.line(updates[0]).startswith("| `")
    torch.set_num_threads(1)


def test_memory_that_grows_is_found() -> None:
    megabyte = 1_000_000
    assert Memory(tuple([300 * megabyte] * 20)).is_flat
    assert not Memory(tuple((300 + step) * megabyte for step in range(20))).is_flat


def test_short_soak_is_flat() -> None:
    server, worker = soaked(300)
    assert len(server.samples) == len(worker.samples) == 101
    assert server.is_flat, server
