"""What passes between the simulator and what computes its gradients; server and worker don't import each other."""

from dataclasses import dataclass

import torch

from ormo_protos.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Model:
    """A model's numbers.

    Attributes:
        params: w, shape (d,), float32.
        float_buffers: shape (f,), float32.
        int_buffers: shape (i,), int64, or the bits of float64.
        manifest: which tensors they are, so that buffers are merged as the worker's; None: floats are averaged, and
            integers grow.
    """

    params: torch.Tensor
    float_buffers: torch.Tensor
    int_buffers: torch.Tensor
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """What a worker would push besides its gradient. Buffers are good until the worker computes again.

    Attributes:
        samples: in the mini-batch.
        loss: mean over the mini-batch.
        float_buffers, int_buffers: the worker's, as in `Model`.
    """

    samples: int
    loss: float
    float_buffers: torch.Tensor
    int_buffers: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """How good a model is.

    Attributes:
        train_loss, test_loss: means over samples, in evaluation mode.
        test_accuracy: share of samples predicted right, from 0 to 1.
    """

    train_loss: float
    test_loss: float
    test_accuracy: float
