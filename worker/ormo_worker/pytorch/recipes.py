"""Inner optimizers that a command line can name, and how their learning rates change in a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ormo_worker.errors import OptionRefused

InnerName = Literal["adamw", "muon", "sgd"]
ScheduleName = Literal["constant", "cosine"]

# Torch's own defaults, said here because groups scale them.
_ADAMW_DECAY, _MUON_DECAY = 0.01, 0.1
# 2/(1 - β₂) at β₂ = 0.999: by then the second moments of Adam are known well enough (Ma, Yarats 2021: On the adequacy
# of untuned warmup for adaptive optimization).
_WARM_STEPS = 2000


def named_optimizers(
    name: InnerName, model: nn.Module, groups: Iterable[Mapping[str, Any]], learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Make the optimizers that have this name, for all parameters that require gradients.

    Args:
        name: `adamw`; `muon`, for matrices, with AdamW for embeddings and for what is no matrix; or `sgd`, plain.
        model: whose parameters they are.
        groups: the parameters, with their factors on the weight decay, as `decay_groups` makes them. It is that of
            torch's defaults: 0.01 of AdamW, 0.1 of Muon, none of SGD.
        learning_rate: of all of them; Muon's moves have the size of AdamW's.

    Raises:
        OptionRefused: this torch has no Muon.
    """
    rows = [(group["weight_decay_scale"], parameter) for group in groups for _, parameter in group["params"]]
    rows = [(scale, parameter) for scale, parameter in rows if parameter.requires_grad]
    if name == "sgd":
        return [torch.optim.SGD([parameter for _, parameter in rows], lr=learning_rate)]
    matrices = _hidden_matrices(model) if name == "muon" else set()
    made: list[torch.optim.Optimizer] = []
    if muons := _scaled([row for row in rows if row[1] in matrices], _MUON_DECAY):
        made.append(_muon()(muons, lr=learning_rate, adjust_lr_fn="match_rms_adamw"))
    if others := _scaled([row for row in rows if row[1] not in matrices], _ADAMW_DECAY):
        made.append(torch.optim.AdamW(others, lr=learning_rate))
    return made


def _hidden_matrices(model: nn.Module) -> set[Tensor]:
    embedded = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return {parameter for parameter in model.parameters() if parameter.ndim == 2 and parameter not in embedded}


def _scaled(rows: Sequence[tuple[float, Tensor]], decay: float) -> list[dict[str, Any]]:
    by_scale: dict[float, list[Tensor]] = {}
    for scale, parameter in rows:
        by_scale.setdefault(scale, []).append(parameter)
    return [{"params": parameters, "weight_decay": scale * decay} for scale, parameters in by_scale.items()]


def _muon() -> Any:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise OptionRefused(
            f"--inner is muon, and PyTorch {torch.__version__} has none: install PyTorch 2.9 or newer, or choose adamw"
        )
    return muon


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """The factor on the inner learning rates, from how far the run is and how long this worker has been in it.

    Attributes:
        kind: `constant`, or `cosine`: half a wave from 1 to 0 over the run. A run without an end never leaves its
            beginning.
        warmup: the share of the run, from when the worker joins, over which it rises linearly from near 0; over 2000
            local steps at the latest. 0 for none.
    """

    kind: ScheduleName = "constant"
    warmup: float = 0.0

    def factor(self, progress: float, joined_at: float, steps: int) -> float:
        """For one local step, 0 to 1.

        Args:
            progress: of the run, 0 to 1.
            joined_at: the progress when this worker, or its optimizer, began.
            steps: local steps that it has made since.
        """
        wave = 1.0 if self.kind == "constant" else 0.5 * (1.0 + math.cos(math.pi * progress))
        if not self.warmup:
            return wave
        return wave * min(1.0, max((progress - joined_at) / self.warmup, (steps + 1) / _WARM_STEPS))
