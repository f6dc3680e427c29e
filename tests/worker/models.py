"""Models for the worker's tests, each with one peculiarity of real ones."""

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """Two names for one weight, a frozen layer, batch norm, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("f16", torch.tensor([1.5], dtype=torch.float16))
        self.register_buffer("f64", torch.tensor([2.5], dtype=torch.float64))
        self.register_buffer("small", torch.tensor([-3], dtype=torch.int8))
        self.register_buffer("scratch", torch.tensor([1.0]), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.frozen(self.norm(self.embedding(inputs))) + self.head(inputs)


def line(weight: float = 0.0) -> nn.Linear:
    """y = w x, with gradients that a reader can work out."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    return model
