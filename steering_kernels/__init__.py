"""Kernels that apply steering vectors to the residual stream. Imports torch only."""

from steering_kernels.op import OPS_VERSION, backend, steer_

__all__ = ["OPS_VERSION", "backend", "steer_"]
