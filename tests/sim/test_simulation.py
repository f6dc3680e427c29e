"""Virtual time: what happens when, worked out by hand, and who comes and goes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from core.driving import told_by
from ormo_protos.manifest import AVERAGE, BUFFER, FLOAT32, INT64, LAST, PARAMETER, Manifest, TensorSpec
from ormo_runtime.settings import UsageError
from ormo_runtime.workload import Model
from ormo_server.core.inputs import Join, Leave, Push
from ormo_server.core.method import PRESETS, Method, Run
from ormo_server.core.step_size import LearningRate
from ormo_server.sim.machines import Change, MachinePark, parse
from ormo_server.sim.record import Record
from ormo_server.sim.simulation import Simulation
from ormo_server.sim.training import Training
from sim.by_ticket import SIZE, ByTicket, start

WITH_STATISTIC = Manifest.laid_out(
    [
        TensorSpec("line", (SIZE,), FLOAT32, PARAMETER),
        TensorSpec("running_mean", (1,), FLOAT32, BUFFER, merge=AVERAGE),
        TensorSpec("pointer", (1,), INT64, BUFFER, merge=LAST),
    ]
)


class Told:
    """A simulation and all inputs that its core took."""

    def __init__(
        self,
        *,
        workers: int = 1,
        factors: Sequence[float] = (),
        times: str = "constant:1",
        latencies: Sequence[float] = (0.0,),
        bandwidths: Sequence[float] = (float("inf"),),
        slots: int = 1,
        method: Method = PRESETS["asgd"],
        gradients: int = 10,
        changes: Sequence[Change] = (),
        evaluate_every: int = 1000,
        workload: ByTicket | None = None,
        **run: Any,
    ) -> None:
        settings = {"stop_after_gradients": gradients, "min_workers": workers, "max_workers": 1000} | run
        self.workload = workload or ByTicket()
        self.record = Record(self.workload.epoch_samples)
        self.training = Training(
            Run(LearningRate(0.01), method, **settings), self.workload, self.record, evaluate_every=evaluate_every
        )
        told = told_by(self.training.machine)
        park = MachinePark(parse(times), factors, latencies, bandwidths, seed=run.get("seed", 0))
        self.simulation = Simulation(
            self.training, park, workers=workers, slots=slots, changes=changes, failure_seconds=30.0
        )
        self.simulation.run()
        self.inputs = [each.input for each in told]
        self.redeemed = [each.redeemed for each in told if each.redeemed is not None]

    @property
    def pushed(self) -> list[Push]:
        return [given for given in self.inputs if isinstance(given, Push)]

    def arrivals(self) -> list[tuple[float, str]]:
        return [(push.seconds, push.worker) for push in self.pushed]


# Who is when


def test_one_worker_pushes_once_per_compute_time() -> None:
    told = Told(times="constant:2", gradients=3)
    assert told.arrivals() == [(2.0, "worker-0"), (4.0, "worker-0"), (6.0, "worker-0")]
    assert [each.delay for each in told.redeemed] == [0, 0, 0]


def test_a_slow_worker_takes_as_many_times_as_long() -> None:
    told = Told(workers=2, factors=[1.0, 3.0], gradients=5)
    fast, slow = "worker-0", "worker-1"
    assert told.arrivals() == [(1.0, fast), (2.0, fast), (3.0, slow), (3.0, fast), (4.0, fast)]
    assert [each.delay for each in told.redeemed] == [0, 0, 2, 1, 0]


def test_local_steps_take_as_long_as_all_of_them_and_count_all_their_samples() -> None:
    told = Told(workers=2, factors=[1.0, 3.0], gradients=5, local_steps=4)
    fast, slow = "worker-0", "worker-1"
    assert told.arrivals() == [(4.0, fast), (8.0, fast), (12.0, slow), (12.0, fast), (16.0, fast)]
    assert {push.local_steps for push in told.pushed} == {4}
    assert [push.samples for push in told.pushed] == 5 * [40]


def test_by_speed_a_slow_worker_makes_fewer_local_steps_so_that_it_pushes_as_often() -> None:
    told = Told(workers=2, factors=[1.0, 4.0], gradients=9, local_steps=8, local_steps_by_speed=True)
    by_worker = {
        name: [push.local_steps for push in told.pushed if push.worker == name] for name in ("worker-0", "worker-1")
    }
    assert set(by_worker["worker-0"]) == {8}
    assert by_worker["worker-1"] == [8, 2, 2]
    assert [push.seconds for push in told.pushed if push.worker == "worker-1"] == [32.0, 40.0, 48.0]


@pytest.mark.parametrize(
    ("end", "shares"), [({"gradients": 4}, [0, 0, 0.25, 0.5]), ({"stop_after_samples": 160}, [0, 0, 0.25, 0.5])]
)
def test_the_progress_that_inner_rates_go_by_is_that_of_the_run_at_the_ticket(
    end: dict[str, int], shares: list[float]
) -> None:
    told = Told(workers=2, local_steps=4, **{"gradients": 0, **end})  # type: ignore[arg-type]
    assert told.workload.progress == shares


def test_bytes_are_those_of_every_push_and_of_every_ticket() -> None:
    told = Told(workers=2, gradients=6, evaluate_every=3)
    # 5 numbers: 20 bytes each way; in int8 5 and a scale of 4, and 10 of bfloat16. Two tickets are out at any time.
    assert [(row.bytes_moved, row.int8_bytes_moved) for row in told.record.rows] == [
        (20 * (3 + 4), 9 * 3 + 10 * 4),
        (20 * (6 + 7), 9 * 6 + 10 * 7),
    ]


def test_messages_travel_by_latency_and_bandwidth_in_both_directions() -> None:
    # 5 float32 numbers are 20 bytes: 2 s at 10 bytes a second, after half a second of latency, each way.
    told = Told(latencies=[0.5], bandwidths=[10.0], gradients=2)
    assert [taken.seconds for taken in told.pushed] == [2.5 + 1 + 2.5, 12.0]


def test_lines_are_dealt_out_to_the_workers_in_turn() -> None:
    told = Told(workers=3, latencies=[0.0, 1.0], gradients=3)
    assert told.arrivals()[:2] == [(1.0, "worker-0"), (1.0, "worker-2")]
    assert (3.0, "worker-1") in Told(workers=3, latencies=[0.0, 1.0], gradients=8).arrivals()


def test_a_worker_with_two_slots_computes_while_the_other_slots_message_travels() -> None:
    told = Told(slots=2, latencies=[0.5], gradients=6)
    # Without a second slot a gradient takes 2 s. With it the processor is never idle: one a second from 2 s on.
    assert [taken.seconds for taken in told.pushed] == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [taken.slot for taken in told.pushed] == [0, 1, 0, 1, 0, 1]


def test_a_round_waits_for_the_slowest() -> None:
    told = Told(workers=3, factors=[1.0, 1.0, 5.0], method=PRESETS["ssgdm"], gradients=6)
    assert [taken.seconds for taken in told.pushed] == [1.0, 1.0, 5.0, 6.0, 6.0, 10.0]


def test_bounded_staleness_holds_the_fast_ones_back_and_no_delay_exceeds_the_bound() -> None:
    method = Method("sgd", scheduler="bounded-staleness", staleness_bound=3)
    told = Told(workers=3, factors=[1.0, 1.0, 9.0], method=method, gradients=60)
    free = Told(workers=3, factors=[1.0, 1.0, 9.0], gradients=60)
    assert max(each.delay for each in told.redeemed) == 3
    assert max(each.delay for each in free.redeemed) > 3
    assert told.simulation.now > free.simulation.now


def test_a_ticket_is_for_the_parameters_of_the_moment_at_which_it_was_handed_out() -> None:
    told = Told(workers=4, times="exponential:1", gradients=50)
    for redeemed in told.redeemed:
        before = [push for push in told.pushed if push.seconds <= redeemed.handed_out_seconds]
        assert redeemed.iteration == len(before)


# Comings and goings


def test_workers_that_join_later_take_part_from_then_on() -> None:
    told = Told(gradients=7, changes=[Change(2.5, "join", 2)])
    assert [worker for _, worker in told.arrivals()[:2]] == ["worker-0"] * 2
    assert {worker for _, worker in told.arrivals()[2:]} == {"worker-0", "worker-1", "worker-2"}
    assert [taken.seconds for taken in told.inputs if isinstance(taken, Join)] == [0.0, 2.5, 2.5]
    assert told.training.machine.bucket_size == 3


def test_a_worker_that_leaves_is_gone_at_once_and_its_gradient_with_it() -> None:
    told = Told(workers=2, factors=[1.0, 2.0], gradients=8, changes=[Change(3.5, "leave", 1)])
    assert [seconds for seconds, worker in told.arrivals() if worker == "worker-1"] == [2.0]
    assert [(taken.seconds, taken.worker) for taken in told.inputs if isinstance(taken, Leave)] == [(3.5, "worker-1")]


def test_a_crashed_worker_is_silent_at_once_and_out_after_the_failure_timeout() -> None:
    told = Told(workers=2, gradients=60, changes=[Change(10.5, "crash", 0)])
    assert max(seconds for seconds, worker in told.arrivals() if worker == "worker-0") == 10.0
    assert [(taken.seconds, taken.worker) for taken in told.inputs if isinstance(taken, Leave)] == [(40.5, "worker-0")]


def test_a_crash_stops_a_synchronous_run_until_it_is_noticed_and_no_longer() -> None:
    told = Told(workers=3, method=PRESETS["ssgd"], gradients=12, changes=[Change(2.5, "crash", 2)])
    # Rounds at 1 and 2 s; the third gets two gradients at 3 s and closes when the third worker is given up at 32.5 s.
    assert [taken.seconds for taken in told.pushed] == [1.0] * 3 + [2.0] * 3 + [3.0] * 2 + [33.5] * 2 + [34.5] * 2


def test_a_worker_that_is_not_there_cannot_leave() -> None:
    with pytest.raises(
        UsageError, match=r"leave at 2 s: no worker 1 exists at that time; there are 1, numbered from 0"
    ):
        Told(workers=2, gradients=9, changes=[Change(1.0, "crash", 1), Change(2.0, "leave", 1)])


def test_a_run_that_nobody_is_left_for_ends() -> None:
    told = Told(gradients=100, changes=[Change(3.5, "leave", 0)])
    assert told.record.rows[-1].gradients == 3


# The end


def test_a_run_ends_with_its_last_gradient_and_a_row_for_it() -> None:
    told = Told(workers=3, gradients=7, evaluate_every=3)
    assert [row.gradients for row in told.record.rows] == [3, 6, 7]
    assert len(told.pushed) == 7


def test_a_run_ends_after_its_samples() -> None:
    told = Told(gradients=0, stop_after_samples=95)
    assert told.record.rows[-1].gradients == 10
    assert told.record.rows[-1].epochs == 1.0


def test_a_run_whose_gradients_are_not_finite_any_more_is_called_off() -> None:
    told = Told(workers=3, gradients=1000, workload=ByTicket(bad_from=8))
    assert told.record.diverged
    assert told.record.refusals == 4
    assert told.record.rows[-1].gradients == 7
    assert torch.isfinite(told.training.machine.state.params).all()


def test_a_single_gradient_that_is_not_finite_is_refused_as_a_server_would() -> None:
    class Once(ByTicket):
        def gradient(self, ticket: int, *details: Any) -> Any:
            self.bad_from = ticket if ticket == 5 else 10**9
            return super().gradient(ticket, *details)

    told = Told(workers=2, gradients=20, workload=Once())
    assert (told.record.refusals, told.record.diverged) == (1, False)
    assert told.record.rows[-1].gradients == 20


class WithStatistic(ByTicket):
    """Whose worker has a running mean, which one mini-batch makes NaN, and a queue's pointer."""

    def initial(self, seed: int) -> Model:
        self.floats, self.ints, self.mended = torch.tensor([0.5]), torch.tensor([0]), list[int]()
        return Model(start(), self.floats.clone(), self.ints.clone(), WITH_STATISTIC)

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Any:
        computed = super().gradient(ticket, params, out)
        self.floats += torch.nan if ticket == 3 else 1.0
        self.ints[0] = ticket % 3
        return replace(computed, float_buffers=self.floats, int_buffers=self.ints)

    def take_buffers(self, model: Model) -> None:
        self.floats.copy_(model.float_buffers)
        self.ints.copy_(model.int_buffers)

    def mend(self, model: Model) -> None:
        assert self.floats.isnan().all()
        self.floats.copy_(model.float_buffers)
        self.mended.append(self.tickets[-1])


