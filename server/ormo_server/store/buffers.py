"""How a model's buffers are merged, as its manifest says."""

from collections.abc import Iterator

from ormo_protos.manifest import AVERAGE, FLOAT64, INT64, LAST, MAXIMUM, Manifest, TensorSpec
from ormo_server.core.buffers import Buffer, Buffers, Merge

_MERGES = {AVERAGE: Merge.AVERAGE, MAXIMUM: Merge.MAXIMUM, LAST: Merge.LAST}


def buffers_of(manifest: Manifest) -> Buffers:
    """The buffers of a model, for its state machine."""
    return Buffers(tuple(_section(manifest, "float_buffers")), tuple(_section(manifest, "int_buffers")))


def _section(manifest: Manifest, section: str) -> Iterator[Buffer]:
    for spec in manifest.tensors:
        if spec.section == section and not spec.alias_of:
            yield Buffer(spec.offset, spec.offset + spec.elements, _merge(spec), spec.dtype == FLOAT64)


def _merge(spec: TensorSpec) -> Merge:
    # Workers and files that say nothing: as it was when there was no choice.
    return _MERGES.get(spec.merge, Merge.MAXIMUM if spec.dtype == INT64 else Merge.AVERAGE)
