"""What server and workers must agree on: the manifest's layout, its digest, and each way in which it can be wrong."""

import dataclasses
import hashlib
import itertools
import json

import pytest

from ormo_protos.limits import MAX_DIMENSIONS, MAX_ELEMENTS, MAX_NAME_BYTES, MAX_PART_BYTES, MAX_TENSORS
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
    Manifest,
    ManifestError,
    TensorSpec,
)
from ormo_protos.tensors import PayloadLayout
from ormo_protos.v1 import parameter_server_pb2 as pb

WEIGHT = TensorSpec("weight", (2, 3), FLOAT32, PARAMETER)
BIAS = TensorSpec("bias", (3,), BFLOAT16, PARAMETER)
MEAN = TensorSpec("mean", (3,), FLOAT32, BUFFER)
COUNT = TensorSpec("count", (), INT64, BUFFER)
TIED = TensorSpec("tied", (2, 3), FLOAT32, PARAMETER, alias_of="weight")
MODEL = Manifest.laid_out([WEIGHT, MEAN, BIAS, COUNT, TIED])

# The text that parameter_server.proto documents: name, shape, dtype, role, offset, alias_of; parameters first.
MODEL_TEXT = (
    "weight\t2,3\t1\t1\t0\t\n"
    "bias\t3\t2\t1\t6\t\n"
    "tied\t2,3\t1\t1\t0\tweight\n"
    "mean\t3\t1\t2\t0\t\n"
    "count\t\t3\t2\t0\t\n"
)  # fmt: skip
# Once and for all: workers and checkpoints of other versions hold it. sha256sum of the text above.
MODEL_DIGEST = "7a1da3c390cc59f04c56320f6cc0f228d659bead894ec8ddcf6799f76cc44477"


def test_parameters_come_first_and_each_section_is_dense() -> None:
    layout = {spec.name: (spec.section, spec.offset) for spec in MODEL.tensors}
    assert layout == {
        "weight": ("parameters", 0),
        "bias": ("parameters", 6),
        "tied": ("parameters", 0),
        "mean": ("float_buffers", 0),
        "count": ("int_buffers", 0),
    }
    assert list(layout) == ["weight", "bias", "tied", "mean", "count"]


def test_aliases_take_no_room() -> None:
    assert MODEL.sizes == {"parameters": 9, "float_buffers": 3, "int_buffers": 1, "frozen": 0}


def test_floating_buffers_of_either_width_share_a_section_and_integers_have_their_own() -> None:
    model = Manifest.laid_out([WEIGHT, COUNT, MEAN, dataclasses.replace(MEAN, name="var", dtype=BFLOAT16)])
    assert [(t.name, t.section, t.offset) for t in model.tensors[1:]] == [
        ("count", "int_buffers", 0),
        ("mean", "float_buffers", 0),
        ("var", "float_buffers", 3),
    ]


def test_the_digest_is_the_sha256_of_the_documented_text() -> None:
    assert MODEL.digest == hashlib.sha256(MODEL_TEXT.encode()).digest()


def test_the_digest_is_the_one_that_it_has_always_been() -> None:
    assert MODEL.digest.hex() == MODEL_DIGEST


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Weight"},
        {"shape": (3, 2)},
        {"dtype": BFLOAT16},
        {"role": FROZEN},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_change_of_a_tensor_changes_the_digest(change: dict[str, object]) -> None:
    changed = Manifest.laid_out([dataclasses.replace(WEIGHT, **change), BIAS])
    assert changed.digest != Manifest.laid_out([WEIGHT, BIAS]).digest


def test_the_order_of_the_tensors_counts() -> None:
    same_size = dataclasses.replace(WEIGHT, name="other")
    assert Manifest.laid_out([WEIGHT, same_size]).digest != Manifest.laid_out([same_size, WEIGHT]).digest


def test_a_manifest_goes_over_the_wire_and_back() -> None:
    assert Manifest.from_message(pb.Manifest.FromString(MODEL.to_message().SerializeToString())) == MODEL


def test_a_manifest_goes_through_json_and_back() -> None:
    assert Manifest.from_json(json.loads(json.dumps(MODEL.to_json()))) == MODEL


def test_how_a_buffer_is_merged_is_in_its_line_of_the_digests_text() -> None:
    model = Manifest.laid_out(
        [WEIGHT, dataclasses.replace(MEAN, merge=AVERAGE), dataclasses.replace(COUNT, merge=LAST)]
    )
    text = "weight\t2,3\t1\t1\t0\t\nmean\t3\t1\t2\t0\t\t1\ncount\t\t3\t2\t0\t\t3\n"
    assert model.digest == hashlib.sha256(text.encode()).digest()
    assert Manifest.from_json(json.loads(json.dumps(model.to_json()))) == model
    assert Manifest.from_message(model.to_message()) == model


