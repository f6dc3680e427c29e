"""A task: a model and its data, for `ormo-worker run`, `ormo-worker evaluate`, `ormo-local` and `ormo-sim`."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ormo_worker.tasks import ClassificationTask


class Rings(ClassificationTask):
    """Points in the plane, inside or outside the unit circle."""

    def build_model(self) -> nn.Module:
        """Make the model, with its initial parameters."""
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))

    def train_set(self) -> TensorDataset:
        """Return the training samples."""
        return self._points(2000, seed=1)

    def test_set(self) -> TensorDataset:
        """Return the samples to evaluate on."""
        return self._points(500, seed=2)

    def _points(self, count: int, seed: int) -> TensorDataset:
        points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(points, (points.norm(dim=1) > 1).long())
