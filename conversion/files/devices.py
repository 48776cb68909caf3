"""Where models compute."""

import torch

from .errors import ConversionError


def find_device(name: str | None) -> str:
    """
    `name`, what `--device` says, or without one the first GPU of CUDA or else the CPU.

    Raises:
        ConversionError: if it is none that computes here.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        torch.ones(1, device=torch.device(name)).item()
    except Exception as error:  # backends that are not there raise what they like
        there = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ConversionError(f"--device {name} does not compute here: expected one of {', '.join(there)}") from error
    return name
