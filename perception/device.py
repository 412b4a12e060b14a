"""Where tensors live, by the name that a user gives it."""

from __future__ import annotations

import torch

from perception.errors import ConfigError


def usable_device(device: torch.device | str) -> torch.device:
    """The device of a name such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: no such kind of device, or one that this machine does not have.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: torch knows no such device", "use cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ConfigError(
            f"device {str(device)!r}: torch {torch.__version__} sees {count} CUDA devices",
            "use another device, such as cpu; `perception doctor` says why a GPU is not seen",
        )
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(device)!r}: neither a CPU nor a CUDA device", "use cpu, cuda or cuda:1")
    return found
