"""What a run left behind, as the checker goes by it."""

from dataclasses import dataclass, field

from chaos.memory import Life

Name = tuple[str, int]  # worker, number of its gradient


@dataclass(frozen=True)
class Told:
    """A gradient that was acknowledged."""

    name: Name
    epoch: int
    iteration: int


@dataclass(frozen=True)
class Applied:
    """A gradient that the journal says was applied."""

    name: Name
    ticket: tuple[int, int]
    iteration: int
    discarded: bool = False


@dataclass(frozen=True)
class Silence:
    """A process of a worker wrote nothing, though nothing stood in its way.

    Attributes:
        who: which process.
        seconds: for how long.
        starting: it was on its way to its first line, with Python and PyTorch to load.
    """

    who: str
    seconds: float
    starting: bool = False


@dataclass
class Evidence:
    """All that the checker goes by.

    Attributes:
        tried: gradients that a worker sent, each with its ticket.
        told: those that were acknowledged.
        refused: those that were refused, with the reason.
        applied: in order, by the journal; None without one.
        differences: places where checkpoint and journal do not lead to the next checkpoint.
        starts: iteration that each life of the server began with, by epoch, in order.
        end: iteration in the last checkpoint.
        parameters: in the last checkpoint.
        silences: of each worker's process.
        memory: of each process.
    """

    tried: dict[Name, tuple[int, int]] = field(default_factory=dict)
    told: list[Told] = field(default_factory=list)
    refused: dict[Name, str] = field(default_factory=dict)
    applied: list[Applied] | None = None
    differences: list[str] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    end: int = 0
    parameters: list[float] = field(default_factory=list)
    silences: list[Silence] = field(default_factory=list)
    memory: list[Life] = field(default_factory=list)
