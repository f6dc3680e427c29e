"""The model's tensors in order: what server and workers must agree on before a byte of a tensor travels."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ormo_protos.v1 import parameter_server_pb2 as pb

FLOAT32 = pb.DTYPE_FLOAT32
BFLOAT16 = pb.DTYPE_BFLOAT16
INT64 = pb.DTYPE_INT64
PARAMETER = pb.ROLE_PARAMETER
BUFFER = pb.ROLE_BUFFER

MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
MAX_DIMENSIONS = 16
# 1 PiB of float32: far beyond any machine, and whatever is made of it (bytes, offsets, vectors) stays in an int64.
MAX_ELEMENTS = 2**48
# A key that safetensors keeps for itself: a file with a tensor of that name is written, and can't be read.
_NO_TENSOR = "__metadata__"


class ManifestError(ValueError):
    """A manifest that contradicts itself or the contract; the sentence says which tensor and what was expected."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model, or (with `alias_of`) another name for one. Fields as in the proto message."""

    name: str
    shape: tuple[int, ...]
    dtype: pb.Dtype.ValueType
    role: pb.Role.ValueType
    offset: int = 0
    alias_of: str = ""

    @property
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    @property
    def section(self) -> str:
        """Which part of the model's state it lies in: `parameters`, `float_buffers` or `int_buffers`."""
        if self.role == PARAMETER:
            return "parameters"
        return "int_buffers" if self.dtype == INT64 else "float_buffers"

    def described(self) -> str:
        """Shape and dtype in words, for error sentences."""
        kind = "parameter" if self.role == PARAMETER else "buffer"
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
        """The manifest of these tensors, with the offsets filled in: parameters first, each section dense."""
        ordered = sorted(specs, key=lambda spec: spec.role != PARAMETER)
        return cls(tuple(_with_offsets(ordered)))

    @classmethod
    def from_message(cls, message: pb.Manifest) -> "Manifest":
        """Read a manifest off the wire; the digest must be its own."""
        manifest = cls(
            tuple(TensorSpec(t.name, tuple(t.shape), t.dtype, t.role, t.offset, t.alias_of) for t in message.tensors)
        )
        if message.digest != manifest.digest:
            raise ManifestError(
                f"the manifest's digest is {message.digest[:32].hex() or 'missing'}, but its tensors give "
                f"{manifest.digest.hex()}: compute it as parameter_server.proto says"
            )
        return manifest

    def to_message(self) -> pb.Manifest:
        """The manifest as it travels."""
        tensors = [
            pb.TensorSpec(name=t.name, shape=t.shape, dtype=t.dtype, role=t.role, offset=t.offset, alias_of=t.alias_of)
            for t in self.tensors
        ]
        return pb.Manifest(tensors=tensors, digest=self.digest)

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
        return [{name: getattr(t, name) for name in names} for t in self.tensors]

    def check_names(self) -> None:
        """Nothing, if the names are fit for files, logs and terminals, as an offered model's must be.

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
        lines = (
            f"{t.name}\t{','.join(map(str, t.shape))}\t{t.dtype}\t{t.role}\t{t.offset}\t{t.alias_of}\n"
            for t in self.tensors
        )
        return hashlib.sha256("".join(lines).encode()).digest()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of each section; aliases do not count."""
        sizes = {"parameters": 0, "float_buffers": 0, "int_buffers": 0}
        for spec in self.tensors:
            if not spec.alias_of:
                sizes[spec.section] += spec.elements
        return sizes

    def differences(self, other: "Manifest") -> list[str]:
        """One sentence for each tensor that the other model has otherwise, lacks, or has besides."""
        mine = {t.name: t for t in self.tensors}
        theirs = {t.name: t for t in other.tensors}
        found = [f"{name!r} is missing here" for name in theirs if name not in mine]
        found += [f"{name!r} is missing there" for name in mine if name not in theirs]
        for name in (name for name in mine if name in theirs):
            if mine[name].described() != theirs[name].described():
                found.append(f"{name!r} is {mine[name].described()} here and {theirs[name].described()} there")
        if not found and self.digest != other.digest:
            found.append("the tensors are the same but come in another order")
        return found


def _with_offsets(specs: Iterable[TensorSpec]) -> Iterable[TensorSpec]:
    free = {"parameters": 0, "float_buffers": 0, "int_buffers": 0}
    offsets: dict[str, int] = {}
    for spec in specs:
        offset = offsets.get(spec.alias_of, 0) if spec.alias_of else free[spec.section]
        if not spec.alias_of:
            free[spec.section] += spec.elements
        offsets[spec.name] = offset
        yield TensorSpec(spec.name, spec.shape, spec.dtype, spec.role, offset, spec.alias_of)


def _check(specs: tuple[TensorSpec, ...]) -> None:
    if not 1 <= len(specs) <= MAX_TENSORS:
        raise ManifestError(f"a model has 1 to {MAX_TENSORS} tensors, this manifest has {len(specs)}")
    roles = [spec.role for spec in specs]
    if BUFFER in roles and PARAMETER in roles[roles.index(BUFFER) :]:
        raise ManifestError("a parameter comes after a buffer: list all parameters first")
    seen: dict[str, TensorSpec] = {}
    for spec, expected in zip(specs, _with_offsets(specs), strict=True):
        _check_tensor(spec)
        _check_place(spec, expected.offset, seen)
        if spec.offset + spec.elements > MAX_ELEMENTS:
            raise ManifestError(
                f"tensor {spec.name!r} ends at {spec.offset + spec.elements:,} of its section: at most "
                f"{MAX_ELEMENTS:,} elements"
            )
        seen[spec.name] = spec
    if not any(spec.role == PARAMETER and not spec.alias_of and spec.elements for spec in specs):
        raise ManifestError("the model has no trainable tensor: there is nothing to train")


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
    allowed = {PARAMETER: (FLOAT32, BFLOAT16), BUFFER: (FLOAT32, BFLOAT16, INT64)}.get(spec.role)
    if allowed is None or spec.dtype not in allowed:
        raise ManifestError(
            f"tensor {spec.name!r} has role {spec.role} and dtype {spec.dtype}: a parameter is float32 or bfloat16, "
            "a buffer float32, bfloat16 or int64"
        )


def _utf8_bytes(text: str) -> int:
    """How long the text is on the wire; 0 for one that can't travel."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return 0


def _check_place(spec: TensorSpec, offset: int, seen: Mapping[str, TensorSpec]) -> None:
    if spec.name in seen:
        raise ManifestError(f"tensor {spec.name!r} is there twice: names are unique")
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
