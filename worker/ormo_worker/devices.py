"""From a device's name, as users give it, to the device."""

import torch

from ormo_worker.client.errors import OptionRefused


def resolve_device(name: str) -> torch.device:
    """The device that is meant by `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        OptionRefused: there is no such device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = _parsed(name)
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


def _parsed(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionRefused(f"--device is {name!r}: expected auto, cpu, cuda, or cuda:N with N the number of a GPU")
    return device
