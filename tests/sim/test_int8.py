"""What rounding to int8 costs in loss: less than another seed does."""

from ormo_server.sim.plan import Plan
from ormo_server.sim.record import Row
from ormo_server.sim.settings import SimSettings

INT8 = "sim.int8_workload:Int8Workload"


def losses(seed: int, workload: str | None = None) -> tuple[float, float]:
    """Of training and test, at the end of 60 pushes by four workers, one of them slow."""
    rows: list[Row] = []
    named = {} if workload is None else {"workload": workload}
    settings = SimSettings(
        method="local-ormo",
        workers=4,
        slow="1:10x",
        local_steps=4,
        inner="adamw",
        inner_lr=1e-3,
        stop_after_gradients=60,
        evaluate_every_gradients=60,
        seed=seed,
        **named,
    )
    Plan(settings).run(on_row=rows.append)
    return rows[-1].train_loss, rows[-1].test_loss


def test_sums_in_int8_end_at_the_loss_of_float32_within_the_spread_of_seeds() -> None:
    seeds = (1, 2, 3)
    exact, coded = [losses(seed) for seed in seeds], [losses(seed, INT8) for seed in seeds]
    for number in (0, 1):
        plain, rounded = ([each[number] for each in some] for some in (exact, coded))
        assert plain != rounded
        assert max(plain) < 1.0, "it has learnt something"
        spread = max(plain) - min(plain)
        assert max(abs(one - other) for one, other in zip(plain, rounded, strict=True)) < spread / 4