def test_where_nothing_says_how_buffers_are_merged_older_programs_can_read_the_json() -> None:
    assert {key for row in MODEL.to_json() for key in row} == {"name", "shape", "dtype", "role", "offset", "alias_of"}


def test_the_models_digest_is_the_same_in_every_precision_and_however_buffers_are_merged() -> None:
    def made(dtype: pb.Dtype.ValueType, merge: pb.Merge.ValueType) -> Manifest:
        parameters = (dataclasses.replace(each, dtype=dtype) for each in (WEIGHT, BIAS))
        return Manifest.laid_out([*parameters, dataclasses.replace(MEAN, dtype=dtype, merge=merge)])

    plain = made(FLOAT32, UNSPECIFIED)
    for other in (made(BFLOAT16, AVERAGE), made(BFLOAT16, UNSPECIFIED), made(FLOAT32, LAST)):
        assert other.model_digest == plain.model_digest == plain.digest != other.digest
        assert other.differences(plain) == []
        assert {other.digest, plain.digest, other.without_merges.digest} == other.digests


def test_frozen_tensors_come_between_parameters_and_buffers_and_have_a_section_of_their_own() -> None:
    model = Manifest.laid_out([spec(name="base", role=FROZEN, dtype=BFLOAT16), COUNT, WEIGHT])
    assert [(t.name, t.section, t.offset) for t in model.tensors] == [
        ("weight", "parameters", 0),
        ("base", "frozen", 0),
        ("count", "int_buffers", 0),
    ]
    assert model.newer is not None
    assert model.newer.name == "base"
    assert model.differences(Manifest.laid_out([spec(name="base"), COUNT, WEIGHT])) == [
        "'base' is a bfloat16 frozen parameter of shape (2, 3) here and a float32 parameter of shape (2, 3) there"
    ]


def test_float64_buffers_lie_with_the_integers_of_the_same_size() -> None:
    model = Manifest.laid_out([WEIGHT, COUNT, dataclasses.replace(MEAN, dtype=FLOAT64)])
    assert [(t.name, t.section, t.offset) for t in model.tensors[1:]] == [
        ("count", "int_buffers", 0),
        ("mean", "int_buffers", 1),
    ]


def test_a_manifest_goes_over_the_wire_in_as_many_messages_as_it_needs() -> None:
    large = Manifest.laid_out(spec(name=f"{'e' * 500}{number}", shape=()) for number in range(10_000))
    parts = [pb.Manifest.FromString(part.SerializeToString()) for part in large.to_messages()]
    assert [bool(part.digest) for part in parts] == [False, False, True]
    assert all(part.ByteSize() <= MAX_PART_BYTES + 64 for part in parts)
    assert Manifest.from_messages(iter(parts)) == large
    assert list(MODEL.to_messages()) == [MODEL.to_message()]


def test_parts_of_a_manifest_without_an_end_are_refused() -> None:
    first = next(iter(Manifest.laid_out([WEIGHT]).to_messages()))
    first.ClearField("digest")
    with pytest.raises(ManifestError, match="digest is missing"):
        Manifest.from_messages([first])
    with pytest.raises(ManifestError, match="neither tensors nor the digest"):
        Manifest.from_messages([first, pb.Manifest()])
    many = pb.Manifest(tensors=[WEIGHT.to_message()] * 1000)
    with pytest.raises(ManifestError, match=f"1 to {MAX_TENSORS} tensors, this manifest has {MAX_TENSORS + 1000}"):
        Manifest.from_messages(itertools.repeat(many))


@pytest.mark.parametrize("each", [1, 2])
def test_a_manifest_in_crumbs_is_refused_before_it_has_ended(each: int) -> None:
    manifest = Manifest.laid_out([TensorSpec(f"weight.{number}", (1,), FLOAT32, PARAMETER) for number in range(300)])
    tensors = manifest.to_message().tensors
    crumbs = [pb.Manifest(tensors=tensors[at : at + each]) for at in range(0, 300, each)]
    crumbs[-1].digest = manifest.digest
    with pytest.raises(
        ManifestError, match=f"{64 * each + each * (64 * each // 100)} tensors .* were sent in 6[45] parts"
    ):
        Manifest.from_messages(iter(crumbs))
    parts = [pb.Manifest(tensors=tensors[at : at + 5]) for at in range(0, 300, 5)]
    parts[-1].digest = manifest.digest
    assert Manifest.from_messages(parts) == manifest


