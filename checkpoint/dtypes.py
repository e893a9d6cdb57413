"""Dtypes by the names that safetensors gives them. Does not import torch."""

from __future__ import annotations

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element."""

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of the same dtypes in torch."""

FULL = ("F64", "F32", "F16")
"""What fine-tuning saves weights as, besides BF16; they are rounded to BF16 as they are read."""
