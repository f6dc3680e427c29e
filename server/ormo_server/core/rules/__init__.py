"""The update rules by name. A new rule is one file and one row here."""

from ormo_server.core.rules.base import LARGEST, Coefficients, Landing, Sending, UpdateRule, geometric_sum
from ormo_server.core.rules.dc import DelayCompensated
from ormo_server.core.rules.delayed_nesterov import DelayedNesterov
from ormo_server.core.rules.fadas import BufferedAmsgrad
from ormo_server.core.rules.naive import Naive, NaiveNesterov
from ormo_server.core.rules.ormo import Ormo, OrmoNesterov, OrmoVanilla
from ormo_server.core.rules.sgd import Sgd
from ormo_server.core.rules.shifted import Shifted
from ormo_server.core.rules.smega2 import Smega2

UPDATE_RULES: dict[str, type[UpdateRule]] = {
    "ormo": Ormo,
    "ormo-vanilla": OrmoVanilla,
    "ormo-nesterov": OrmoNesterov,
    "sgd": Sgd,
    "naive": Naive,
    "shifted": Shifted,
    "smega2": Smega2,
    "dc": DelayCompensated,
    "naive-nesterov": NaiveNesterov,
    "delayed-nesterov": DelayedNesterov,
    "fadas": BufferedAmsgrad,
}

__all__ = ["LARGEST", "UPDATE_RULES", "Coefficients", "Landing", "Sending", "UpdateRule", "geometric_sum"]