@pytest.mark.parametrize(("digest", "came"), [(b"", "missing"), (b"\x12" * 32, "12" * 32)])
def test_a_manifest_whose_digest_is_not_its_own_is_refused(digest: bytes, came: str) -> None:
    message = MODEL.to_message()
    message.digest = digest
    with pytest.raises(ManifestError, match=f"the manifest's digest is {came}, but its tensors give {MODEL_DIGEST}"):
        Manifest.from_message(message)


def spec(**change: object) -> TensorSpec:
    return dataclasses.replace(WEIGHT, **change)


REFUSALS = [
    ([], f"a model has 1 to {MAX_TENSORS} tensors, this manifest has 0"),
    ([MEAN, COUNT], "the model has no trainable tensor"),
    ([spec(shape=(0, 3))], "the model has no trainable tensor"),
    ([spec(name="")], r"tensor name '': expected 1 to 512 bytes"),
    ([spec(name="é" * (MAX_NAME_BYTES // 2) + "x")], "expected 1 to 512 bytes"),
    ([spec(name="a\tb")], "without tab or line feed"),
    ([spec(name="a\nb")], "without tab or line feed"),
    ([spec(shape=(1,) * (MAX_DIMENSIONS + 1))], "at most 16 sizes, none below 0"),
    ([spec(shape=(2, -3))], r"tensor 'weight' has shape \(2, -3\): at most 16 sizes, none below 0"),
    (
        [spec(shape=(2**62,))],
        r"tensor 'weight' has shape \(4611686018427387904,\): at most 281,474,976,710,656 elements",
    ),
    ([spec(shape=(2**31,) * 16)], "at most 281,474,976,710,656 elements"),
    ([spec(shape=(0, 2**62, 2**62))], "at most 281,474,976,710,656 elements"),  # has none, but strides
    ([spec(shape=(2**48,)), spec(name="x")], "tensor 'x' ends at 281,474,976,710,662 of its section: at most"),
    ([spec(dtype=INT64)], "has role 1 and dtype 3: a parameter is float32 or bfloat16"),
    ([spec(dtype=pb.DTYPE_UNSPECIFIED)], "has role 1 and dtype 0"),
    ([WEIGHT, spec(name="x", role=BUFFER, dtype=99)], "has role 2 and dtype 99"),
    ([WEIGHT, spec(name="x", role=pb.ROLE_UNSPECIFIED)], "has role 0 and dtype 1"),
    ([WEIGHT, WEIGHT], "tensor 'weight' appears twice: names are unique"),
    ([WEIGHT, spec(name="tied", alias_of="nobody")], "tensor 'tied' says that it is 'nobody': that must be an earlier"),
    ([spec(merge=LAST)], "tensor 'weight' has role 1, dtype 1 and merge 3: expected one of 0"),
    ([WEIGHT, spec(name="x", role=BUFFER, dtype=INT64, merge=AVERAGE)], "merge 1: expected one of 0, 2, 3"),
    ([WEIGHT, spec(name="x", role=BUFFER, merge=MAXIMUM)], "merge 2: expected one of 0, 1, 3"),
    ([WEIGHT, spec(name="x", role=FROZEN, dtype=FLOAT64)], "has role 3 and dtype 4"),
    ([spec(role=FROZEN)], "there is nothing to train"),
    ([TIED, WEIGHT], "that must be an earlier tensor"),
    ([WEIGHT, spec(name="tied", alias_of="tied")], "that must be an earlier tensor"),
    ([WEIGHT, TIED, spec(name="twice", alias_of="tied")], "not itself an alias"),
    ([WEIGHT, spec(name="tied", alias_of="weight", shape=(3, 2))], "of the same shape, dtype and role"),
    ([WEIGHT, spec(name="tied", alias_of="weight", dtype=BFLOAT16)], "of the same shape, dtype and role"),
    ([WEIGHT, spec(name="tied", alias_of="weight", role=BUFFER)], "of the same shape, dtype and role"),
]


@pytest.mark.parametrize(("specs", "sentence"), REFUSALS, ids=lambda part: part[:50] if isinstance(part, str) else "")
def test_a_manifest_that_contradicts_itself_is_refused_in_one_sentence(specs: list[TensorSpec], sentence: str) -> None:
    with pytest.raises(ManifestError, match=sentence):
        Manifest.laid_out(specs)


@pytest.mark.parametrize(
    ("offsets", "sentence"),
    [
        ((1, 7), "tensor 'weight' has offset 1, but the tensors before it end at 0"),
        ((0, 5), "tensor 'bias' has offset 5, but the tensors before it end at 6"),
        ((0, 7), "tensor 'bias' has offset 7, but the tensors before it end at 6"),
        ((0, -6), "tensor 'bias' has offset -6"),
    ],
)
def test_overlaps_and_gaps_are_refused(offsets: tuple[int, int], sentence: str) -> None:
    with pytest.raises(ManifestError, match=sentence):
        Manifest((spec(offset=offsets[0]), dataclasses.replace(BIAS, offset=offsets[1])))


def test_an_alias_at_another_place_than_its_tensor_is_refused() -> None:
    with pytest.raises(ManifestError, match="tensor 'tied' has offset 6"):
        Manifest((WEIGHT, dataclasses.replace(TIED, offset=6)))


def test_more_tensors_than_allowed_are_refused() -> None:
    # Shapes without elements keep the hundred thousand cheap: the count is looked at before the tensors.
    with pytest.raises(ManifestError, match=f"this manifest has {MAX_TENSORS + 1}"):
        Manifest((WEIGHT,) * (MAX_TENSORS + 1))


def test_the_longest_name_and_the_most_dimensions_are_taken() -> None:
    longest = spec(name="é" * (MAX_NAME_BYTES // 2), shape=(1,) * MAX_DIMENSIONS)
    assert Manifest.laid_out([longest]).sizes["parameters"] == 1


def test_the_most_elements_are_taken_and_their_bytes_fit_the_contract() -> None:
    largest = Manifest.laid_out([spec(shape=(MAX_ELEMENTS,)), COUNT])
    layout = PayloadLayout.of(largest, FLOAT32, with_buffers=True)
    assert pb.Delivery(payload_bytes=layout.total_bytes).payload_bytes == 4 * MAX_ELEMENTS + 8


def test_a_scalar_is_one_element_and_an_empty_tensor_none() -> None:
    assert (spec(shape=()).elements, spec(shape=(4, 0)).elements) == (1, 0)


def test_equal_models_have_no_differences() -> None:
    assert MODEL.differences(Manifest.laid_out([WEIGHT, BIAS, TIED, MEAN, COUNT])) == []


def test_differences_name_each_tensor_and_what_it_is_on_either_side() -> None:
    here = Manifest.laid_out([WEIGHT, BIAS, MEAN, TIED])
    there = Manifest.laid_out([spec(shape=(3, 2)), MEAN, COUNT, spec(name="tied")])
    assert here.differences(there) == [
        "'count' is missing here",
        "'bias' is missing there",
        "'weight' is a float32 parameter of shape (2, 3) here and a float32 parameter of shape (3, 2) there",
        "'tied' is a float32 parameter of shape (2, 3), another name for 'weight' here "
        "and a float32 parameter of shape (2, 3) there",
    ]


def test_the_same_tensors_in_another_order_are_said_to_be_that() -> None:
    other = spec(name="other")
    differences = Manifest.laid_out([WEIGHT, other]).differences(Manifest.laid_out([other, WEIGHT]))
    assert differences == ["the tensors are the same, but in another order"]


@pytest.mark.parametrize("name", ["two\nlines", "bidi\u202e", "bell\x07", "__metadata__", "half\ud800"])
def test_names_that_no_run_may_begin_with_are_found(name: str) -> None:
    with pytest.raises(ManifestError) as error:
        Manifest.laid_out([dataclasses.replace(WEIGHT, name=name)]).check_names()
    assert f"tensor name {name!r}" in str(error.value)
    assert str(error.value).isprintable()


def test_names_in_all_scripts_and_of_all_modules_are_fit() -> None:
    names = ["weight", "layers.0.weight", "größe", "重み", "a b", 'quote"', "back\\slash", "__metadata__.x", "x" * 512]
    Manifest.laid_out([dataclasses.replace(WEIGHT, name=name) for name in names]).check_names()


@pytest.mark.parametrize("wrong", [5, None, ["weight"]])
@pytest.mark.parametrize("key", ["name", "alias_of"])
def test_a_file_whose_names_are_no_texts_is_malformed(key: str, wrong: object) -> None:
    rows = [{**row, key: wrong} for row in Manifest.laid_out([WEIGHT]).to_json()]
    with pytest.raises(TypeError):
        Manifest.from_json(rows)