def test_a_worker_with_a_bad_statistic_trains_on_and_gets_the_servers_when_a_real_one_does() -> None:
    workload = WithStatistic()
    told = Told(gradients=8, workload=workload)
    assert (told.record.refusals, told.record.diverged) == (0, False)
    assert [each.buffers_kept for each in told.redeemed] == [
        False,
        False,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    # After ticket 3 it hears of it, with ticket 4's gradient it asks, and mends what it then gets.
    assert workload.mended == [4]
    state = told.training.machine.state
    assert (state.float_buffers.tolist(), state.int_buffers.tolist()) == ([0.5 + 2 + 4], [8 % 3])


def test_a_run_whose_gradients_are_finite_and_too_long_to_be_added_is_called_off() -> None:
    class TooLong(ByTicket):
        def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Any:
            computed = super().gradient(ticket, params, out)
            out.fill_(1.0 if ticket < 8 else 1e30)
            return computed

    told = Told(workers=3, gradients=1000, workload=TooLong())
    assert told.record.diverged
    assert (told.record.refusals, told.record.rows[-1].gradients) == (4, 7)


# Sameness


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_runs_and_the_same_seed_gives_the_same_bits(method: str) -> None:
    def once(seed: int) -> torch.Tensor:
        told = Told(
            workers=4,
            factors=[1.0, 1.0, 1.0, 10.0],
            times="lognormal:1,0.5",
            method=PRESETS[method],
            gradients=60,
            seed=seed,
            workload=ByTicket(),
        )
        assert told.record.rows[-1].gradients == 60
        return told.training.machine.state.params.clone()

    first = once(1)
    assert first.shape == (SIZE,)
    assert torch.equal(first, once(1))
    assert not torch.equal(first, once(2))


def test_every_worker_has_a_data_seed_of_its_own() -> None:
    told = Told(workers=20, gradients=20)
    assert len(set(told.workload.seeds)) == 20
