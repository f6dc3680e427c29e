"""Simulated workers whose sums of local steps travel in int8, and parameters in bfloat16, by the code of real ones."""

from typing import Any

import torch
from typing_extensions import override

from ormo_protos.int8 import Blocks, Int8Vector, encode, rounding
from ormo_runtime.workload import Computed, Model
from ormo_worker.simulated import TaskWorker, TaskWorkload


class Int8Workload(TaskWorkload):
    @override
    def start_worker(self, data_seed: int, model: Model) -> TaskWorker:
        made: Any = super().start_worker(data_seed, model)
        made.__class__ = Int8Worker
        return made  # type: ignore[no-any-return]


class Int8Worker(TaskWorker):
    @override
    def local_steps(
        self, ticket: int, params: torch.Tensor, out: torch.Tensor, *, steps: int, progress: float
    ) -> Computed:
        computed = super().local_steps(ticket, params.bfloat16().float(), out, steps=steps, progress=progress)
        blocks = Blocks.of(self._bench.staging.tensors.manifest.trained_sizes)
        codes, scales = torch.empty(out.shape, dtype=torch.int8), torch.empty(blocks.count)
        encode(out, codes, scales, blocks, rounding(1, ticket, out.device))
        out.copy_(Int8Vector(codes, scales, blocks)[:])
        return computed
