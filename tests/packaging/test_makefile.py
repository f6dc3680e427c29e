"""What the Makefile's words do, by the commands that `make` would run."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")
# Of a make that runs the tests, which would take this one for its own child.
OURS = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "FLAGS")}


def would(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Where nothing is installed yet."""
    command = [str(MAKE), "--dry-run", f"VENV={folder}/venv", f"PROTO_TOOLS={folder}/protos", *words]
    return subprocess.run(command, cwd=ROOT, env=OURS, capture_output=True, text=True, check=False)


def installed(commands: str) -> list[str]:
    return re.findall(r"pip install .* -e '\.\[(.*)\]'", commands)


RUNNING = "server,worker,vision,sim"


@pytest.mark.parametrize("word", ["install", "train", "reproduce"])
def test_a_user_gets_what_running_needs_and_a_line_that_says_so(tmp_path: Path, word: str) -> None:
    commands = would(word, folder=tmp_path).stdout
    assert installed(commands) == [RUNNING]
    assert commands.startswith(f'echo "Installing into {tmp_path}/venv what training needs: a few minutes')


@pytest.mark.parametrize(
    "word",
    ["test", "lint", "types", "chaos", "bench", "readme", "dashboards", "test-images", "test-ray", "test-cluster"],
)
def test_what_tests_and_checks_need_comes_with_them(tmp_path: Path, word: str) -> None:
    commands = would(word, folder=tmp_path).stdout
    assert installed(commands)[:2] == [RUNNING, f"{RUNNING},dev,deploy"]
    assert commands.count('echo "Installing') == 2


def test_containers_are_run_where_all_that_they_start_ends_with_the_command(tmp_path: Path) -> None:
    fetch, *run = would("test-containers", f"CONTAINERS={tmp_path}", folder=tmp_path).stdout.splitlines()[-3:]
    assert fetch == f"{tmp_path}/venv/bin/python tests/deploy/platforms/trees.py {tmp_path}"
    words = shlex.split("\n".join(run))
    assert words[:2] == [f"ORMO_CONTAINERS={tmp_path}", "unshare"]
    assert {"--net", "--pid", "--kill-child"} <= set(words)
    assert words[-2:] == ["pytest", "tests/deploy/platforms"]


def test_check_is_lint_drift_types_and_test_in_this_order(tmp_path: Path) -> None:
    commands = would("check", folder=tmp_path).stdout
    marks = [commands.index(mark) for mark in ("ruff check", "build/protos &&", "bin/mypy", "pytest --dist")]
    assert marks == sorted(marks)


BENCHES = {
    "trips": "benchmarks.round_trips",
    "scale": "scale.py",
    "links": "links.py",
    "soak": "soak.py",
    "memory": "memory.py",
    "sim": "sim_overhead.py",
    "metrics": "metrics_cost.py",
}


@pytest.mark.parametrize("what", BENCHES)
def test_each_bench_measures_what_it_is_named_after(tmp_path: Path, what: str) -> None:
    last = would("bench", f"WHAT={what}", "FLAGS=--some 1", folder=tmp_path).stdout.splitlines()[-1]
    assert BENCHES[what] in last
    assert last.endswith(" --some 1")


def test_bench_says_what_there_is_to_measure(tmp_path: Path) -> None:
    done = would("bench", "WHAT=nothing", folder=tmp_path)
    assert done.returncode == 2
    assert f"there is no WHAT=nothing: use one of {' '.join(BENCHES)}" in done.stderr


@pytest.mark.parametrize(
    ("word", "now"), [("soak", ["soak"]), ("scale", ["scale"]), ("links", ["links"]), ("benchmark", ["sim", "metrics"])]
)
def test_an_old_word_says_the_new_one_and_does_the_same(tmp_path: Path, word: str, now: list[str]) -> None:
    commands = would(word, "FLAGS=--some 1", folder=tmp_path).stdout
    assert rf"make {word}\` goes with the next release: type \`make bench WHAT={now[0]}\`" in commands
    for what in now:
        assert re.search(rf"{re.escape(BENCHES[what])} --some 1$", commands, re.MULTILINE)


def test_others_libraries_are_installed_beside_the_same_torch_and_not_for_other_tests(tmp_path: Path) -> None:
    commands = would("test-integrations", f"INTEGRATIONS={tmp_path}/integrations", folder=tmp_path).stdout
    assert installed(commands)[-1] == f"{RUNNING},dev,integrations"
    assert commands.index("cp --archive --link") < commands.index("dev,integrations]")
    assert commands.rstrip().endswith("tests/integrations")
    assert "integrations" not in would("test", folder=tmp_path).stdout


@pytest.mark.parametrize("end", ["lowest", "newest"])
def test_what_stands_on_others_versions_is_tested_with_both_ends_of_them(tmp_path: Path, end: str) -> None:
    commands = would(f"test-{end}", folder=tmp_path).stdout
    assert f"-c constraints-{end}.txt -e '.[{RUNNING},dev]'" in commands
    tested = shlex.split(commands.splitlines()[-1].split("worksteal ")[1])
    left_out = [word.removeprefix("--ignore-glob=") for word in tested if word.startswith("--ignore-glob=")]
    chosen = [word.partition("::") for word in tested if not word.startswith("--")]
    assert len(left_out) + len(chosen) == len(tested)
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")]
    assert [glob for glob in left_out if not fnmatch.filter(files, glob)] == []
    assert [path for path, _, _ in chosen if not (ROOT / path).exists()] == []
    assert [name for path, _, name in chosen if name and f"def {name}(" not in (ROOT / path).read_text()] == []
    paths = {path for path, _, _ in chosen}
    assert {f"tests/{part}" for part in ("protos", "journal", "store", "worker")} <= paths
    assert {f"tests/service/test_{part}.py" for part in ("exchanges", "refusals", "metrics")} <= paths
    assert "tests/system/test_training.py" in paths
