"""What a program sets as PyTorch's default device or dtype is for its own tensors: ours say where and what they are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[2]
# Of the makers of tensors, those that ask for the default device.
MAKERS = {maker.__name__ for maker in _device_constructors()}
# Those whose dtype is not said by their arguments.
OF_THE_DEFAULT_DTYPE = {"empty", "full", "linspace", "logspace", "ones", "rand", "randn", "scalar_tensor", "zeros"}


def unnamed(source: str) -> Iterator[tuple[int, str]]:
    """Lines where a tensor is made without its device, or its dtype."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        maker, named = node.func.attr, {keyword.arg for keyword in node.keywords}
        if maker in MAKERS and "device" not in named:
            yield node.lineno, f"{maker} without device"
        if maker in OF_THE_DEFAULT_DTYPE and "dtype" not in named:
            yield node.lineno, f"{maker} without dtype"
        if maker == "Generator" and not node.args:
            yield node.lineno, "Generator without device"


@pytest.mark.parametrize("package", ["protos", "server", "worker"])
def test_every_tensor_of_ours_has_its_device_and_dtype_named(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, what in unnamed(path.read_text())
    ]
    assert found == []


LINES = [
    ("torch.zeros(3)", ["zeros without device", "zeros without dtype"]),
    ('torch.zeros(3, dtype=torch.int64, device="cpu")', []),
    ("torch.randperm(3, generator=random)", ["randperm without device"]),
    ("torch.Generator().manual_seed(3)", ["Generator without device"]),
    ("torch.zeros_like(other)", []),
]


@pytest.mark.parametrize(("line", "found"), LINES)
def test_a_tensor_that_leaves_them_to_the_default_is_found(line: str, found: list[str]) -> None:
    assert [what for _, what in unnamed(line)] == found


def test_the_makers_are_known() -> None:
    assert {"empty", "tensor", "arange", "randperm", "randint"} <= MAKERS
    assert {name for name in OF_THE_DEFAULT_DTYPE if getattr(torch, name, None)} == OF_THE_DEFAULT_DTYPE
