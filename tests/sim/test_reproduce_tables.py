"""What a comparison says about runs whose figures a reader can check by hand."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ormo_runtime.settings import UsageError
from ormo_server.sim.record import read_run
from ormo_server.sim.reproduce import report
from ormo_server.sim.reproduce.comparison import Comparison, Spread
from ormo_server.sim.reproduce.report import Origin, compact_report, draw_clusters, full_report, results_csv
from ormo_server.sim.reproduce.suite import Cell, Suite
from sim.written_runs import Scored, write_run

CLUSTER = "K4-homogeneous"
ORIGIN = Origin("ormo-sim reproduce --suite hand", failed=0)
DIVERGED = [(10, float("nan"), 0.1)]

# Final train loss and test accuracy on the grid.
GRID = {
    ("ormo", 0.01): (0.50, 0.80),
    ("ormo", 0.02): (0.25, 0.82),
    ("ormo", 0.04): (0.75, 0.90),
    ("asgd", 0.01): (0.90, 0.70),
    ("asgd", 0.02): (0.60, 0.75),
    ("asgd", 0.04): (0.40, 0.78),
}
# With seeds 1, 2, 3 at the best rates, and at ormo's.
REPORTED: dict[tuple[str, float], Sequence[Sequence[Scored]]] = {
    ("ormo", 0.02): [
        [(100, 0.40, 0.60), (200, 0.20, 0.80)],
        [(100, 0.30, 0.70), (200, 0.30, 0.82)],
        [(100, 0.60, 0.50), (200, 0.40, 0.87)],
    ],
    ("asgd", 0.04): [
        [(100, 0.70, 0.40), (200, 0.45, 0.70)],
        [(100, 0.80, 0.40), (200, 0.55, 0.72)],
        [*DIVERGED],
    ],
    ("asgd", 0.02): [[(200, 0.8, 0.6)], [(200, 0.9, 0.6)], [(200, 1.0, 0.6)]],
}


def hand_made_suite(**changes: object) -> Suite:
    told = {
        "name": "hand",
        "title": "By hand",
        "methods": ("ormo", "asgd"),
        "clusters": [{"workers": 4, "setting": "homogeneous"}],
        "learning_rates": (0.01, 0.02, 0.04),
        "target_train_loss": 0.45,
        "target_accuracy": 0.8,
        "diverged_loss": 2.0,
        "repeat_at_reference_rate": True,
        "simulation": {"task": "points", "batch_size": 4, "stop_after_gradients": 200},
    }
    return Suite.model_validate(told | changes)


def on_grid(tmp_path: Path, losses: Mapping[tuple[str, float], tuple[float, float]], suite: Suite) -> Comparison:
    runs = {}
    for (method, rate), (loss, accuracy) in losses.items():
        path = tmp_path / f"{method}-{rate}"
        runs[Cell(CLUSTER, method, rate, 0)] = read_run(write_run(path, [(200, loss, accuracy)]))
    return Comparison(suite, runs)


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    made = on_grid(tmp_path, GRID, hand_made_suite())
    runs = dict(made.runs)
    for (method, rate), of_seeds in REPORTED.items():
        for seed, scores in enumerate(of_seeds, start=1):
            path = write_run(tmp_path / f"{method}-{rate}-{seed}", scores, delays={0: 1, 2: 1, seed * 10: 1})
            runs[Cell(CLUSTER, method, rate, seed)] = read_run(path)
    return Comparison(made.suite, runs)


def table(text: str, first_head: str) -> dict[str, dict[str, str]]:
    """The rows of the Markdown table whose first head is this one, by their first cell."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_head} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    heads = rows[0]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows[2:]}


def test_the_best_rate_has_the_lowest_train_loss_at_the_end(comparison: Comparison) -> None:
    suite = comparison.suite
    assert comparison.best_rate(suite.clusters[0], "ormo") == 0.02
    assert comparison.best_rate(suite.clusters[0], "asgd") == 0.04
    assert [entry.at_edge for entry in comparison.entries()] == [False, True]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((0.5, 0.5, 0.7), 0.01),  # equal: the smaller rate
        ((0.9, float("nan"), 0.8), 0.04),
        ((2.5, 1.9, 2.0), 0.02),  # from 2.0 on it counts as diverged
        ((float("inf"), float("nan"), 3.0), 0.01),  # all diverged: the smallest rate
    ],
)
def test_a_rate_that_diverges_is_the_worst(tmp_path: Path, losses: tuple[float, ...], best: float) -> None:
    suite = hand_made_suite(methods=("ormo",))
    found = {("ormo", rate): (loss, 0.5) for rate, loss in zip(suite.learning_rates, losses, strict=True)}
    assert on_grid(tmp_path, found, suite).best_rate(suite.clusters[0], "ormo") == best


