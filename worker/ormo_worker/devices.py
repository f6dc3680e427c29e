"""From a device's name, as users give it, to the device."""

import torch

from ormo_worker.errors import OptionRefused


def resolve_device(name: str) -> torch.device:
    """The device that is meant by `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        OptionRefused: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = device.index or 0
        if number >= found:
            raise OptionRefused(
                f"--device is {name}, but PyTorch finds {found} CUDA devices here: use one of "
                f"{', '.join(['cpu', *(f'cuda:{index}' for index in range(found))])}"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)  # for what a task makes without naming a device
    return device
