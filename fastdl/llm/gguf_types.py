"""ggml's tensor types: id, name, weights per block, bytes per block.

Sizes follow the structs of ggml-common.h; tests/test_gguf.py compares them with gguf-py's table. A type that is not
here can be listed by `open_gguf` but not read.
"""

from __future__ import annotations

# id: (name, weights per block, bytes per block)
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# Types that ggml dropped: their names make the message helpful, their sizes are of no use.
REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


def type_name(type_id: int) -> str:
    """'Q4_1' for 3; 'unknown type 77' for what ggml does not define.

    >>> type_name(14)
    'Q6_K'
    """
    if type_id in GGML_TYPES:
        return GGML_TYPES[type_id][0]
    return REMOVED_TYPES.get(type_id, f"unknown type {type_id}")


def row_bytes(type_id: int, cols: int) -> int | None:
    """Bytes of one row of `cols` weights; None when the type is unknown or `cols` is no whole number of blocks."""
    if type_id not in GGML_TYPES:
        return None
    _, block, size = GGML_TYPES[type_id]
    return cols // block * size if cols % block == 0 else None
