"""The parameters of every checkpoint, computed anew from the text of the journal's lines.

Nothing of the server is used, and nothing is done again in order: docs/algorithm.md says in one sum what the
parameters are. For gradients i that were applied, in buckets j with step sizes η, while b is the newest bucket:

    w = - Σ weight_i η_i g_i        weight = 1 with plain SGD, (1 - β^(b-j+1)) / (1 - β) with ordered momentum
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from chaos.loads import MARKS

RULES = ("sgd", "ormo")
_TOLERANCE = 1e-4  # float32 sums of some ten thousand gradients; a wrong bucket shows in the first digits


def deviations(archive: Path, workers: int) -> list[str]:
    """One sentence for each checkpoint whose parameters are others."""
    lines = [(log, row) for log, path in _logs(archive) for row in _pushes(path)]
    log = torch.tensor([log for log, _ in lines])
    bucket, step = (
        torch.tensor([row[name] for _, row in lines], dtype=torch.float64) for name in ("bucket", "step_size")
    )
    gradient = torch.zeros(len(lines), 2 * workers, dtype=torch.float64)
    for at, (_, row) in enumerate(lines):
        column = int(row["worker"].removeprefix("w"))
        gradient[at, column], gradient[at, workers + column] = 1.0, row["samples"] % MARKS
    found = []
    for path, document in _documents(archive):
        before = log < document["journal_log"]
        expected = -_weights(bucket[before], document) * step[before] @ gradient[before]
        found += _compared(path, document, int(before.sum()), expected)
    return found


def _weights(bucket: torch.Tensor, document: dict[str, Any]) -> torch.Tensor:
    rule, beta = document["fields"]["rule"], document["settings"]["momentum"]
    if rule == "sgd" or not len(bucket):
        return torch.ones_like(bucket)
    assert rule == "ormo"
    return (1 - beta ** (bucket.max() - bucket + 1)) / (1 - beta)


def _compared(path: Path, document: dict[str, Any], count: int, expected: torch.Tensor) -> Iterator[str]:
    where = f"{path.parent.name}, {path.name}"
    if count != document["fields"]["iteration"]:
        yield f"{where}: {count} lines of the journal led to iteration {document['fields']['iteration']}"
    parameters = load_file(path / "model.safetensors")["weight"][: len(expected)].double()
    for element, (is_, should) in enumerate(zip(parameters.tolist(), expected.tolist(), strict=True)):
        if abs(is_ - should) > _TOLERANCE * max(1.0, abs(should)):
            yield f"{where}: element {element} is {is_:g}, and the closed form of the journal's lines {should:g}"


def _logs(archive: Path) -> list[tuple[int, Path]]:
    """All that there ever were, once each: lives share those that a later one found."""
    paths = {path.name: path for path in sorted(archive.glob("life-*/journal/inputs-*.log"))}
    return sorted((int(name.removeprefix("inputs-").removesuffix(".log")), path) for name, path in paths.items())


def _pushes(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line[line.index(b"{") :]).get("input", {})  # behind its numbers
        except ValueError:  # cut short by the end of the process
            return
        if row.get("event") == "pushed" and not row["discarded"]:
            yield row


def _documents(archive: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    seen = set()
    for path in sorted(archive.glob("life-*/checkpoint-*")):
        document, model = path / "checkpoint.json", path / "model.safetensors"
        if document.exists() and model.exists() and (inode := document.stat().st_ino) not in seen:
            seen.add(inode)
            yield path, json.loads(document.read_bytes())
