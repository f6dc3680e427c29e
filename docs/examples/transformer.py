"""Train a transformer with AdamW on machines far apart: a push in many steps. First start a server with local steps."""

import math

import torch

from ormo_worker import RemoteOptimizer, load_task
from ormo_worker.tasks.batches import batches

torch.manual_seed(0)
task = load_task("code-lm")  # a small transformer, and the source of Python's library
model = task.build_model()

inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
with RemoteOptimizer(model, "127.0.0.1:50051", inner=inner, batch_size=16) as optimizer:
    # By the run's progress, and not by this worker's steps: one that is slow or joins late is where the others are.
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda _: 0.5 + 0.5 * math.cos(math.pi * optimizer.progress))
    for batch in batches(task.train_set(), 16, optimizer.data_seed):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(loss=loss)  # AdamW's; when enough are made, pushes the sum of the moves and loads what comes
        schedule.step()
        if optimizer.finished:
            break
