"""Every backend that runs on this machine's host, for the tests of what a backend must do."""

from types import ModuleType

import pytest
import torch

from steering_kernels import backends


@pytest.fixture(params=list(backends.available("cpu", torch.float32)))
def each_backend(request: pytest.FixtureRequest) -> ModuleType:
    """Module of a backend; skips a test whose parameter `dtype` it does not take."""
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if request.param not in backends.available("cpu", dtype):
        pytest.skip(f"backend {request.param} does not take {dtype} on this machine")
    return backends.available("cpu", dtype)[request.param]
