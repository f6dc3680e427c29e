"""A module's manifest: which tensors the server keeps, under which names."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.two_tensor import TwoTensor

from ormo_protos.manifest import (
    AVERAGE,
    BFLOAT16,
    BUFFER,
    FLOAT32,
    FLOAT64,
    FROZEN,
    INT64,
    LAST,
    MAXIMUM,
    PARAMETER,
    UNSPECIFIED,
)
from ormo_worker.errors import ModelUnusable
from ormo_worker.pytorch.module import ModelTensors, manifest_of
from worker.models import Tied

Wrap = Callable[[nn.Module], nn.Module]

TENSORS = """
    embedding.weight          parameter float32  4,3
    norm.weight               parameter float32  4
    norm.bias                 parameter float32  4
    head.weight               parameter float32  4,3  = embedding.weight
    frozen.weight             frozen    float32  4,4
    frozen.bias               frozen    float32  4
    mask                      buffer    int64    2    last
    f16                       buffer    float32  1    last
    f64                       buffer    float64  1    last
    small                     buffer    int64    1    last
    norm.running_mean         buffer    float32  4    average
    norm.running_var          buffer    float32  4    average
    norm.num_batches_tracked  buffer    int64    -    maximum
"""


def test_the_manifest_lists_the_state_dict_parameters_first_and_frozen_ones_next() -> None:
    rows = [line.split() for line in TENSORS.strip().splitlines()]
    roles = {PARAMETER: "parameter", FROZEN: "frozen", BUFFER: "buffer"}
    dtypes = {FLOAT32: "float32", INT64: "int64", BFLOAT16: "bfloat16", FLOAT64: "float64"}
    merges = {UNSPECIFIED: [], AVERAGE: ["average"], MAXIMUM: ["maximum"], LAST: ["last"]}
    manifest = manifest_of(Tied())
    for row, spec in zip(rows, manifest.tensors, strict=True):
        shape = ",".join(map(str, spec.shape)) or "-"
        alias = ["=", spec.alias_of] if spec.alias_of else []
        assert row == [spec.name, roles[spec.role], dtypes[spec.dtype], shape, *merges[spec.merge], *alias]
    assert {spec.name for spec in manifest.tensors} == set(Tied().state_dict())


def test_a_tied_weight_is_counted_once() -> None:
    tensors = ModelTensors(Tied())
    assert tensors.manifest.sizes == {"parameters": 12 + 4 + 4, "frozen": 16 + 4, "float_buffers": 9, "int_buffers": 5}
    assert (len(tensors.parameters), len(tensors.frozen)) == (3, 2)


def test_a_tied_weight_is_frozen_under_all_its_names() -> None:
    model = Tied()
    model.embedding.weight.requires_grad_(False)
    manifest = manifest_of(model)
    assert {spec.name for spec in manifest.tensors if spec.role == FROZEN} == {
        "embedding.weight",
        "head.weight",
        "frozen.weight",
        "frozen.bias",
    }
    assert manifest.sizes["frozen"] == 12 + 16 + 4


def test_a_module_that_is_used_twice_is_an_alias() -> None:
    shared = nn.BatchNorm1d(2)
    aliases = {spec.name: spec.alias_of for spec in manifest_of(nn.Sequential(shared, shared)).tensors}
    assert aliases["1.weight"] == "0.weight"
    assert aliases["1.running_mean"] == "0.running_mean"
    assert aliases["0.weight"] == ""


def test_bfloat16_parameters_keep_their_dtype() -> None:
    (weight, _) = manifest_of(nn.Linear(1, 1).to(torch.bfloat16)).tensors
    assert weight.dtype == BFLOAT16


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def distributed(model: nn.Module) -> nn.Module:
    """As DistributedDataParallel, which can't be made without a process group."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


