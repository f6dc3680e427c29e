"""Suites: what is refused, what the packaged ones say, and what the command line leaves of them."""

from pathlib import Path

import pytest

from ormo_runtime.settings import UsageError
from ormo_runtime.settings_loader import read_settings
from ormo_server.core.method import PRESETS
from ormo_server.sim.reproduce.command import ReproduceSettings, chosen
from ormo_server.sim.reproduce.suite import Cell, Suite, load_suite, packaged

SUITE = """
title = "least squares"
methods = ["ormo", "asgd"]
learning_rates = [0.01, 0.001]
target_train_loss = 0.1
target_accuracy = 0.9

[simulation]
workload = "sim.analytic:LeastSquares"
batch_size = 4
stop_after_gradients = 60

[[clusters]]
workers = 4
setting = "homogeneous"

[[clusters]]
workers = 8
setting = "heterogeneous"
learning_rates = [0.002]
simulation = { slow = "1:10x" }
"""
PAPERS = ["ormo", "ormo-da", "ormo-vanilla", "asgd", "asgd-da", "asgdm", "shifted", "smega2", "ssgdm", "ssgd"]


def load(tmp_path: Path, text: str) -> Suite:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_suite(str(path))


def selection(*flags: str) -> Suite:
    return chosen(read_settings(ReproduceSettings, flags, {}, program="ormo-sim reproduce"))


def test_a_suite_says_what_to_simulate(tmp_path: Path) -> None:
    suite = load(tmp_path, SUITE)
    assert suite.name == "mine"
    assert [str(cell.path) for cell in suite.grid()] == [
        "K4-homogeneous/ormo/rate-0.001-seed-0",
        "K4-homogeneous/ormo/rate-0.01-seed-0",
        "K4-homogeneous/asgd/rate-0.001-seed-0",
        "K4-homogeneous/asgd/rate-0.01-seed-0",
        "K8-heterogeneous/ormo/rate-0.002-seed-0",
        "K8-heterogeneous/asgd/rate-0.002-seed-0",
    ]
    settings = suite.settings(Cell("K8-heterogeneous", "asgd", 0.002, 3))
    assert (settings.method, settings.workers, settings.slow, settings.seed) == ("asgd", 8, "1:10x", 3)
    assert (settings.learning_rate, settings.batch_size, settings.stop_after_gradients) == (0.002, 4, 60)


def test_old_names_of_settings_are_taken_with_one_line_for_the_suite(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = SUITE.replace("batch_size = 4", "batch_size = 4\nevaluate_every = 9\nlatency = [2]")
    suite = load(tmp_path, text.replace("{ slow", "{ evaluate_every = 5, slow"))
    told = [suite.settings(Cell(cluster, "asgd", 0.002, 3)) for cluster in ("K4-homogeneous", "K8-heterogeneous")]
    assert [each.evaluate_every_gradients for each in told] == [9, 5]
    assert [each.latency_seconds for each in told] == [(2.0,), (2.0,)]
    place = f"given in the suite {tmp_path / 'mine.toml'}, is now called"
    to_do = "change it, for the next release will not know the old name"
    assert sorted(capfd.readouterr().err.splitlines()) == [
        f"ormo-sim reproduce: evaluate_every, {place} evaluate_every_gradients: {to_do}",
        f"ormo-sim reproduce: latency, {place} latency_seconds: {to_do}",
    ]


def test_both_names_of_a_setting_are_refused(tmp_path: Path) -> None:
    both = SUITE.replace("batch_size = 4", "evaluate_every = 9\nevaluate_every_gradients = 9")
    with pytest.raises(
        UsageError, match="evaluate_every_gradients and evaluate_every, its old name, are both given in"
    ):
        load(tmp_path, both)


def test_milestones_are_told_in_epochs_and_come_in_gradients(tmp_path: Path) -> None:
    text = SUITE.replace("[simulation]", "milestone_epochs = [2, 3.5]\nepoch_samples = 256\n[simulation]")
    suite = load(tmp_path, text)
    settings = suite.settings(suite.grid()[0])
    assert (settings.schedule, settings.milestones) == ("milestones", (128, 224))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('title = "least squares"', "title = ", "is not valid TOML: Invalid value (at line 2, column 9)"),
        ('title = "least squares"\n', "", "can't be used: title is missing"),
        ('title = "', 'name = "x"\ntitle = "', "the suite is named after the file: remove `name`"),
        ('title = "', 'subtitle = "x"\ntitle = "', "subtitle is not a setting"),
        ('"asgd"', '"adam"', "methods.1 is 'adam': 'adam' is not a method: choose from ormo, ormo-da, "),
        ('"asgd"', '"ormo"', "methods is ['ormo', 'ormo']: expected each of them once"),
        ('["ormo", "asgd"]', "[]", "methods is []: tuple should have at least 1 item"),
        ("[0.01, 0.001]", "[0.01, -1]", "learning_rates.1 is -1: input should be greater than 0"),
        ("[0.01, 0.001]", "[]", "learning_rates is []"),
        ("[0.01, 0.001]", '"all"', "learning_rates is 'all': input should be a valid tuple"),
        ("workers = 4", "workers = 0", "clusters.0.workers is 0: input should be greater than or equal to 1"),
        ("workers = 4", "", "clusters.0.workers is missing"),
        ('"homogeneous"', '"a b"', "clusters.0.setting is 'a b': string should match pattern"),
        ('8\nsetting = "heterogeneous"', '4\nsetting = "homogeneous"', "expected each of them once"),
        ('"1:10x"', '"9:10x"', "K8-heterogeneous, ormo: 9:10x makes 9 workers slower, but there are only 8"),
        ("batch_size = 4", "batch_size = 0", "K4-homogeneous, ormo: batch_size is 0: input should be greater than"),
        ("batch_size = 4", "speed = 4", "K4-homogeneous, ormo: speed is not a setting"),
        ("batch_size = 4", "seed = 4", "seed differs from cell to cell, so it can't be set here: leave it out"),
        ("stop_after_gradients = 60", "", "K4-homogeneous has no end: set stop_after_gradients or epochs"),
        ("target_accuracy", "report_seeds = [0, 1]\ntarget_accuracy", "seed 0 chooses the rates"),
        ("target_accuracy = 0.9", "target_accuracy = 90", "target_accuracy is 90: input should be less than"),
        ("target_accuracy", "milestone_epochs = [80]\ntarget_accuracy", "milestone_epochs needs epoch_samples"),
        ("workers = 8", 'workers = 8\nmethods = ["ssgd"]', "K8-heterogeneous has the method ssgd, which is not among"),
        ("target_accuracy", "momenta = [1.5]\ntarget_accuracy", "momenta.0 is 1.5: input should be less than 1"),
        ("\n", "\x00", "is not valid TOML"),
    ],
)
def test_a_bad_suite_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in SUITE
    with pytest.raises(UsageError) as refused:
        load(tmp_path, SUITE.replace(old, new))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "mine" in str(refused.value)


