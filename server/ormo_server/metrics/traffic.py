"""What comes and what goes: gradients, parameters, refusals, bytes, and where an exchange's time goes."""

from ormo_protos.refusals import Reason
from ormo_server.metrics.families import SECONDS, Families

STAGES = ("receive", "check", "lock", "apply", "wait", "copy", "send")
# The methods that carry tensors, by direction.
RECEIVING = ("PushPull", "PushGradient", "OfferModel")
SENDING = ("PushPull", "PullParams")
# Why single gradients and single requests for parameters are refused; other reasons come as they occur.
_USUAL = (
    Reason.NON_FINITE,
    Reason.NORM_TOO_LARGE,
    Reason.TICKET_UNKNOWN,
    Reason.FINISHED,
    Reason.BAD_PAYLOAD,
    Reason.NOT_A_MEMBER,
)


class Traffic:
    """Counters of what the service does. `reason` is empty but for what was refused."""

    def __init__(self, families: Families) -> None:
        refused = [("refused", reason.value) for reason in _USUAL]
        self.pushes = families.counter(
            "pushes",
            "Gradients that came in.",
            "outcome",
            "reason",
            known=[("applied", ""), ("discarded", ""), ("repeated", ""), *refused],
        )
        self.pulls = families.counter(
            "pulls",
            "Requests for parameters.",
            "outcome",
            "reason",
            known=[("ticket", ""), ("reader", ""), ("not_modified", ""), *refused],
        )
        self.refusals = families.counter(
            "refusals", "Calls and gradients refused.", "reason", known=[(reason.value,) for reason in Reason]
        )
        self._bytes(families)
        self.stage = families.histograms(
            "exchange_stage_seconds",
            "Time of an exchange by stage: receiving the gradient, checking that it is finite, waiting for the lock, "
            "applying, waiting for the next ticket, copying the parameters, sending them.",
            SECONDS,
            "stage",
            STAGES,
        )
        # `labels` takes longer than what it leads to: the hot path has its children at hand.
        self.applied = self.pushes.labels("applied", "")
        self.discarded = self.pushes.labels("discarded", "")
        self.repeated = self.pushes.labels("repeated", "")
        self.ticketed = self.pulls.labels("ticket", "")
        self.read = self.pulls.labels("reader", "")
        self.not_modified = self.pulls.labels("not_modified", "")

    def _bytes(self, families: Families) -> None:
        received = families.counter("received_bytes", "Tensor bytes received.", "method")
        sent = families.counter("sent_bytes", "Tensor bytes sent.", "method")
        self.received_bytes = {method: received.labels(method) for method in RECEIVING}
        self.sent_bytes = {method: sent.labels(method) for method in SENDING}

    def push_refused(self, reason: Reason) -> None:
        """A gradient was not taken."""
        self.pushes.labels("refused", reason.value).inc()

    def pull_refused(self, reason: Reason) -> None:
        """Parameters were asked for and not sent."""
        self.pulls.labels("refused", reason.value).inc()

    def refused(self) -> dict[str, int]:
        """How many calls and gradients were refused, by reason; only reasons that occurred."""
        samples = next(iter(self.refusals.collect())).samples
        counts = {s.labels["reason"]: int(s.value) for s in samples if s.name.endswith("_total")}
        return {reason: count for reason, count in counts.items() if count}