WRAPPED = [
    compiled,
    nn.DataParallel,
    distributed,
    lambda model: compiled(distributed(model)),
    lambda model: distributed(compiled(model)),
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_model_or_a_part_of_it_that_is_wrapped_has_the_names_of_the_plain_one(wrap: Wrap) -> None:
    plain = nn.BatchNorm1d(2)
    assert manifest_of(wrap(plain)).digest == manifest_of(plain).digest
    assert manifest_of(nn.Sequential(wrap(plain), plain)).digest == manifest_of(nn.Sequential(plain, plain)).digest


def test_a_wrappers_name_is_kept_where_it_is_a_modules_own() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.other = nn.Linear(1, 1), nn.Linear(1, 1)

    class Averaged(nn.DataParallel):
        def __init__(self) -> None:
            super().__init__(nn.Linear(1, 1))
            self.register_buffer("bias", torch.zeros(1))

    assert manifest_of(Named()).tensors[0].name == "module.weight"
    assert {spec.name for spec in manifest_of(Averaged()).tensors} == {"module.weight", "module.bias", "bias"}


def test_names_are_those_that_the_models_state_dict_hooks_give() -> None:
    def renamed(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, local: Any) -> None:
        state["net.running_mean"] = state.pop("running_mean")
        state["weight.of.it"] = state.pop("weight")

    model = nn.BatchNorm1d(2)
    model.register_state_dict_post_hook(renamed)
    tensors = ModelTensors(model)
    assert {"net.running_mean", "weight.of.it"} < {spec.name for spec in tensors.manifest.tensors}
    model.running_mean = torch.ones(2)
    assert any(buffer is model.running_mean for buffer in tensors.float_buffers)
    assert any(parameter is model.weight for parameter in tensors.parameters)


MEMORY = torch.zeros(6, 4)
IN_ONE_MEMORY = [
    (MEMORY[:4], MEMORY[3:], True),
    (MEMORY[:, :3], MEMORY[:, 2:], True),
    (MEMORY, MEMORY[2, 1:3], True),
    (MEMORY[1], MEMORY.t(), True),
    (MEMORY.view(torch.bfloat16)[0, :3], MEMORY[0, 1:], True),
    (MEMORY[:3], MEMORY[3:], False),
    (MEMORY[:, :2], MEMORY[:, 2:], False),
    (MEMORY[::2], MEMORY[1::2], False),
    (MEMORY.view(torch.bfloat16)[0, :2], MEMORY[0, 1:], False),
    (MEMORY[2:2], MEMORY, False),
]


@pytest.mark.parametrize(("first", "second", "shared"), IN_ONE_MEMORY)
@pytest.mark.parametrize("turned", [False, True])
def test_two_tensors_that_share_a_byte_are_refused_and_no_others(
    first: torch.Tensor, second: torch.Tensor, shared: bool, turned: bool
) -> None:
    model = nn.Linear(1, 1)
    model.weight, model.bias = (nn.Parameter(each) for each in ((second, first) if turned else (first, second)))
    if not shared:
        manifest_of(model)
        return
    with pytest.raises(ModelUnusable, match="'bias' and 'weight' are two tensors in the same memory, at least in part"):
        manifest_of(model)


def test_buffers_are_found_again_after_the_module_has_replaced_them() -> None:
    model = Tied()
    tensors = ModelTensors(model)
    model.f16 = torch.tensor([9.0], dtype=torch.float16)
    assert tensors.float_buffers[0] is model.f16


MERGES = [
    ("running_mean", torch.zeros(1), AVERAGE),
    ("inner.running_var", torch.zeros(1, dtype=torch.float64), AVERAGE),
    ("running_mean", torch.zeros(1, dtype=torch.int64), LAST),  # no statistic
    ("num_batches_tracked", torch.zeros((), dtype=torch.int32), MAXIMUM),
    ("num_batches_tracked", torch.zeros(()), LAST),  # no counter
    ("my_running_mean", torch.zeros(1), LAST),
    ("running_mean.pointer", torch.zeros(1, dtype=torch.int64), LAST),
]


@pytest.mark.parametrize(("name", "tensor", "merge"), MERGES)
def test_the_last_part_of_a_buffers_name_says_how_it_is_merged(name: str, tensor: torch.Tensor, merge: int) -> None:
    model = nn.Linear(1, 1)
    *path, last = name.split(".")
    owner: nn.Module = model
    for part in path:
        owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.register_buffer(last, tensor)
    assert manifest_of(model).tensors[-1].merge == merge


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_buffer("held", tensor)
    return model


BECOMES = [
    (lambda model: setattr(model, "held", torch.zeros(3)), "has become torch.float32 of shape (3,)"),
    (lambda model: setattr(model, "held", torch.zeros(())), "has become torch.float32 of shape ()"),
    (lambda model: model.held.resize_(5), "has become torch.float32 of shape (5,)"),
    (lambda model: setattr(model, "held", torch.zeros(2).double()), "has become torch.float64 of shape (2,)"),
    (lambda model: model.to(torch.bfloat16), "has become torch.bfloat16 of shape (2,)"),
    (lambda model: setattr(model, "held", torch.zeros(2).to_sparse()), "has become torch.sparse_coo"),
    (lambda model: setattr(model, "held", torch.zeros(1).expand(2)), "is a view with several elements"),
    (lambda model: setattr(model, "held", None), "is no longer a tensor"),
    (lambda model: delattr(model, "held"), "is no longer a tensor"),
]


@pytest.mark.parametrize(("change", "sentence"), BECOMES)
def test_a_buffer_that_is_not_what_it_was_gets_a_sentence_with_its_name(
    change: Callable[[nn.Module], object], sentence: str
) -> None:
    model = with_buffer(torch.zeros(2))
    tensors = ModelTensors(model)
    change(model)
    with pytest.raises(ModelUnusable) as caught:
        _ = tensors.float_buffers
    assert f"the buffer 'held' {sentence}" in str(caught.value)


def test_the_bits_of_float64_are_read_and_written_in_its_place_also_where_it_is_a_column() -> None:
    model = with_buffer(torch.arange(6, dtype=torch.float64).view(3, 2)[:, 1])
    (seen,) = ModelTensors(model).int_buffers
    assert seen.view(torch.float64).tolist() == [1.0, 3.0, 5.0]
    seen.copy_(torch.tensor([1 + 1e-12, -math.inf, -0.0], dtype=torch.float64).view(torch.int64))
    assert model.held.tolist() == [1 + 1e-12, -math.inf, -0.0]


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


def with_hidden_parameter() -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.pop("bias") and None)
    return model