def test_a_suite_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"there is no suite 'mnist': choose from cifar10-cnn, cifar10-resnet20, digits, local"
    ):
        load_suite("mnist")
    with pytest.raises(UsageError, match=r"nowhere\.toml can't be read: .*No such file"):
        load_suite(str(tmp_path / "nowhere.toml"))
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read"):
        load_suite(str(tmp_path / "odd.toml"))


def test_all_packaged_suites_can_be_used() -> None:
    assert list(packaged()) == ["cifar10-cnn", "cifar10-resnet20", "digits", "local-steps"]
    for name in packaged():
        suite = load_suite(name)
        assert len(suite.report_seeds) >= 3
        assert suite.reference == "ormo"


def test_the_momentum_may_be_on_the_grid_for_rules_that_have_one_and_rates_are_total_moves_then(tmp_path: Path) -> None:
    text = SUITE.replace("target_accuracy", "momenta = [0.9, 0.5]\ntarget_accuracy").replace("[0.01, 0.001]", "[2, 1]")
    suite = load(tmp_path, text)
    assert [(cell.method, cell.learning_rate, cell.momentum) for cell in suite.grid()[:6]] == [
        ("ormo", 0.5, 0.5),
        ("ormo", 1.0, 0.5),
        ("ormo", 0.1, 0.9),
        ("ormo", 0.2, 0.9),
        ("asgd", 1.0, 0.0),
        ("asgd", 2.0, 0.0),
    ]
    cell = suite.grid()[3]
    assert str(cell.path) == "K4-homogeneous/ormo/rate-0.2-momentum-0.9-seed-0"
    assert cell.point.total_move == 2.0
    assert (suite.settings(cell).learning_rate, suite.settings(cell).momentum) == (0.2, 0.9)


def test_a_momentum_for_all_beside_one_on_the_grid_is_refused(tmp_path: Path) -> None:
    text = SUITE.replace("target_accuracy", "momenta = [0.9]\ntarget_accuracy")
    with pytest.raises(UsageError, match="momentum is on the grid, so it can't be set for all"):
        load(tmp_path, text.replace("batch_size = 4", "batch_size = 4\nmomentum = 0.5"))


def test_machines_may_have_methods_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SUITE.replace("workers = 8", 'workers = 8\nmethods = ["asgd"]'))
    suite = load_suite(str(path))
    assert [(cluster.name, method) for cluster, method in suite.groups()] == [
        ("K4-homogeneous", "ormo"),
        ("K4-homogeneous", "asgd"),
        ("K8-heterogeneous", "asgd"),
    ]
    asgd, ormo = (selection("--suite", str(path), "--methods", method) for method in ("asgd", "ormo"))
    assert [cluster.name for cluster, _ in asgd.groups()] == ["K4-homogeneous", "K8-heterogeneous"]
    assert [cluster.name for cluster, _ in ormo.groups()] == ["K4-homogeneous"]