def test_several_evaluations_may_decide_so_that_no_lucky_one_does(tmp_path: Path) -> None:
    runs = {}
    for rate, losses in ((0.01, (0.5, 0.5, 0.5)), (0.02, (0.1, 0.9, 0.4)), (0.04, (9.0, 0.5, 0.6))):
        scores = [(100 * number, loss, 0.5) for number, loss in enumerate(losses, start=1)]
        runs[Cell(CLUSTER, "ormo", rate, 0)] = read_run(write_run(tmp_path / f"{rate}", scores))
    chosen = {}
    for evaluations in (1, 2, 3):
        suite = hand_made_suite(methods=("ormo",), choice_evaluations=evaluations)
        chosen[evaluations] = Comparison(suite, runs).best_rate(suite.clusters[0], "ormo")
    # The means over the last two are 0.5, 0.65 and 0.55; over three 0.5, 0.467 and 3.37.
    assert chosen == {1: 0.02, 2: 0.01, 3: 0.02}


def test_new_seeds_run_at_the_best_rates_and_at_the_references(comparison: Comparison) -> None:
    wanted = [(cell.method, cell.learning_rate, cell.seed) for cell in comparison.report_cells()]
    assert wanted == [(method, rate, seed) for method, rate in REPORTED for seed in (1, 2, 3)]
    alone = Comparison(hand_made_suite(repeat_at_reference_rate=False), comparison.runs)
    assert {(cell.method, cell.learning_rate) for cell in alone.report_cells()} == {("ormo", 0.02), ("asgd", 0.04)}


def test_a_method_that_failed_everywhere_has_no_rate(tmp_path: Path) -> None:
    found = {key: value for key, value in GRID.items() if key[0] == "asgd"}
    comparison = on_grid(tmp_path, found, hand_made_suite())
    assert [entry.rate for entry in comparison.entries()] == [None, 0.04]
    assert "| ormo | all failed | – |" in full_report(comparison, Origin("x", failed=3))


def test_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3)
    assert Spread.of([4.0]) == Spread(4.0, None, 1)
    assert Spread.of([]) is None


def test_the_table_says_mean_and_deviation_over_the_seeds(comparison: Comparison) -> None:
    rows = table(full_report(comparison, ORIGIN), "method")
    ormo, asgd = rows["ormo"], rows["asgd"]
    # 0.2, 0.3, 0.4 and 80, 82, 87 %: the deviation of the latter is √((9 + 1 + 16)/2) = 3.6.
    assert (ormo["η"], ormo["train loss"], ormo["test accuracy, %"]) == ("0.02", "0.300 ± 0.100", "83.0 ± 3.6")
    # At 100, 100 and 200 gradients; half a second each, and 80 % only at the end.
    assert (ormo["gradients to loss 0.45"], ormo["virtual s to 80%"], ormo["virtual s"]) == ("133", "100", "100")
    # Delays 0, 2 and 10, 20 or 30: the means are 4, 22/3 and 32/3.
    assert (ormo["delay mean, max"], ormo["diverged"]) == ("7.3, 30", "0 of 3")
    # Two of three are sound: 0.45 and 0.55; all count for the accuracy: 70, 72 and 10 %.
    assert (asgd["η"], asgd["train loss"], asgd["test accuracy, %"]) == ("0.04 †", "0.500 ± 0.071", "50.7 ± 35.2")
    assert (asgd["gradients to loss 0.45"], asgd["virtual s to 80%"]) == ("200 (1 of 3)", "not reached")
    assert (asgd["virtual s"], asgd["diverged"]) == ("100", "1 of 3")


def test_the_page_says_what_it_is_about(comparison: Comparison) -> None:
    text = full_report(comparison, ORIGIN)
    for said in (
        "# By hand",
        "`ormo-sim reproduce --suite hand`",
        "200 gradients of 4 samples a run, β = 0.9",
        "(seed 0)",
        "seeds 1, 2, 3",
        "## 4 workers, homogeneous",
        "### At the rate that suits `ormo`: η = 0.02, seeds 1, 2, 3",
        "| asgd | 0.900 ± 0.100 | 60.0 ± 0.0 | not reached | 0 of 3 |",
        "| method | η = 0.01 | η = 0.02 | η = 0.04 |",
        "| ormo | 0.5, 80.0 | **0.25, 82.0** | 0.75, 90.0 |",
        "† is the edge of the grid",
    ):
        assert said in text


def test_a_loss_is_read_between_two_evaluations_on_a_line_and_at_the_end_beyond_it(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [(100, 3.0, 0.1), (200, 2.0, 0.2), (400, 1.0, 0.3)]))
    seconds = [0.0, 50.0, 75.0, 100.0, 150.0, 200.0, 999.0]  # half a second a gradient
    losses = [run.test_loss_at(lambda row: row.seconds, each) for each in seconds]
    assert losses == [3.0, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0]


