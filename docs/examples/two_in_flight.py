"""Compute the next gradient while the last one travels: for slow links. Start a server first."""

import torch
from torch import nn

from ormo_worker import RemoteOptimizer, keep_freed_memory

keep_freed_memory()  # before there are threads: pays for models of many megabytes
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
inputs = torch.randn(256, 4)
targets = inputs.sum(dim=1, keepdim=True)

# Two slots: K counts both, so the server's learning rate is half of what one gradient in flight would take.
with RemoteOptimizer(model, "127.0.0.1:50051", in_flight=2, wire_dtype=torch.bfloat16) as optimizer:
    order = torch.Generator().manual_seed(optimizer.data_seed)
    while not optimizer.finished:
        batch = torch.randint(256, (32,), generator=order)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
        loss.backward()
        optimizer.step(samples=len(batch), loss=loss)  # hands the gradient over; its outcome is known a step later
    print(f"{optimizer.counted} gradients of this worker counted")
