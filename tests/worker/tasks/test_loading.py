"""How a name becomes a task, and what a user reads when it does not."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ormo_worker.tasks import TaskError, load_task
from ormo_worker.tasks.digits import Digits

OWN_TASK = """
from ormo_worker.tasks.digits import Digits

class Mine(Digits):
    pass

class Duck:
    def __init__(self, data_dir): self.data_dir = data_dir
    build_model = train_set = test_set = loss = score = weight_decay_scale = lambda self: None

class Unfinished(Digits):
    score = None

def made(data_dir):
    return Mine(data_dir=data_dir)

def nothing(data_dir):
    return None

def demanding(data_dir, size):
    return Mine(data_dir=data_dir)

instance = Mine()
"""


@pytest.fixture(autouse=True)
def _imports_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty current directory, and leave no trace in the import system."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(file: Path, text: str = OWN_TASK) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def refusal(name: str) -> str:
    with pytest.raises(TaskError) as refused:
        load_task(name)
    return str(refused.value)


def test_a_built_in_task_has_a_short_name() -> None:
    assert isinstance(load_task("digits"), Digits)


def test_a_module_in_the_current_directory_is_importable(tmp_path: Path) -> None:
    write(tmp_path / "package_here" / "mine.py")
    task = load_task("package_here.mine:Mine", Path("some/data"))
    assert isinstance(task, Digits)
    assert task.data_dir == Path("some/data")


def test_a_function_can_make_the_task(tmp_path: Path) -> None:
    write(tmp_path / "mine_by_function.py")
    assert isinstance(load_task("mine_by_function:made"), Digits)


def test_any_class_with_the_methods_of_a_task_is_one(tmp_path: Path) -> None:
    write(tmp_path / "mine_duck.py")
    assert type(load_task("mine_duck:Duck")).__name__ == "Duck"


def test_a_file_is_named_by_its_path_and_may_import_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "experiments" / "neighbour_of_mine.py")
    write(tmp_path / "experiments" / "mine_in_file.py", "from neighbour_of_mine import Mine")
    assert isinstance(load_task("experiments/mine_in_file.py:Mine"), Digits)


@pytest.mark.parametrize("name", ["mnist", "module:", ":Task", ""])
def test_an_unknown_task_lists_the_built_in_ones_and_the_form_of_an_import_path(name: str) -> None:
    assert refusal(name) == (
        f"there is no task named {name!r}: use one of digits, code-lm, cifar10, image-folder, image-folder-cnn, or the "
        "import path of your own, as in 'package.module:MyTask' or 'path/to/file.py:MyTask'"
    )


def test_a_module_that_is_not_found_says_where_to_start_the_worker() -> None:
    assert refusal("no_such_package.tasks:Mine") == (
        "the task 'no_such_package.tasks:Mine' can't be imported (No module named 'no_such_package'): start "
        "the worker in the folder that 'no_such_package' is in, or install what is missing"
    )


def test_a_module_whose_own_import_fails_names_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "mine_needs.py", "import no_such_dependency")
    assert "(No module named 'no_such_dependency')" in refusal("mine_needs:Mine")


def test_an_error_in_a_users_module_keeps_its_traceback(tmp_path: Path) -> None:
    write(tmp_path / "mine_broken.py", "1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_task("mine_broken:Mine")


def test_a_missing_attribute_is_named_with_its_module(tmp_path: Path) -> None:
    file = write(tmp_path / "mine_attribute.py")
    assert refusal("mine_attribute:Yours") == (
        f"the task 'mine_attribute:Yours' was not found: its module ({file}) has no 'Yours': put the "
        "name of a Task class, or of a function that returns a task, after the colon"
    )


def test_a_file_that_does_not_exist_is_named_in_full(tmp_path: Path) -> None:
    assert refusal("nowhere/mine.py:Mine") == (
        f"the task 'nowhere/mine.py:Mine' names the file {tmp_path}/nowhere/mine.py, which does not exist: "
        f"correct the path, which starts from {tmp_path}"
    )


def test_a_file_with_the_name_of_another_module_has_to_be_renamed(tmp_path: Path) -> None:
    write(tmp_path / "json.py")
    message = refusal("json.py:Mine")
    assert "because Python already has another module 'json' (" in message
    assert message.endswith("): rename the file")


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [("demanding", "missing a required argument: 'size'"), ("instance", " is not a callable object")],
)
def test_what_cannot_be_called_with_a_data_folder_alone_is_refused(tmp_path: Path, attribute: str, reason: str) -> None:
    write(tmp_path / f"mine_{attribute}.py")
    message = refusal(f"mine_{attribute}:{attribute}")
    assert message.startswith(f"the task 'mine_{attribute}:{attribute}' can't be created (")
    assert message.endswith(
        f"{reason}): it must be a class or function whose only required "
        "argument is the keyword data_dir, a Path or None"
    )


@pytest.mark.parametrize(
    ("attribute", "missing"),
    [
        ("Task", "build_model, loss, score, test_set, train_set"),
        ("Unfinished", "score"),
        ("nothing", "build_model, train_set, test_set, loss, score, weight_decay_scale"),
    ],
)
def test_what_is_no_whole_task_is_told_what_it_lacks(tmp_path: Path, attribute: str, missing: str) -> None:
    write(tmp_path / f"lacking_{attribute}.py", OWN_TASK + "\nfrom ormo_worker.tasks import Task")
    assert refusal(f"lacking_{attribute}:{attribute}") == (
        f"the task 'lacking_{attribute}:{attribute}' lacks {missing}: a task is a subclass of "
        "ormo_worker.tasks.Task, or has the methods build_model, train_set, test_set, loss, score, "
        "weight_decay_scale"
    )
