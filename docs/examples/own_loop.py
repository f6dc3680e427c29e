"""A training loop that became a worker: `# <-` marks the lines that changed. Start a server first."""

import torch
from torch import nn

from ormo_worker import RemoteOptimizer  # <-

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
inputs = torch.randn(256, 4)
targets = inputs.sum(dim=1, keepdim=True)

optimizer = RemoteOptimizer(
    model, "127.0.0.1:50051"
)  # <- was torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
order = torch.Generator().manual_seed(optimizer.data_seed)  # <- each worker shuffles by its own seed
while not optimizer.finished:  # <- the server says when the run is over
    batch = torch.randint(256, (32,), generator=order)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
    loss.backward()
    optimizer.step(samples=len(batch), loss=loss)  # <- pushes the gradient, loads newer parameters into the model
