"""A module's manifest: which tensors the server keeps, under which names."""

import pytest
import torch
from torch import nn

from ormo_protos.manifest import (
    AVERAGE,
    BFLOAT16,
    BUFFER,
    FLOAT32,
    FLOAT64,
    INT64,
    LAST,
    MAXIMUM,
    PARAMETER,
    UNSPECIFIED,
)
from ormo_worker.errors import ModelUnusable
from ormo_worker.module import ModelTensors, manifest_of
from worker.models import Tied

TENSORS = """
    embedding.weight          parameter float32  4,3
    norm.weight               parameter float32  4
    norm.bias                 parameter float32  4
    frozen.weight             parameter float32  4,4
    frozen.bias               parameter float32  4
    head.weight               parameter float32  4,3  = embedding.weight
    mask                      buffer    int64    2    last
    f16                       buffer    float32  1    last
    f64                       buffer    float64  1    last
    small                     buffer    int64    1    last
    norm.running_mean         buffer    float32  4    average
    norm.running_var          buffer    float32  4    average
    norm.num_batches_tracked  buffer    int64    -    maximum
"""


def test_the_manifest_lists_the_state_dict_parameters_first() -> None:
    rows = [line.split() for line in TENSORS.strip().splitlines()]
    roles = {PARAMETER: "parameter", BUFFER: "buffer"}
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
    sizes = {"parameters": 12 + 4 + 4 + 16 + 4, "float_buffers": 9, "int_buffers": 5}
    assert {name: tensors.manifest.sizes[name] for name in sizes} == sizes
    assert len(tensors.parameters) == 5


def test_a_module_that_is_used_twice_is_an_alias() -> None:
    shared = nn.BatchNorm1d(2)
    aliases = {spec.name: spec.alias_of for spec in manifest_of(nn.Sequential(shared, shared)).tensors}
    assert aliases["1.weight"] == "0.weight"
    assert aliases["1.running_mean"] == "0.running_mean"
    assert aliases["0.weight"] == ""


def test_bfloat16_parameters_keep_their_dtype() -> None:
    (weight, _) = manifest_of(nn.Linear(1, 1).to(torch.bfloat16)).tensors
    assert weight.dtype == BFLOAT16


def test_a_compiled_module_has_the_names_of_the_plain_one() -> None:
    model = nn.Linear(2, 2)
    assert manifest_of(torch.compile(model, backend="eager")).digest == manifest_of(model).digest


def test_buffers_are_found_again_after_the_module_has_replaced_them() -> None:
    model = Tied()
    tensors = ModelTensors(model)
    model.f16 = torch.tensor([9.0], dtype=torch.float16)
    assert tensors.float_buffers[0] is model.f16


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
    (with_complex_buffer, "the buffer 'phase' is torch.complex64"),
    (lambda: nn.LazyLinear(1), "the tensor 'weight' has no shape yet: run one batch"),
    (lambda: nn.Linear(1, 1, device="meta"), "the tensor 'weight' is on the meta device"),
    (nn.Flatten, "a model has 1 to"),
    (lambda: nn.BatchNorm1d(3, affine=False), "no trainable tensor"),
]


@pytest.mark.parametrize(("make", "sentence"), UNUSABLE)
def test_a_model_that_cannot_be_trained_gets_one_sentence(make: type[nn.Module], sentence: str) -> None:
    with pytest.raises(ModelUnusable) as caught:
        manifest_of(make())
    assert sentence in str(caught.value)
