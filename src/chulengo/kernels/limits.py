"""Sizes that the fused kernels take; apart, so that a plan can ask without torch or Triton."""

REFERENCE_ENGINE = "--set model.engine=reference"  # what a run does instead

HEAD_STEP, LARGEST_HEAD = 8, 256  # FlashAttention's head sizes
LARGEST_RANK = 128  # of an adapter that is folded into NF4 weights
WORD_VALUES = 8  # a row of NF4 that is read in tiles is whole 32-bit words
MOST_VALUES = 2**31  # an NF4 weight has fewer
LARGEST_ROW = 65536  # a norm holds a row
LARGEST_FP8_ROW = 32768  # so do the kernels that make rows in FP8
FP8_STEP = 16  # cuBLAS takes operands whose rows are multiples of 16 bytes, along both sides
FP8_CAPABILITY = (8, 9)  # of a GPU that has products in FP8, at least
