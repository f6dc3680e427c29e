"""How soon a silent peer counts as dead: every period that server and worker use, derived from one number.

The server's `failure_timeout` is every worker's lease; a worker has its own for the time before it knows the lease, and
for the channel, which gRPC sets up once. Below 15 s detection rests on heartbeats alone: gRPC sends pings every 10 s at
most.
"""

from dataclasses import dataclass

_PING_SECONDS = 10.0  # gRPC lets clients ping no more often
_BEATS_PER_LEASE = 3  # one may get lost, and the next one late
_SHORTEST_PING_TIMEOUT_SECONDS = 1.0
_LONGEST_CHECK_SECONDS = 1.0
# A server that is back should not be met by all its workers in the same moment, nor wait long for any.
_LONGEST_PAUSE_SECONDS = 1.0
_SHORTEST_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class FailureDetection:
    """What follows from a failure timeout.

    Attributes:
        failure_timeout: seconds without a byte or heartbeat after which a peer counts as dead.
    """

    failure_timeout: float

    @property
    def lease_seconds(self) -> float:
        """A worker that is silent for longer is no longer a member: its tickets are void, and nobody waits for it."""
        return self.failure_timeout

    @property
    def heartbeat_seconds(self) -> float:
        """Between a worker's heartbeats, and the time limit of each."""
        return self.lease_seconds / _BEATS_PER_LEASE

    @property
    def check_seconds(self) -> float:
        """Between the server's looks at its leases and streams: so much later than the lease ends they act at most."""
        return min(_LONGEST_CHECK_SECONDS, self.failure_timeout / 4)

    @property
    def ping_seconds(self) -> float:
        """Between HTTP/2 pings (keepalive)."""
        return min(_PING_SECONDS, self.failure_timeout)

    @property
    def ping_timeout_seconds(self) -> float:
        """For a ping's answer: a stopped peer on a live host is found by it, not by keepalive."""
        return max(_SHORTEST_PING_TIMEOUT_SECONDS, self.failure_timeout)

    @property
    def call_seconds(self) -> float:
        """Time limit of calls with one answer. Streams have none: they end after a silence, however long they take."""
        return self.failure_timeout

    @property
    def offer_seconds(self) -> float:
        """For which one worker alone is asked for the model, from its last byte on."""
        return self.failure_timeout

    @property
    def shortest_pause_seconds(self) -> float:
        """Before a call is tried again."""
        return min(_SHORTEST_PAUSE_SECONDS, self.longest_pause_seconds)

    @property
    def longest_pause_seconds(self) -> float:
        """Before a call is tried again, or a connection made anew: drawn at random, up to twice as long each time."""
        return min(_LONGEST_PAUSE_SECONDS, self.failure_timeout / 4)


# What docs/failures.md shows: each value, and what it is.
DESCRIPTIONS = {
    "lease_seconds": "a worker's lease",
    "heartbeat_seconds": "between heartbeats, and the limit of each",
    "check_seconds": "between the server's looks at leases and streams",
    "ping_seconds": "between HTTP/2 pings",
    "ping_timeout_seconds": "for a ping's answer, then the connection is dead",
    "call_seconds": "limit of a call with one answer",
    "offer_seconds": "for a worker that was asked for the model, from its last byte on",
    "longest_pause_seconds": "longest pause before another attempt, or another connection",
}
