"""Where the models run."""

import torch

from artifacts.jobs.errors import BuildError


def device_of(name: str) -> torch.device:
    """The device of "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        BuildError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BuildError("device is cuda and torch finds no CUDA device; use cpu or auto, or a CUDA build of torch")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
