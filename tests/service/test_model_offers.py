"""Who is asked for the first model, and for how long. Time is an argument."""

import pytest

from ormo_server.core.errors import NotWanted
from ormo_server.service.admission import ModelOffers


def test_the_first_who_asks_is_the_one_until_it_was_silent_for_its_lease() -> None:
    offers = ModelOffers(10.0)
    assert offers.ask("a", 1, now=0.0)
    assert not offers.ask("b", 1, now=9.0)
    assert offers.ask("b", 1, now=10.0)
    assert not offers.ask("a", 1, now=11.0)


def test_asking_again_renews_nothing_and_bytes_do() -> None:
    offers = ModelOffers(10.0)
    for now in (0.0, 4.0, 8.0):
        assert offers.ask("a", 1, now)
    assert offers.ask("b", 1, now=12.0), "who asks and sends nothing must not keep the others waiting"
    offers.renew("b", 1, now=20.0)
    assert not offers.ask("a", 1, now=29.0)


def test_who_was_not_asked_is_not_wanted_and_takes_nobodys_lease() -> None:
    offers = ModelOffers(10.0)
    offers.ask("a", 1, now=0.0)
    with pytest.raises(NotWanted, match="worker 'b' is not the one that was asked"):
        offers.renew("b", 1, now=1.0)
    offers.give_up("b", 1)
    assert not offers.ask("b", 1, now=2.0)
    offers.give_up("a", 1)
    assert offers.ask("b", 1, now=3.0)
