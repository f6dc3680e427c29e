"""What each process of a worker has a part in the run with: client and pipeline.

A worker that is several processes calls the same methods of both in all of its ranks, in the same order. In rank 0 they
do what they always do, and the others are told of the outcome, or of the error; in the other ranks they wait for that.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from typing_extensions import override

from ormo_protos.limits import MAX_SAMPLES
from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.client import Delivered, ExchangeOutcome, ParameterClient
from ormo_worker.errors import OrmoError
from ormo_worker.metrics import WorkerMetrics
from ormo_worker.pytorch.pipeline import Gathered, InFlight, OneAtATime, Pipeline
from ormo_worker.pytorch.ranks import Ranks
from ormo_worker.pytorch.relay import NEXT, RENEW, SWAP, Relay, Said
from ormo_worker.pytorch.transfer import Staging


class Client(Protocol):
    """What an optimizer needs of its `ParameterClient`, or of what has its place in a rank."""

    @property
    def welcome(self) -> pb.Welcome:
        """The server's answer to the last join."""

    @property
    def finished(self) -> bool:
        """Whether the run is known to be over."""

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that joined."""

    def check(self) -> None:
        """Raise what stands against any further call."""

    def join(self) -> pb.Welcome:
        """Join the run."""

    def pull(self, *, within: float | None = None) -> Delivered | None:
        """The newest parameters, without a ticket."""

    def close(self) -> None:
        """Leave the run."""


def take_part(
    connect: Callable[..., ParameterClient], staging: Staging, metrics: WorkerMetrics, ranks: Ranks | None
) -> tuple[Client, Pipeline]:
    """Make what this process has a part in the run with: as a worker, or as one of a worker's ranks."""
    if ranks is not None and not ranks.leads:
        relay = Relay(ranks, staging)
        return FollowingClient(relay), FollowingPipeline(relay)
    client = connect(staging.tensors.manifest, model=staging.snapshot, pin_memory=staging.pinned)
    slots = client.slots
    pipeline: Pipeline = OneAtATime(slots[0], metrics) if len(slots) == 1 else InFlight(slots, metrics)
    if ranks is None:
        return client, pipeline
    ranks.give_up = client.close
    relay = Relay(ranks, staging)
    return LeadingClient(client, relay), LeadingPipeline(pipeline, relay)


class LeadingClient:
    """Rank 0's client."""

    # A heartbeat's word would have rank 0 leave the others in the middle of their local steps. The next push finds the
    # end as well.
    finished = False

    def __init__(self, client: ParameterClient, relay: Relay) -> None:
        self._client = client
        self._relay = relay
        self.check = client.check
        self.close = client.close

    @property
    def welcome(self) -> pb.Welcome:
        """As the client's."""
        return self._client.welcome

    @property
    def inherited(self) -> bool:
        """As the client's."""
        return self._client.inherited

    def join(self) -> pb.Welcome:
        """As the client's."""
        self._relay.begin()
        return self._relay.lead(self._client.join)

    def pull(self, *, within: float | None = None) -> Delivered | None:
        """As the client's."""
        return self._relay.lead(lambda: self._client.pull(within=within))


class FollowingClient:
    """What has the client's place in all other ranks."""

    finished = False

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._process = os.getpid()
        self._welcome: pb.Welcome | None = None

    @property
    def welcome(self) -> pb.Welcome:
        """The server's answer to rank 0."""
        if self._welcome is None:
            raise OrmoError("rank 0 of this worker's ranks has not joined the run")
        return self._welcome

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the rank."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise that this process is a fork, if it is one."""
        if self.inherited:
            raise OrmoError(
                f"process {os.getpid()} is a fork of the worker's process {self._process}, and has no part in the run: "
                "train in that one"
            )

    def join(self) -> pb.Welcome:
        """Learn that rank 0 has joined."""
        self._relay.begin()
        self._welcome = _answer(self._relay.follow())
        return self.welcome

    def pull(self, *, within: float | None = None) -> Delivered | None:  # noqa: ARG002 - rank 0 goes by it
        """The parameters that rank 0 has pulled."""
        said = self._relay.follow()
        _answer(said)
        return said.delivered

    def close(self) -> None:
        """Nothing: rank 0 leaves the run."""


class LeadingPipeline(Pipeline):
    """Rank 0's: another one, whose outcomes the others get."""

    def __init__(self, pipeline: Pipeline, relay: Relay) -> None:
        self._pipeline = pipeline
        self._relay = relay

    @property
    def current(self) -> int | None:  # type: ignore[override]
        """As the other one's."""
        return self._pipeline.current

    @property
    def under_way(self) -> int:  # type: ignore[override]
        """As the other one's."""
        return self._pipeline.under_way

    @property
    @override
    def awaits_result(self) -> bool:
        return self._pipeline.awaits_result

    @override
    def start(self) -> ExchangeOutcome:
        return self._relay.lead(self._pipeline.start, self._pipeline)

    @override
    def swap(self, gathered: Gathered) -> ExchangeOutcome:
        together = self._relay.agree(SWAP, gathered)
        assert together is not None
        return self._relay.lead(lambda: self._pipeline.swap(together), self._pipeline)

    @override
    def next(self) -> ExchangeOutcome:
        self._relay.agree(NEXT)
        return self._relay.lead(self._pipeline.next, self._pipeline)

    @override
    def renew(self) -> ExchangeOutcome:
        self._relay.agree(RENEW)
        return self._relay.lead(self._pipeline.renew, self._pipeline)

    @override
    def finish(self, gathered: Gathered) -> None:
        # The others may be gone by now: they are taken to have had as many.
        samples = min(gathered.samples * self._relay.ranks.size, MAX_SAMPLES)
        self._pipeline.finish(replace(gathered, samples=samples))

    @override
    def settle(self, seconds: float) -> None:
        self._pipeline.settle(seconds)

    @override
    def drain(self) -> Iterator[ExchangeOutcome]:
        return self._pipeline.drain()

    @override
    def stop(self) -> None:
        self._relay.ranks.close()
        self._pipeline.stop()


class FollowingPipeline(Pipeline):
    """All other ranks': no slot, nothing of their own to send, and the state that rank 0's has."""

    awaits_result = False

    def __init__(self, relay: Relay) -> None:
        self.current = None
        self.under_way = 0
        self._relay = relay

    @override
    def start(self) -> ExchangeOutcome:
        return self._outcome()

    @override
    def swap(self, gathered: Gathered) -> ExchangeOutcome:
        self._relay.agree(SWAP, gathered)
        return self._outcome()

    @override
    def next(self) -> ExchangeOutcome:
        self._relay.agree(NEXT)
        return self._outcome()

    @override
    def renew(self) -> ExchangeOutcome:
        self._relay.agree(RENEW)
        return self._outcome()

    @override
    def finish(self, gathered: Gathered) -> None:
        """Rank 0 has the same to push."""

    @override
    def settle(self, seconds: float) -> None:
        """Nothing is under way here."""

    @override
    def drain(self) -> Iterator[ExchangeOutcome]:
        return iter(())

    @override
    def stop(self) -> None:
        self._relay.ranks.close()

    def _outcome(self) -> ExchangeOutcome:
        said = self._relay.follow()
        if said.state is not None:
            self.current, self.under_way, self.awaits_result = said.state
        outcome: ExchangeOutcome = _answer(said)
        return replace(outcome, delivered=said.delivered)


def _answer(said: Said) -> Any:
    if said.failure is not None:
        raise said.failure.error()
    return said.answer
