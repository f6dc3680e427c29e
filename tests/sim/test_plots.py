"""Pictures of finished simulations, and what is read from their directories."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from ormo_runtime.settings import UsageError
from ormo_server.core.method import PRESETS
from ormo_server.sim import cli, plots
from ormo_server.sim.plots import STYLES, Curve, Line, average, draw, lines_of
from ormo_server.sim.record import read_run
from sim.written_runs import write_run

SCORES = [(100, 2.0, 0.2), (200, 1.0, 0.6), (300, 0.5, 0.9)]


def test_a_run_becomes_two_pictures_that_open_and_are_small(tmp_path: Path) -> None:
    pictures = draw([write_run(tmp_path / "run", SCORES, delays={0: 5, 3: 900, 700: 1})], tmp_path / "into")
    assert [path.name for path in pictures] == ["curves.png", "delays.png"]
    for path in pictures:
        assert path.stat().st_size < 150_000
        with Image.open(path) as picture:
            assert picture.size[0] == 1000
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert sorted(path.name for path in (tmp_path / "into").iterdir()) == ["curves.png", "delays.png"]


def test_all_methods_and_seeds_in_one_picture_stay_small(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"{method}-{seed}",
            [(step * 50, (2 + number / 9) * 0.97**step + seed / 50, 1 - 0.97**step) for step in range(1, 60)],
            delays={delay: 1 + (delay * (number + 3)) % 11 for delay in range(200)},
            method=method,
            seed=seed,
        )
        for number, method in enumerate(PRESETS)
        for seed in range(2)
    ]
    assert all(path.stat().st_size < 150_000 for path in draw(runs, tmp_path))


def test_runs_that_differ_only_in_their_seed_are_one_line(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{method}-{rate}-{seed}", SCORES, method=method, learning_rate=rate, seed=seed)
        for method, rate in (("ormo", 0.01), ("ormo", 0.02), ("asgd", 0.01))
        for seed in range(3)
    ]
    lines = lines_of([read_run(path) for path in runs])
    assert [line.label for line in lines] == ["ormo, η 0.01", "ormo, η 0.02", "asgd, η 0.01"]
    assert [len(line.runs) for line in lines] == [3, 3, 3]
    assert lines[0].style == STYLES["ormo"]
    assert len({line.style for line in lines}) == 3


def test_a_method_that_is_no_preset_is_named_by_what_it_is_made_of(tmp_path: Path) -> None:
    path = write_run(tmp_path, SCORES, method="ormo", step_scale="inverse")
    assert [line.label for line in lines_of([read_run(path)])] == ["ormo × inverse × asynchronous"]


def test_every_method_has_a_look_of_its_own() -> None:
    assert STYLES.keys() == PRESETS.keys()
    assert len(set(STYLES.values())) == len(STYLES)


def test_a_line_is_the_mean_of_its_runs_and_its_band_their_sample_deviation(tmp_path: Path) -> None:
    losses = ([4.0, 2.0, 1.0], [2.0, 2.0, 0.1], [3.0, 2.0, 0.1])
    runs = [
        read_run(write_run(tmp_path / f"{seed}", [(100 * (i + 1), loss, 0.5) for i, loss in enumerate(of_run)]))
        for seed, of_run in enumerate(losses)
    ]
    curve = average(runs, lambda row: row.seconds, lambda row: row.train_loss)
    assert curve.x.tolist() == [50, 100, 150]
    np.testing.assert_allclose(curve.mean, [3.0, 2.0, 0.4])
    # The deviation of (1, 0.1, 0.1) is 0.9/√3; the band does not go below the lowest run.
    np.testing.assert_allclose(curve.high, [4.0, 2.0, 0.4 + 0.9 / math.sqrt(3)])
    np.testing.assert_allclose(curve.low, [2.0, 2.0, 0.1])


def test_a_line_ends_where_one_of_its_runs_is_not_finite(tmp_path: Path) -> None:
    sound = read_run(write_run(tmp_path / "sound", SCORES))
    broken = read_run(write_run(tmp_path / "broken", [(100, 3.0, 0.2), (200, math.nan, 0.1)], diverged=True))
    curve = average([sound, broken], lambda row: row.epochs, lambda row: row.train_loss)
    assert curve.mean.tolist() == [2.5]
    draw([sound.path, broken.path], tmp_path)


def test_runs_by_local_steps_are_drawn_by_their_test_loss_over_samples_bytes_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[list[float]]] = {}

    def note(axes: Axes, line: Line, curve: Curve) -> None:
        drawn.setdefault(line.method, []).append(curve.x.tolist())
        assert curve.mean.tolist() == [3.0, 2.0]

    monkeypatch.setattr(plots, "_draw_curve", note)
    scores = [(100, 3.0, 0.2), (200, 2.0, 0.1)]
    told = {"local_steps": 4, "method": "local-ormo"}
    draw([write_run(tmp_path / "run", scores, **told)], tmp_path / "into")
    # Half a second and 10 bytes a gradient; 4 samples of 256.
    assert drawn == {"local-ormo": [[100 / 64, 200 / 64], [0.001, 0.002], [50, 100]]}


def test_a_run_that_diverged_at_once_can_be_drawn(tmp_path: Path) -> None:
    draw([write_run(tmp_path / "run", [(1, math.inf, 0.1)], diverged=True)], tmp_path)


def test_the_command_draws_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / f"{seed}", SCORES, seed=seed)) for seed in range(2)]
    assert cli.main(["plot", "--runs", ",".join(runs), "--directory", str(tmp_path / "into")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "into" / f"{name}.png") for name in ("curves", "delays")]


def _drop(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / name).write_text(text)

    return write


def _forget(name: str) -> Callable[[Path], None]:
    def forget(run: Path) -> None:
        found = json.loads((run / "summary.json").read_text())
        del found[name]
        (run / "summary.json").write_text(json.dumps(found))

    return forget


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_drop("summary.json"), "has no summary.json: expected the directory of a finished simulation"),
        (_drop("evaluations.csv"), "are damaged"),
        (_drop("delays.csv"), "are damaged"),
        (_write("summary.json", '{"settings": {'), "are damaged"),
        (_write("summary.json", "[]"), "are damaged"),
        (_write("evaluations.csv", "seconds,gradients\n1,2\n"), "are damaged"),
        (_write("evaluations.csv", "seconds,gradients\n"), "evaluations.csv has no row"),
        (_write("evaluations.csv", "\x00\n\x00"), "are damaged"),
        (_write("delays.csv", "delay,gradients\none,2\n"), "are damaged"),
        (_write("delays.csv", "late\n1\n"), "are damaged"),
        (_forget("digest"), "digest: Field required"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    run = write_run(tmp_path / "run", SCORES)
    damage(run)
    with pytest.raises(UsageError) as refused:
        draw([run], tmp_path / "into")
    assert sentence in str(refused.value)
    assert str(run) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "into").exists()


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere is not a directory"):
        draw([tmp_path / "nowhere"], tmp_path)


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run was given"):
        draw([], tmp_path)
