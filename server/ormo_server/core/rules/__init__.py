"""The update rules by name. A new rule is one file and one row here."""

from ormo_server.core.rules.base import Landing, UpdateRule, geometric_sum
from ormo_server.core.rules.ormo import Ormo
from ormo_server.core.rules.sgd import Sgd

UPDATE_RULES: dict[str, type[UpdateRule]] = {
    "ormo": Ormo,
    "sgd": Sgd,
}

__all__ = ["UPDATE_RULES", "Landing", "UpdateRule", "geometric_sum"]
