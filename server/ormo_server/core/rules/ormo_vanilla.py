"""Ordered momentum without its correction of the parameters (the paper's ablation "vanilla OrMo")."""

from ormo_server.core.rules.ormo import Ormo


class OrmoVanilla(Ormo):
    """OrMo whose last line is w ← w − ηg: a late gradient has its ordered share of the momentum from now on, but the
    parameters never get the moves that the momentum made before it came. Keeps one vector, u.
    """

    def moves_of_late_gradient(self, lag: int) -> float:  # noqa: ARG002
        """See `Ormo.moves_of_late_gradient`."""
        return 1.0