def with_shared_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.data = model[0].weight.data
    return model


def with_expanded(name: str) -> nn.Module:
    model = nn.BatchNorm1d(3)
    expanded = torch.zeros(1).expand(3)
    setattr(model, name, nn.Parameter(expanded) if name == "weight" else expanded)
    return model


def sharded() -> nn.Module:
    """As `fully_shard` does, which can't be called without a process group: by a class of the module's own."""
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    return model


def with_tensor_of_tensors() -> nn.Module:
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(1, 1), torch.zeros(1, 1)))
    return model


def with_complex_buffer() -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_buffer("phase", torch.zeros(1, dtype=torch.complex64))
    return model


UNUSABLE = [
    (lambda: nn.Linear(1, 1).double(), "the parameter 'weight' is torch.float64, but parameters must be"),
    (lambda: nn.Linear(1, 1).half(), "the parameter 'weight' is torch.float16"),
    (lambda: WithExtraState(1, 1), "has '_extra_state', which is neither a parameter nor a buffer"),
    (with_hidden_parameter, "the parameter 'bias' is not in the model's state_dict"),
    (with_shared_memory, "'1.weight' and '0.weight' are two tensors in the same memory"),
    (lambda: with_expanded("weight"), "the tensor 'weight' has several elements in the same place"),
    (lambda: with_expanded("running_mean"), "the tensor 'running_mean' has several elements in the same place"),
    (sharded, "the module '0' is sharded by FSDP"),
    (with_tensor_of_tensors, "the tensor 'weight' is a TwoTensor, which only stands for its values"),
    (with_complex_buffer, "the buffer 'phase' is torch.complex64"),
    (lambda: with_buffer(torch.zeros(2, 2).to_sparse()), "the tensor 'held' is torch.sparse_coo"),
    (lambda: nn.LazyLinear(1), "the tensor 'weight' has no shape yet: run one batch"),
    (lambda: nn.Linear(1, 1, device="meta"), "the tensor 'weight' is on the meta device"),
    (nn.Flatten, "a model has 1 to"),
    (lambda: nn.BatchNorm1d(3, affine=False), "no trainable tensor"),
    (lambda: nn.Linear(1, 1).requires_grad_(False), "all parameters of the model are frozen (requires_grad=False, or"),
]


@pytest.mark.parametrize(("make", "sentence"), UNUSABLE)
def test_a_model_that_cannot_be_trained_gets_one_sentence(make: type[nn.Module], sentence: str) -> None:
    with pytest.raises(ModelUnusable) as caught:
        manifest_of(make())
    assert sentence in str(caught.value)
