"""A ticket is redeemed once, a retry changes nothing, and a refusal leaves everything as it was."""

import dataclasses

import pytest
import torch

from core.driving import Driver, driver_of, fingerprint, run_of
from ormo_server.core.effects import superseded
from ormo_server.core.errors import BadRequest, OrmoError, StaleRequest, TicketUnknown
from ormo_server.core.inputs import Gradient, Join, Push, Request, Requester, Return
from ormo_server.core.machine import StateMachine
from ormo_server.core.members import PROCESSES_REMEMBERED


def one_worker(slots: int = 1) -> Driver:
    driver = driver_of(run_of(), "a", slots=slots)
    driver.request("a")
    return driver


def refused(driver: Driver, error: type[OrmoError], match: str, requester: Requester, ticket: tuple[int, int]) -> None:
    before = fingerprint(driver.machine)
    with pytest.raises(error, match=match):
        driver.machine.step(Push(0.0, *requester, ticket[1], ticket[0], 5), Gradient(torch.ones(1)))
    assert fingerprint(driver.machine) == before


def test_a_ticket_carries_the_iteration_the_bucket_and_the_parameters_of_its_handing_out() -> None:
    driver = one_worker()
    driver.exchange("a", 1.0)
    ticket = driver.granted[-1].ticket
    assert (ticket.slot, ticket.iteration, ticket.bucket, ticket.delivered) == (("a", 0), 1, 1, True)
    assert driver.places["a", 0].params == driver.machine.state.params == -1.0


def test_a_ticket_is_stamped_with_the_epoch_and_the_time_of_its_handing_out() -> None:
    machine = StateMachine.fresh(run_of(), torch.zeros(1), epoch=2**64 - 1)
    machine.step(Join(1.0, "a", 1, 1))
    (granted,) = machine.step(Request(12.5, "a", 1, 0, 1)).granted
    assert (granted.ticket.key, granted.ticket.handed_out_seconds) == ((2**64 - 1, 1), 12.5)


def test_a_ticket_is_redeemed_once() -> None:
    driver = one_worker()
    ticket = driver.ticket("a")
    driver.push("a", 1.0)
    refused(
        driver, TicketUnknown, r"ticket 1 of epoch 0{16} is not in flight: .* holds none", driver.requester("a"), ticket
    )


def test_a_retry_gets_the_same_result_marked_as_repeated_and_changes_nothing() -> None:
    driver = one_worker()
    ticket = driver.ticket("a")
    first = driver.push("a", 1.0)
    before = fingerprint(driver.machine)
    again = driver.push("a", 5.0, number=first.request, ticket=ticket)
    assert again == dataclasses.replace(first, repeated=True)
    assert fingerprint(driver.machine) == before


def test_a_result_is_repeated_after_the_next_ticket_was_asked_for_under_the_same_number() -> None:
    driver = one_worker()
    first = driver.exchange("a", 1.0)
    again = driver.push("a", 1.0, number=first.request, ticket=(0, 1))
    assert again == dataclasses.replace(first, repeated=True)
    assert driver.machine.state.iteration == 1


def test_a_new_request_confirms_the_result_which_is_then_forgotten() -> None:
    driver = one_worker()
    first = driver.push("a", 1.0)
    driver.request("a")
    assert driver.machine.state.slot(("a", 0)).result is None
    refused(driver, StaleRequest, "request 2 of slot 0", driver.requester("a", number=first.request), (0, 2))


def test_a_refused_push_confirms_nothing() -> None:
    driver = one_worker()
    first = driver.push("a", 1.0)
    refused(driver, TicketUnknown, "holds none", driver.requester("a"), (0, 1))
    assert driver.push("a", 1.0, number=first.request, ticket=(0, 1)).repeated


def test_a_refused_push_leaves_the_ticket_in_flight_for_another() -> None:
    driver = one_worker(slots=2)
    refused(driver, TicketUnknown, "holds none", driver.requester("a", slot=1), driver.ticket("a"))
    assert driver.push("a", 1.0).iteration == 1


@pytest.mark.parametrize("ticket", [(0, 2), (0, 0), (1, 1)])
def test_a_ticket_that_never_was_or_is_of_another_epoch_is_unknown(ticket: tuple[int, int]) -> None:
    driver = one_worker()
    refused(driver, TicketUnknown, "holds ticket 1", driver.requester("a"), ticket)


@pytest.mark.parametrize(("slot", "request_number"), [(1, 1), (-1, 1), (0, 0), (0, -3)])
def test_a_slot_or_request_number_out_of_range_is_refused(slot: int, request_number: int) -> None:
    driver = one_worker()
    bad = Requester("a", 1, slot, request_number)
    refused(driver, BadRequest, f"slot {slot}, request {request_number}", bad, driver.ticket("a"))
    before = fingerprint(driver.machine)
    with pytest.raises(BadRequest):
        driver.machine.step(Request(0.0, *bad))
    assert fingerprint(driver.machine) == before


def test_a_request_voids_the_ticket_of_its_own_slot_and_no_other() -> None:
    driver = one_worker(slots=2)
    driver.request("a", 1)
    voided = driver.ticket("a", 0)
    driver.request("a", 0)
    refused(driver, TicketUnknown, "holds ticket 3", driver.requester("a", 0), voided)
    assert driver.push("a", 1.0, slot=1).iteration == 1


def test_a_retried_request_gets_the_newest_parameters_with_a_new_ticket() -> None:
    driver = driver_of(run_of(), "a", "b")
    driver.request("a")
    old = driver.ticket("a")
    driver.request("b")
    driver.push("b", 1.0)
    driver.request("a", number=1)
    assert driver.ticket("a") != old
    assert driver.places["a", 0].params == -1.0


