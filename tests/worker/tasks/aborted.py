"""A data set whose processes are aborted as they end."""

import atexit
import os

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info


class Aborted(Dataset[Tensor]):
    """Ten numbers."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        assert get_worker_info() is not None, "to be read by other processes"
        atexit.unregister(os.abort)
        atexit.register(os.abort)
        return torch.tensor(index)
