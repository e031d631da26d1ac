"""Kernels that apply interventions to the residual stream. Imports torch only."""

from steering_kernels.op import OPS_VERSION, steer_, steer_add_rms_norm_
from steering_kernels.table import CODE_WIDTH, MAX_OPS, NUM_GATES, PARAM_WIDTH, Code, Flag, Kind, Param

__all__ = [
    "CODE_WIDTH",
    "MAX_OPS",
    "NUM_GATES",
    "OPS_VERSION",
    "PARAM_WIDTH",
    "Code",
    "Flag",
    "Kind",
    "Param",
    "steer_",
    "steer_add_rms_norm_",
]
