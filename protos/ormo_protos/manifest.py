"""The model's tensors in order: what server and workers must agree on before a byte of a tensor travels."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ormo_protos.limits import (
    FREE_PARTS,
    MAX_DIMENSIONS,
    MAX_ELEMENTS,
    MAX_NAME_BYTES,
    MAX_PART_BYTES,
    MAX_TENSORS,
    TENSORS_PER_PART,
)
from ormo_protos.v1 import parameter_server_pb2 as pb

FLOAT32 = pb.DTYPE_FLOAT32
BFLOAT16 = pb.DTYPE_BFLOAT16
INT64 = pb.DTYPE_INT64
FLOAT64 = pb.DTYPE_FLOAT64
INT8 = pb.DTYPE_INT8
PARAMETER = pb.ROLE_PARAMETER
FROZEN = pb.ROLE_FROZEN
BUFFER = pb.ROLE_BUFFER
UNSPECIFIED = pb.MERGE_UNSPECIFIED
AVERAGE = pb.MERGE_AVERAGE
MAXIMUM = pb.MERGE_MAXIMUM
LAST = pb.MERGE_LAST

# What a tensor adds to its own bytes in a message, at most.
_BYTES_AROUND = 8
_ROLES = {PARAMETER: "parameter", FROZEN: "frozen parameter", BUFFER: "buffer"}
_DTYPES = {PARAMETER: (FLOAT32, BFLOAT16), FROZEN: (FLOAT32, BFLOAT16), BUFFER: (FLOAT32, BFLOAT16, INT64, FLOAT64)}
_MERGES = {INT64: (UNSPECIFIED, MAXIMUM, LAST)}
_MERGES_OF_FLOATS = (UNSPECIFIED, AVERAGE, LAST)
# A key that safetensors keeps for itself: a file with a tensor of that name is written, and can't be read.
_NO_TENSOR = "__metadata__"


class ManifestError(ValueError):
    """A manifest that contradicts itself or the contract; the sentence says which tensor and what was expected."""


# The parts of a model's state; those of a payload. The last but one has numbers of eight bytes, float64 among them.
SECTIONS = ("parameters", "float_buffers", "int_buffers", "frozen")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model, or (with `alias_of`) another name for one. Fields as in the proto message."""

    name: str
    shape: tuple[int, ...]
    dtype: pb.Dtype.ValueType
    role: pb.Role.ValueType
    offset: int = 0
    alias_of: str = ""
    merge: pb.Merge.ValueType = UNSPECIFIED

    def to_message(self) -> pb.TensorSpec:
        """The tensor as it travels."""
        return pb.TensorSpec(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            role=self.role,
            offset=self.offset,
            alias_of=self.alias_of,
            merge=self.merge,
        )

    @property
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    @property
    def section(self) -> str:
        """Which part of the model's state it lies in: one of `SECTIONS`."""
        if self.role == PARAMETER:
            return "parameters"
        if self.role == FROZEN:
            return "frozen"
        return "int_buffers" if self.dtype in (INT64, FLOAT64) else "float_buffers"

    @property
    def line(self) -> str:
        """What stands for the tensor in the text that a digest is taken of."""
        merge = f"\t{self.merge}" if self.merge else ""
        shape = ",".join(map(str, self.shape))
        return f"{self.name}\t{shape}\t{self.dtype}\t{self.role}\t{self.offset}\t{self.alias_of}{merge}\n"

    def described(self) -> str:
        """Shape and dtype in words, for error sentences."""
        kind = _ROLES[self.role]
        alias = f", another name for {self.alias_of!r}" if self.alias_of else ""
        return f"a {pb.Dtype.Name(self.dtype).removeprefix('DTYPE_').lower()} {kind} of shape {self.shape}{alias}"