def test_local_steps_are_compared_with_the_same_samples_for_all() -> None:
    suite = load_suite("local-steps")
    assert {name for name, method in PRESETS.items() if method.is_for_local_steps} | {"fadas"} == set(suite.methods)
    found = {}
    for cell in suite.grid():
        settings = suite.settings(cell)
        assert (settings.stop_after_samples, settings.inner, settings.momentum) == (49_152, "adamw", cell.momentum)
        steps = settings.local_steps * settings.batch_size
        assert settings.stop_after_samples % steps == 0
        assert settings.stop_after_samples / steps / settings.evaluate_every_gradients == 12
        found[cell.cluster] = (settings.slow, settings.local_steps, settings.local_steps_by_speed)
    assert found["K32-unequal-by-speed"] == ("4:10x", 16, True)
    assert [found[f"K8-unequal{h}"][1] for h in ("-h1", "-h4", "", "-h64")] == [1, 4, 16, 64]
    groups = len(list(suite.groups()))
    assert len(suite.grid()) + groups * len(suite.report_seeds) == 616


def test_digits_compares_all_methods_for_gradients_at_both_sizes_in_both_settings() -> None:
    suite = load_suite("digits")
    assert set(suite.methods) == {name for name, method in PRESETS.items() if not method.is_for_local_steps}
    assert [cluster.name for cluster in suite.clusters] == [
        "K16-homogeneous",
        "K16-heterogeneous",
        "K64-homogeneous",
        "K64-heterogeneous",
    ]
    assert [_slow_share(suite, cluster.name) for cluster in suite.clusters] == ["", "1:10x", "", "4:10x"]


def test_the_cnn_takes_eighty_four_runs() -> None:
    suite = load_suite("cifar10-cnn")
    groups = len(list(suite.groups()))
    assert groups == 14
    assert len(suite.grid()) + groups * len(suite.report_seeds) == 84
    settings = suite.settings(suite.grid()[0])
    assert (settings.stop_after_gradients, settings.batch_size, settings.momentum) == (10_000, 32, 0.9)


def test_resnet20_is_at_the_scale_of_the_paper() -> None:
    suite = load_suite("cifar10-resnet20")
    assert sorted(suite.methods) == sorted(PAPERS)
    assert [cluster.workers for cluster in suite.clusters] == [16, 16, 64, 64]
    for cell in suite.grid():
        settings = suite.settings(cell)
        assert (settings.task, settings.device, settings.batch_size) == ("cifar10", "cuda", 64)
        assert (settings.epochs, settings.weight_decay, settings.momentum) == (160, 1e-4, 0.9)
        # 50,000 samples in batches of 64 are 781.25 gradients an epoch.
        assert (settings.milestones, settings.milestone_factor) == ((62_500, 93_750), 0.1)


def _slow_share(suite: Suite, cluster: str) -> str:
    return suite.settings(Cell(cluster, "ormo", 0.01, 0)).slow


def test_the_command_line_chooses_from_a_suite(tmp_path: Path) -> None:
    load(tmp_path, SUITE)
    name = str(tmp_path / "mine.toml")
    assert selection("--suite", name) == load_suite(name)
    assert selection("--suite", name, "--methods", "asgd").methods == ("asgd",)
    assert [cluster.name for cluster in selection("--suite", name, "--workers", "8").clusters] == ["K8-heterogeneous"]
    homogeneous = selection("--suite", name, "--setting", "homogeneous")
    assert [cluster.name for cluster in homogeneous.clusters] == ["K4-homogeneous"]
    assert selection("--suite", name, "--seeds", "7,8").report_seeds == (7, 8)
    short = selection("--suite", name, "--gradients", "7", "--device", "meta", "--data-dir", "here")
    for cell in short.grid():
        settings = short.settings(cell)
        assert (settings.stop_after_gradients, settings.device) == (7, "meta")
        assert settings.data_dir == Path.cwd() / "here"
    rates = selection("--suite", name, "--learning-rates", "3,2")
    assert {cell.learning_rate for cell in rates.grid()} == {2, 3}


def test_fewer_gradients_replace_the_epochs() -> None:
    short = selection("--suite", "cifar10-resnet20", "--gradients", "100")
    settings = short.settings(short.grid()[0])
    assert (settings.epochs, settings.stop_after_gradients) == (None, 100)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--methods", "adam"], "--methods adam: the suite does not have it: choose from ormo, asgd"),
        (["--methods", "smega2"], "--methods smega2: the suite does not have it"),
        (["--workers", "5"], "--workers 5: the suite does not have it: choose from 4, 8"),
        (["--setting", "odd"], "--setting odd: the suite does not have it: choose from homogeneous, heterogeneous"),
        (["--workers", "4", "--setting", "heterogeneous"], "no machines that match both --workers and --setting"),
        (["--seeds", "0"], "seed 0 chooses the rates"),
        (["--learning-rates", "-1"], "learning_rates.0 is -1.0: input should be greater than 0"),
    ],
)
def test_a_choice_that_a_suite_does_not_have_is_refused(tmp_path: Path, flags: list[str], sentence: str) -> None:
    load(tmp_path, SUITE)
    with pytest.raises(UsageError) as refused:
        selection("--suite", str(tmp_path / "mine.toml"), *flags)
    assert sentence in str(refused.value)
