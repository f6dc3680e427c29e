"""What `ormo-server top` shows."""

import re

import pytest

from console.building import history, screen, status, worker
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_server.console.workers import rows

RED, YELLOW, GREEN = "\x1b[31m", "\x1b[33m", "\x1b[32m"


def three_workers(uptime: float, step: int) -> pb.GetStatusResponse:
    """Two that keep pace and one that does not, after so many steps."""
    quick = {"smoothed_delay": 2.0, "last_delay": 2, "compute_seconds": 0.1, "ticket_seconds": 0.2}
    return status(
        worker("quick-a", applied=5 * step, silent_seconds=0.1, push_age_seconds=0.1, last_loss=0.5, **quick),
        worker("quick-b", applied=4 * step, silent_seconds=9.0, **quick),
        worker("slow", applied=step, silent_seconds=0.5, smoothed_delay=13.0, last_delay=12, max_delay=40),
        uptime=uptime,
        iteration=10 * step,
        applied=10 * step,
        samples=320 * step,
        settings=pb.RunSettings(stop_after_gradients=400),
        evaluation=pb.Evaluation(loss=0.25, accuracy=0.953, iteration=pb.Iteration(number=90)),
        checkpoint_path="run/checkpoint",
        checkpoint_iteration=50,
        checkpoint_age_seconds=42.0,
        tickets_in_flight=3,
        slots_waiting=1,
        delay_mean=2.5,
        delay_max=40,
        loss=0.4,
        learning_rate=0.01,
        resident_bytes=273_000_000,
        version="0.1.0",
        refusals={"NON_FINITE": 2, "TICKET_UNKNOWN": 30},
    )


TWO_LOOKS = history(three_workers(8.0, 8), three_workers(10.0, 10))


def test_the_view_says_how_the_run_and_each_worker_are() -> None:
    lines = [line.rstrip() for line in screen(TWO_LOOKS).splitlines()]
    assert lines[0] == "ormo  training  127.0.0.1:50051, version 0.1.0, up 10 s"
    assert lines[1].startswith("iteration 100 of 400, 3,200 samples  ━━")
    assert lines[1].endswith("25%, 30 s left")  # 300 gradients at 10 a second
    assert lines[2].split("  learning rate  ") == ["throughput  10 updates/s, 320 samples/s", "0.01, K 3"]
    assert "accuracy 95.3%, loss 0.2500 at iteration 90" in lines[3]
    assert "mean 2.5, largest 40" in lines[4]
    assert "3 in flight, 1 slot waiting" in lines[4]
    assert "iteration 50, 42 s ago" in lines[5]
    assert lines[5].endswith("memory         273 MB")
    titles = "worker rank slots updates per s delay last largest compute ticket computing loss heard pushed"
    assert lines[7].split() == titles.split()
    slow, first, second = (line.split() for line in lines[9:12])
    # The bar is a word of its own.
    assert [*slow[:5], *slow[6:]] == [
        *("slow", "0", "1", "10", "1"),
        *("13.0", "12", "40", "–", "–", "–", "–", "0.5", "s", "–"),
    ]
    assert first[0] == "quick-a"
    assert "0.100 s  0.200 s        50%  0.5000  0.1 s   0.1 s" in lines[10]
    assert second[0] == "quick-b"
    assert lines[13] == "refused  30 TICKET_UNKNOWN, 2 NON_FINITE"
    assert lines[14].startswith("delay, smoothed: up to 2K (6)  up to 4K (12)  above")


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("delay", ["slow", "quick-a", "quick-b"]),
        ("rate", ["slow", "quick-b", "quick-a"]),
        ("silent", ["quick-b", "slow", "quick-a"]),
        ("worker", ["quick-a", "quick-b", "slow"]),
    ],
)
def test_workers_come_in_the_order_asked_for(sort: str, order: list[str]) -> None:
    newest = TWO_LOOKS.newest
    assert newest is not None
    assert [row.worker.worker for row in rows(newest, TWO_LOOKS.rates, sort)] == order