def test_a_returned_ticket_is_void_and_its_return_is_reported_once() -> None:
    driver = one_worker()
    ticket = driver.ticket("a")
    assert driver.give_back("a", ticket)
    assert not driver.give_back("a", ticket)
    refused(driver, TicketUnknown, "holds none", driver.requester("a"), ticket)


@pytest.mark.parametrize(("worker", "incarnation"), [("b", 1), ("a", 2), ("nobody", 1)])
def test_only_its_holder_can_return_a_ticket(worker: str, incarnation: int) -> None:
    driver = driver_of(run_of(), "a", "b")
    driver.request("a")
    before = fingerprint(driver.machine)
    epoch, number = driver.ticket("a")
    assert not driver.take(Return(0.0, worker, incarnation, number, epoch)).changed
    assert fingerprint(driver.machine) == before


def test_a_withdrawn_request_gets_no_ticket_in_its_hand_but_one_at_the_next_request() -> None:
    driver = driver_of(run_of(scheduler="synchronous", min_workers=2), "a", "b")
    for worker in "ab":
        driver.request(worker)
    driver.exchange("a", 1.0)
    driver.withdraw("a")
    driver.push("b", 1.0)
    assert driver.places["a", 0].granted is None
    assert driver.request("a", number=driver.places["a", 0].request) is not None


def test_withdrawing_what_nobody_asked_for_is_no_mistake() -> None:
    driver = one_worker()
    before = fingerprint(driver.machine)
    for slot in (("a", 0), ("nobody", 3)):
        driver.withdraw(*slot)
    assert fingerprint(driver.machine) == before


def test_samples_are_counted_with_the_gradients_that_are_applied() -> None:
    driver = one_worker()
    driver.push("a", 1.0, samples=32)
    driver.request("a")
    driver.push("a", 1.0, samples=5)
    assert driver.machine.state.samples == 37


def test_delay_counts_the_gradients_applied_since_the_ticket_was_handed_out() -> None:
    driver = driver_of(run_of(), "a", "b")
    driver.request("b")
    driver.request("a")
    assert [driver.exchange("a", 1.0).delay for _ in range(3)] == [0, 0, 0]
    assert driver.push("b", 1.0).delay == 3


def test_a_wait_that_a_newer_stream_took_over_says_so() -> None:
    assert str(superseded(("a", 2))) == "a newer stream of slot 2 of worker 'a' took over"


def test_a_ticket_of_a_round_that_was_not_delivered_yet_can_not_be_redeemed() -> None:
    driver = driver_of(run_of(scheduler="synchronous", min_workers=2), "a", "b")
    (undelivered,) = [ticket.key for ticket in driver.machine.state.tickets.values() if ticket.slot == ("b", 0)]
    refused(driver, TicketUnknown, "pull again", driver.requester("b"), undelivered)
    assert driver.request("b") is not None
    assert driver.push("b", 1.0).iteration == 1


def test_a_gradient_of_another_size_is_a_broken_invariant_and_changes_nothing() -> None:
    driver = driver_of(run_of(), "a", size=3)
    driver.request("a")
    before = fingerprint(driver.machine)
    with pytest.raises(AssertionError):
        driver.push("a", torch.ones(1))
    assert fingerprint(driver.machine) == before


def test_who_was_taken_for_dead_and_comes_back_has_the_result_of_its_last_push_repeated() -> None:
    driver = one_worker()
    ticket = driver.ticket("a")
    first = driver.push("a", 1.0)
    driver.leave("a")
    driver.join("a")
    before = fingerprint(driver.machine)
    again = driver.push("a", 5.0, number=first.request, ticket=ticket)
    assert again == dataclasses.replace(first, repeated=True)
    assert fingerprint(driver.machine) == before


def test_who_comes_back_goes_on_with_its_request_numbers_and_has_no_ticket() -> None:
    driver = one_worker()
    ticket = driver.ticket("a")
    driver.leave("a")
    driver.join("a")
    refused(driver, TicketUnknown, "is not in flight", driver.requester("a"), ticket)
    assert driver.request("a") is not None
    refused(driver, StaleRequest, "request 1 .* came after request 2", Requester("a", 1, 0, 1), ticket)


@pytest.mark.parametrize(("incarnation", "slots"), [(2, 1), (1, 2)])
def test_another_process_or_one_with_other_slots_gets_nobodys_result(incarnation: int, slots: int) -> None:
    driver = one_worker()
    ticket = driver.ticket("a")
    first = driver.push("a", 1.0)
    driver.leave("a")
    driver.join("a", slots, incarnation)
    refused(driver, TicketUnknown, "is not in flight", driver.requester("a", number=first.request), ticket)


def test_what_is_remembered_of_who_has_gone_is_bounded() -> None:
    driver = one_worker()
    for number in range(PROCESSES_REMEMBERED + 5):
        driver.join(f"w{number}")
        driver.leave(f"w{number}")
    departed = driver.machine.state.departed
    assert len(departed) == PROCESSES_REMEMBERED
    assert next(iter(departed)) == "w5"


def test_a_number_that_comes_again_with_another_ticket_is_no_retry() -> None:
    driver = one_worker()
    first = driver.exchange("a", 1.0)
    refused(
        driver,
        StaleRequest,
        "request 2 of slot 0 of worker 'a' was for ticket 1 and comes again for ticket 2",
        driver.requester("a", number=first.request),
        driver.ticket("a"),
    )
    assert driver.push("a", 1.0).iteration == 2
