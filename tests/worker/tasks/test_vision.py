import importlib
import subprocess
import sys
from types import ModuleType

import pytest

from ormo_worker.tasks import TaskError
from ormo_worker.tasks.images import import_torchvision


def test_torchvision_can_be_imported_beside_a_cpu_build_of_torch() -> None:
    torchvision = import_torchvision()
    assert torchvision is sys.modules["torchvision"] is import_torchvision()
    assert torchvision.datasets.ImageFolder


def test_missing_torchvision_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(TaskError) as refused:
        import_torchvision()
    assert str(refused.value).startswith("this task needs torchvision, which can't be imported (")
    assert str(refused.value).endswith("): run pip install 'ormo-parameter-server[vision]'")


def test_another_failure_of_torchvision_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("something else")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision()


def test_a_task_without_images_in_files_does_not_import_torchvision() -> None:
    check = "import sys; from ormo_worker.tasks import load_task; load_task('digits'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout.split()