@pytest.mark.parametrize(("delay", "colour"), [(6.0, GREEN), (6.1, YELLOW), (12.0, YELLOW), (12.1, RED)])
def test_a_delay_has_a_colour_by_how_many_buckets_it_is(delay: float, colour: str) -> None:
    seen = history(status(worker("w", smoothed_delay=delay), bucket_size=3))
    shown = screen(seen, force_terminal=True, color_system="standard", no_color=False)
    assert f"{colour}{delay:.1f}" in shown.replace(" ", "")
    named = re.search(rf"{re.escape(colour)}w *\x1b\[0m", shown) is not None
    assert named == (colour != GREEN), "only late workers stand out"


def test_a_first_look_and_a_restart_have_no_rates_instead_of_wrong_ones() -> None:
    for seen in (
        history(three_workers(8.0, 8)),
        history(three_workers(8.0, 8), status(worker("slow", applied=1), uptime=0.5, epoch=2, applied=1)),
    ):
        shown = screen(seen)
        assert "throughput  –" in shown
        assert "left" not in shown
        assert "-" not in shown.replace("quick-", "")


def test_sixty_four_workers_are_cut_to_the_screen_with_a_line_that_says_so() -> None:
    crowd = [worker(f"w{number:02}", smoothed_delay=float(number)) for number in range(64)]
    lines = screen(history(status(*crowd, refusals={"NON_FINITE": 1})), width=100, height=24).splitlines()
    assert len(lines) == 24
    shown = [line.split()[0] for line in lines if line.startswith("w") and not line.startswith("worker")]
    assert shown == [f"w{number:02}" for number in range(63, 63 - len(shown), -1)]
    assert f"… and {64 - len(shown)} more" in [line.rstrip() for line in lines]
    troubled = screen(history(status(*crowd)), width=100, height=24, trouble="no answer").splitlines()
    assert len(troubled) == 24
    uncut = screen(history(status(*crowd)), width=100).splitlines()
    assert sum(line.startswith("w") for line in uncut) == 1 + 64


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_where_there_is_no_room_columns_are_left_out_and_the_delay_stays(width: int) -> None:
    lines = [line.rstrip() for line in screen(TWO_LOOKS, width=width).splitlines()]
    assert all(len(line) <= width for line in lines)
    (head,) = [line for line in lines if line.startswith("worker")]
    assert {"worker", "delay"} <= set(head.split())
    assert "…" not in head
    assert ("computing" in head) == (width >= 120)


def test_when_the_server_is_away_the_last_view_stays_dimmed_under_a_sentence() -> None:
    trouble = "no answer from 127.0.0.1:50051 for 3.0 s, trying again: refused"
    lines = screen(TWO_LOOKS, trouble=trouble, force_terminal=True, color_system="standard").splitlines()
    assert trouble in lines[0]
    assert lines[1].startswith("\x1b[1;2;") or "\x1b[2m" in lines[1]
    nothing = screen(history(), trouble=trouble)
    assert nothing.strip() == trouble


def test_what_a_server_tells_is_no_markup() -> None:
    styled = "[red]x[/red][/]"
    answer = status(worker(styled), method=styled, version=styled, refusals={styled: 1})
    shown = screen(history(answer), width=200, force_terminal=True, color_system="standard")
    assert shown.count(styled) == 4, "shown as it is: as method, version, worker and reason"


def test_a_server_without_a_model_has_a_view() -> None:
    waiting = status(phase=pb.GetStatusResponse.PHASE_WAITING_FOR_MODEL, bucket_size=0)
    shown = screen(history(waiting))
    assert "waiting for model" in shown
    assert "no workers" in shown


def test_a_finished_run_has_a_full_bar_and_no_time_left() -> None:
    over = three_workers(20.0, 40)
    over.phase = pb.GetStatusResponse.PHASE_FINISHED
    (line,) = [line for line in screen(history(three_workers(10.0, 10), over)).splitlines() if "400 of 400" in line]
    assert line.rstrip().endswith("100%")


def test_the_end_that_comes_first_is_the_one_told() -> None:
    ends = {"settings": pb.RunSettings(stop_after_gradients=1000, stop_after_samples=400)}
    seen = history(status(uptime=1.0, **ends), status(uptime=2.0, iteration=10, applied=10, samples=100, **ends))
    (line,) = [line for line in screen(seen).splitlines() if "of 1,000" in line]
    assert "iteration 10 of 1,000, 100 of 400 samples" in line
    assert line.rstrip().endswith("25%, 3.0 s left")