@dataclass(frozen=True)
class Manifest:
    """The model's tensors, their place in the flat state and the digest that stands for all of it.

    Raises:
        ManifestError: names, shapes, dtypes, offsets or aliases do not fit together.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        _check(self.tensors)

    @classmethod
    def laid_out(cls, specs: Iterable[TensorSpec]) -> "Manifest":
        """The manifest of these tensors, with the offsets filled in: by `role`, each section dense."""
        ordered = sorted(specs, key=_place_of_role)
        return cls(tuple(_with_offsets(ordered)))

    @classmethod
    def from_message(cls, message: pb.Manifest) -> "Manifest":
        """Read a manifest that came in one message.

        Raises:
            ManifestError: as for `from_messages`.
        """
        return cls.from_messages([message])

    @classmethod
    def from_messages(cls, parts: Iterable[pb.Manifest]) -> "Manifest":
        """Read a manifest off the wire, up to the part with the digest, which must be its own.

        Raises:
            ManifestError: the tensors contradict the contract or the digest, or the digest did not come; or the parts
                are very many.
        """
        specs: list[TensorSpec] = []
        digest = b""
        for number, part in enumerate(parts):
            if not part.tensors and not part.digest:
                raise ManifestError("a part of the manifest has neither tensors nor the digest")
            if number >= FREE_PARTS + len(specs) // TENSORS_PER_PART:
                raise ManifestError(
                    f"{len(specs)} tensors of the manifest were sent in {number} parts: send fewer and larger ones, of "
                    "2 MiB"
                )
            specs += [
                TensorSpec(t.name, tuple(t.shape), t.dtype, t.role, t.offset, t.alias_of, t.merge) for t in part.tensors
            ]
            _check_number(len(specs))
            digest = part.digest
            if digest:
                break
        manifest = cls(tuple(specs))
        if digest != manifest.digest:
            raise ManifestError(
                f"the manifest's digest is {digest[:32].hex() or 'missing'}, but its tensors give "
                f"{manifest.digest.hex()}: compute it as parameter_server.proto says"
            )
        return manifest

    def to_messages(self) -> Iterator[pb.Manifest]:
        """The manifest as it travels, in parts that fit into messages."""
        part, size = pb.Manifest(), 0
        for spec in self.tensors:
            message = spec.to_message()
            size += message.ByteSize() + _BYTES_AROUND
            if size > MAX_PART_BYTES:
                yield part
                part, size = pb.Manifest(), message.ByteSize() + _BYTES_AROUND
            part.tensors.append(message)
        part.digest = self.digest
        yield part

    def to_message(self) -> pb.Manifest:
        """The manifest in one message, which may be too large to be sent."""
        return pb.Manifest(tensors=[spec.to_message() for spec in self.tensors], digest=self.digest)

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            ManifestError, TypeError, KeyError: it is not that.
        """
        specs = tuple(TensorSpec(**{**row, "shape": tuple(row["shape"])}) for row in rows)
        if not all(isinstance(spec.name, str) and isinstance(spec.alias_of, str) for spec in specs):
            raise TypeError("names of tensors are texts")
        return cls(specs)

    def to_json(self) -> list[dict[str, Any]]:
        """The manifest as plain data, for checkpoints."""
        names = ("name", "shape", "dtype", "role", "offset", "alias_of")
        # Without what an older server does not know, where there is none of it.
        return [
            {name: getattr(t, name) for name in names} | ({"merge": t.merge} if t.merge else {}) for t in self.tensors
        ]

    def check_names(self) -> None:
        """Refuse names that are not fit for files, logs and terminals, as those of an offered model must be.

        Apart from all other checks: a run that has begun with other names goes on with them.

        Raises:
            ManifestError: one is not; the sentence shows it with escapes.
        """
        for spec in self.tensors:
            if not spec.name.isprintable():
                raise ManifestError(
                    f"tensor name {spec.name!r} has characters that can't be shown, such as control characters, "
                    "invisible ones or ones that change the direction of writing: rename it in the model"
                )
            if spec.name == _NO_TENSOR:
                raise ManifestError(
                    f"tensor name {spec.name!r} has a meaning of its own in checkpoints, which are safetensors files: "
                    "rename it in the model"
                )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the tensors, 32 bytes; the proto says over which text."""
        return hashlib.sha256("".join(t.line for t in self.tensors).encode()).digest()

    @cached_property
    def model_digest(self) -> bytes:
        """As `digest`, but the same for every precision of the model, and however its buffers are merged."""
        return Manifest(
            tuple(
                replace(t, dtype=FLOAT32 if t.dtype == BFLOAT16 else t.dtype, merge=UNSPECIFIED) for t in self.tensors
            )
        ).digest

    @cached_property
    def digests(self) -> frozenset[bytes]:
        """All that stand for this model: its own, the model's, and the one that an older program computes."""
        return frozenset({self.digest, self.model_digest, self.without_merges.digest})

    @cached_property
    def without_merges(self) -> "Manifest":
        """As older programs describe the model."""
        return Manifest(tuple(replace(t, merge=UNSPECIFIED) for t in self.tensors))

    @cached_property
    def newer(self) -> TensorSpec | None:
        """A tensor of a kind that older programs do not know; None if there is none."""
        return next((t for t in self.tensors if t.role == FROZEN or t.dtype == FLOAT64), None)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of each section; aliases do not count."""
        sizes = dict.fromkeys(SECTIONS, 0)
        for spec in self.tensors:
            if not spec.alias_of:
                sizes[spec.section] += spec.elements
        return sizes

    @cached_property
    def layouts(self) -> dict[tuple[int, bool, bool], Any]:
        """Of its payloads, those that were asked for; `PayloadLayout.of` keeps them here, for each exchange asks."""
        return {}

    @cached_property
    def trained_sizes(self) -> tuple[int, ...]:
        """Elements of each tensor that gradients are for, in their order; aliases do not count."""
        return tuple(spec.elements for spec in self.tensors if spec.role == PARAMETER and not spec.alias_of)

    def differences(self, other: "Manifest") -> list[str]:
        """One sentence for each tensor that the other model has otherwise, lacks, or has besides."""
        mine = {t.name: t for t in self.tensors}
        theirs = {t.name: t for t in other.tensors}
        found = [f"{name!r} is missing here" for name in theirs if name not in mine]
        found += [f"{name!r} is missing there" for name in mine if name not in theirs]
        for name in (name for name in mine if name in theirs):
            here, there = mine[name].described(), theirs[name].described()
            if here.replace("bfloat16", "float32") != there.replace("bfloat16", "float32"):
                found.append(f"{name!r} is {here} here and {there} there")
        if not found and self.model_digest != other.model_digest:
            found.append("the tensors are the same, but in another order")
        return found


def _place_of_role(spec: TensorSpec) -> int:
    return list(_ROLES).index(spec.role) if spec.role in _ROLES else len(_ROLES)


def _with_offsets(specs: Iterable[TensorSpec]) -> Iterable[TensorSpec]:
    free = dict.fromkeys(SECTIONS, 0)
    offsets: dict[str, int] = {}
    for spec in specs:
        offset = offsets.get(spec.alias_of, 0) if spec.alias_of else free[spec.section]
        if not spec.alias_of:
            free[spec.section] += spec.elements
        offsets[spec.name] = offset
        yield replace(spec, offset=offset)


def _check(specs: tuple[TensorSpec, ...]) -> None:
    if not specs:
        raise ManifestError(f"a model has 1 to {MAX_TENSORS} tensors, this manifest has 0")
    _check_number(len(specs))
    for spec in specs:
        _check_tensor(spec)
    places = [_place_of_role(spec) for spec in specs]
    if places != sorted(places):
        raise ManifestError(
            "a parameter is listed after a frozen one, or one of them after a buffer: list all parameters first, then "
            "frozen ones, then buffers"
        )
    seen: dict[str, TensorSpec] = {}
    for spec, expected in zip(specs, _with_offsets(specs), strict=True):
        _check_place(spec, expected.offset, seen)
        if spec.offset + spec.elements > MAX_ELEMENTS:
            raise ManifestError(
                f"tensor {spec.name!r} ends at {spec.offset + spec.elements:,} of its section: at most "
                f"{MAX_ELEMENTS:,} elements"
            )
        seen[spec.name] = spec
    if not any(spec.role == PARAMETER and not spec.alias_of and spec.elements for spec in specs):
        raise ManifestError("the model has no trainable tensor: there is nothing to train")


def _check_number(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise ManifestError(f"a model has 1 to {MAX_TENSORS} tensors, this manifest has {tensors}")


def _check_tensor(spec: TensorSpec) -> None:
    for name in (spec.name, spec.alias_of or spec.name):
        if not 1 <= _utf8_bytes(name) <= MAX_NAME_BYTES or any(c in name for c in "\t\n"):
            raise ManifestError(
                f"tensor name {name[:80]!r}: expected 1 to {MAX_NAME_BYTES} bytes of UTF-8 without tab or line feed"
            )
    if len(spec.shape) > MAX_DIMENSIONS or any(n < 0 for n in spec.shape):
        raise ManifestError(
            f"tensor {spec.name!r} has shape {spec.shape}: at most {MAX_DIMENSIONS} sizes, none below 0"
        )
    # Sizes of 0 left out: a tensor without elements still has strides, which are the products of the others.
    if math.prod(filter(None, spec.shape)) > MAX_ELEMENTS:
        raise ManifestError(f"tensor {spec.name!r} has shape {spec.shape}: at most {MAX_ELEMENTS:,} elements")
    if spec.dtype not in _DTYPES.get(spec.role, ()):
        raise ManifestError(
            f"tensor {spec.name!r} has role {spec.role} and dtype {spec.dtype}: a parameter is float32 or bfloat16, "
            "a buffer float32, bfloat16, int64 or float64"
        )
    merges = _MERGES.get(spec.dtype, _MERGES_OF_FLOATS) if spec.role == BUFFER else (UNSPECIFIED,)
    if spec.merge not in merges:
        raise ManifestError(
            f"tensor {spec.name!r} has role {spec.role}, dtype {spec.dtype} and merge {spec.merge}: expected one of "
            f"{', '.join(map(str, merges))}"
        )


def _utf8_bytes(text: str) -> int:
    """How long the text is on the wire; 0 for one that can't travel."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return 0


def _check_place(spec: TensorSpec, offset: int, seen: Mapping[str, TensorSpec]) -> None:
    if spec.name in seen:
        raise ManifestError(f"tensor {spec.name!r} appears twice: names are unique")
    if spec.alias_of:
        named = seen.get(spec.alias_of)
        if (
            named is None
            or named.alias_of
            or (named.shape, named.dtype, named.role)
            != (
                spec.shape,
                spec.dtype,
                spec.role,
            )
        ):
            raise ManifestError(
                f"tensor {spec.name!r} says that it is {spec.alias_of!r}: that must be an earlier tensor of the same "
                "shape, dtype and role, not itself an alias"
            )
    if spec.offset != offset:
        raise ManifestError(f"tensor {spec.name!r} has offset {spec.offset}, but the tensors before it end at {offset}")
