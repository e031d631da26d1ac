"""Layout of the operation table: what every backend reads and the engine writes.

One entry says what one intervention does at one layer: eight integers (`codes`) and four floats (`params`). A slot
holds up to `MAX_OPS` entries per layer, applied in order; the first entry of kind `END` ends the list.
"""

from enum import IntEnum, IntFlag

# Entries per layer and slot.
MAX_OPS = 8
# Conditions that one slot may hold at the same time.
NUM_GATES = 8


class Kind(IntEnum):
    """What an entry does to the residual row x; s is the effective strength, p = read . x. Source: `reference`."""

    END = 0
    ADD = 1
    ADD_RELATIVE = 2
    PROJECT = 3
    CLAMP = 4
    GATED_ADD = 5
    FEATURE = 6
    ROTATE = 7
    AFFINE = 8
    CONDITION = 9


class Code(IntEnum):
    """Columns of `codes`. Rows are indices into the pool, -1 for none; gates are columns of `gates`, -1 for none."""

    KIND = 0
    READ = 1
    WRITE = 2
    READ2 = 3
    WRITE2 = 4
    GATE = 5  # multiplies the strength by gates[token, GATE]
    GATE_OUT = 6  # where CONDITION writes
    FLAGS = 7


class Param(IntEnum):
    """Columns of `params`."""

    SCALE = 0  # multiplies the token's strength
    A = 1
    B = 2
    C = 3


class Flag(IntFlag):
    """Bits of `Code.FLAGS`."""

    KEEP_NORM = 1  # rescale the row to the 2-norm it had before this entry (any kind but CONDITION)
    COSINE = 2  # p = read . x / |x| (GATED_ADD, CONDITION)
    HARD = 4  # a step in place of the sigmoid (GATED_ADD, CONDITION)
    ABSOLUTE = 8  # turn to the angle instead of by the angle (ROTATE)
    JUMP_RELU = 16  # activation z if z > b else 0 in place of relu (FEATURE)
    IDENTITY = 32  # activation z (FEATURE)
    EDIT_SET = 64  # edited activation c in place of c * v (FEATURE)
    EDIT_ADD = 128  # edited activation v + c (FEATURE)


CODE_WIDTH, PARAM_WIDTH = len(Code), len(Param)
