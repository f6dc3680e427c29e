"""A workload whose gradient is a function of the parameters and the ticket's number alone, on a line of numbers."""

from dataclasses import dataclass, field

import torch

from ormo_runtime.workload import Computed, Model, Scores

SIZE = 5
NO_FLOATS, NO_INTS = torch.zeros(0), torch.zeros(0, dtype=torch.int64)


def start() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, SIZE)


def gradient_of(params: torch.Tensor, ticket: int) -> torch.Tensor:
    """Different for every ticket, and never the same at other parameters."""
    pushed = (ticket * 7919 % 101 - 50) / 50
    return params * 0.3 + pushed * torch.arange(1.0, SIZE + 1)


@dataclass
class ByTicket:
    """Scores are the mean of the squared parameters, so that they are easy to foresee."""

    epoch_samples: int = 100
    batch_samples: int = 10
    bad_from: int = 10**9  # the number of the first ticket whose gradient is not finite
    tickets: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)  # of each push of local steps

    def initial(self, seed: int) -> Model:
        return Model(start(), NO_FLOATS, NO_INTS)

    def start_worker(self, data_seed: int, model: Model) -> "ByTicket":
        self.seeds.append(data_seed)
        return self

    def gradient(self, ticket: int, params: torch.Tensor, out: torch.Tensor) -> Computed:
        self.tickets.append(ticket)
        out.copy_(gradient_of(params, ticket))
        if ticket >= self.bad_from:
            out[0] = float("nan")
        return Computed(self.batch_samples, float(ticket), NO_FLOATS, NO_INTS)

    def local_steps(
        self, ticket: int, params: torch.Tensor, out: torch.Tensor, *, steps: int, progress: float
    ) -> Computed:
        self.progress.append(progress)
        done = self.gradient(ticket, params, out)
        out.mul_(steps)
        return Computed(steps * done.samples, done.loss, NO_FLOATS, NO_INTS)

    def evaluate(self, model: Model) -> Scores:
        loss = model.params.square().mean().item()
        return Scores(train_loss=loss, test_loss=2 * loss, test_accuracy=1 / (1 + loss))


def workload(**_: object) -> ByTicket:
    """As `--workload sim.by_ticket:workload` makes it."""
    return ByTicket()
