"""Entries that between them use everything a backend must know."""

from cases import READS, SMALL, WRITES

from steering_kernels import Flag, Kind
from steering_kernels.entry import Entry

R, R2, W, W2 = READS[0], READS[1], WRITES[0], WRITES[1]
# Every kind, and every flag of each.
EVERY_KIND = [
    Entry(Kind.ADD, write=W),
    Entry(Kind.ADD_RELATIVE, write=W, scale=0.1),
    Entry(Kind.PROJECT, R, R),
    Entry(Kind.CLAMP, R, R, a=-0.5, b=1.0),
    Entry(Kind.GATED_ADD, R, W, a=0.5, b=1.5),
    Entry(Kind.GATED_ADD, R, W, flags=Flag.HARD, a=0.5, b=1.0),
    Entry(Kind.GATED_ADD, R, W, flags=Flag.COSINE, a=0.1, b=10.0),
    Entry(Kind.FEATURE, R, W, a=0.5, c=-2.5),
    Entry(Kind.FEATURE, R, W, flags=Flag.JUMP_RELU | Flag.EDIT_SET, a=0.5, b=1.0, c=-2.5),
    Entry(Kind.FEATURE, R, W, flags=Flag.IDENTITY | Flag.EDIT_ADD, a=0.5, c=-2.5),
    Entry(Kind.ROTATE, R, R, R2, R2, a=2.5),
    Entry(Kind.ROTATE, R, W, R2, W2, a=-40.0),
    Entry(Kind.ROTATE, R, R, R2, R2, flags=Flag.ABSOLUTE, a=-2.5),
    Entry(Kind.AFFINE, SMALL[0], SMALL[1]),
    Entry(Kind.AFFINE, write=W),
    Entry(Kind.CONDITION, R, gate_out=2, a=0.5, b=1.5),
    Entry(Kind.CONDITION, R, gate_out=7, flags=Flag.HARD | Flag.COSINE, a=0.1, b=-1.5),
]
# As many entries as a slot holds: sums of one to three values, and one entry that opens the gate of another.
LONG_SLOT = [
    Entry(Kind.ADD, write=W),
    Entry(Kind.CLAMP, R, R, a=-1.0, b=1.0),
    Entry(Kind.CONDITION, R2, gate_out=1, flags=Flag.COSINE, b=1.0),
    Entry(Kind.ROTATE, R, R, R2, R2, flags=Flag.KEEP_NORM, a=1.0),
    Entry(Kind.GATED_ADD, R2, W2, gate=1, b=2.0),
    Entry(Kind.AFFINE, SMALL[0], SMALL[1], flags=Flag.KEEP_NORM),
    Entry(Kind.FEATURE, R, W, a=0.5, c=2.0),
    Entry(Kind.PROJECT, R2, R2),
]
SLOTS = [LONG_SLOT, [Entry(Kind.ADD, write=W)], []]