LOCAL_RUNS = {
    # by cluster and method: losses after 100 and 200 gradients
    ("K4-equal", "local-sgd"): (3.0, 2.0),
    ("K4-equal", "local-ormo"): (2.0, 1.5),
    ("K4-short", "local-ormo"): (1.75, None),
}


def test_losses_are_told_at_the_end_and_by_the_time_and_the_bytes_of_whoever_took_least(tmp_path: Path) -> None:
    suite = hand_made_suite(
        methods=("local-sgd", "local-ormo"),
        clusters=[
            {"workers": 4, "setting": "equal"},
            {"workers": 4, "setting": "short", "methods": ("local-ormo",)},
        ],
        learning_rates=(2.0,),
        momenta=(0.5,),
        measure="loss",
        diverged_loss=9.0,
        report_seeds=(1,),
        repeat_at_reference_rate=False,
        simulation={"task": "points", "batch_size": 4, "stop_after_gradients": 200, "local_steps": 4},
    )
    runs = {}
    for (cluster, method), (half, end) in LOCAL_RUNS.items():
        scores = [(100, half, 0.5)] + ([] if end is None else [(200, end, 0.5)])
        beta = 0.0 if method == "local-sgd" else 0.5
        told = {"learning_rate": 2.0 * (1 - beta), "momentum": beta, "local_steps": 4}
        for seed in (0, 1):
            path = write_run(tmp_path / f"{cluster}-{method}-{seed}", scores, **told)
            runs[Cell(cluster, method, 2.0 * (1 - beta), seed, beta)] = read_run(path)
    comparison = Comparison(suite, runs)
    rows = table(compact_report(comparison, ORIGIN), "4 workers")
    assert list(rows) == ["equal: `local-sgd`", "equal: `local-ormo`", "short: `local-ormo`"]
    # 10 bytes a gradient, half a second each: the short one took 50 s, and 1000 bytes.
    assert list(rows["equal: `local-sgd`"].values())[1:] == ["2, 0", "2.000", "3.000", "3.000"]
    assert list(rows["equal: `local-ormo`"].values())[1:] == ["1, 0.5", "1.500", "2.000", "2.000"]
    assert list(rows["short: `local-ormo`"].values())[1:] == ["1, 0.5", "1.750", "1.750", "1.750"]
    assert "in 50 virtual s" in compact_report(comparison, ORIGIN)
    page = full_report(comparison, ORIGIN)
    assert "| method | η, β | test loss | train loss | virtual s | MB moved |" in page
    assert "| method | η = 2, β = 0 | η = 1, β = 0.5 |" in page


def test_the_readme_gets_one_table_for_each_number_of_workers(comparison: Comparison) -> None:
    rows = table(compact_report(comparison, ORIGIN), "4 workers")
    assert list(rows["`ormo`"].values()) == ["`ormo`", "83.0 ± 3.6 (0.02)", "133", "100", "83.0 ± 3.6"]
    assert list(rows["`asgd`"].values()) == ["`asgd`", "50.7 ± 35.2 (0.04 †)", "200 (1 of 3)", "100", "60.0 ± 0.0"]


def test_every_cell_is_in_the_csv_file(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(comparison))))
    assert len(rows) == len(GRID) + 9
    purposes = {(row["method"], row["learning_rate"], row["seed"]): row["purpose"] for row in rows}
    assert purposes["asgd", "0.04", "0"] == "grid"
    assert purposes["asgd", "0.04", "1"] == "report"
    assert purposes["asgd", "0.02", "1"] == "reference"
    broken = next(row for row in rows if row["diverged"] == "True")
    assert (broken["train_loss"], broken["gradients_to_loss"]) == ("", "")


def test_failed_simulations_are_owned_up_to(comparison: Comparison) -> None:
    assert "**2 simulations failed and are missing.**" in compact_report(comparison, Origin("x", failed=2))


def test_every_cluster_gets_its_pictures(comparison: Comparison, tmp_path: Path) -> None:
    pictures = draw_clusters(comparison, tmp_path / "figures")
    assert [path.name for path in pictures] == [f"curves-{CLUSTER}.png", f"delays-{CLUSTER}.png"]


def test_the_table_goes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    other = "<!-- results: other -->\nkept\n<!-- end of results: other -->\n"
    path.write_text(f"# Title\n{other}<!-- results: hand -->\nold\n\nolder\n<!-- end of results: hand -->\nend\n")
    path.chmod(0o640)
    for new in ("| a |", "| b |\n"):
        report.insert(path, "hand", new)
    wanted = f"# Title\n{other}<!-- results: hand -->\n| b |\n<!-- end of results: hand -->\nend\n"
    assert path.read_text() == wanted
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "text",
    ["", "<!-- results: hand -->", "<!-- end of results: hand --><!-- results: hand -->", "<!-- results: other -->"],
)
def test_a_file_without_markers_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"README\.md does not say where the results go: put the lines <!-- results: "):
        report.check(path, "hand")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"README\.md can't be read"):
        report.check(tmp_path / "README.md", "hand")
