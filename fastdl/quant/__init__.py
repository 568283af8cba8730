"""Quantized weights: the table of formats, and QuantTensor, which holds a matrix in one of them."""

from .formats import FORMATS, Format
from .tensor import QuantTensor

__all__ = ["FORMATS", "Format", "QuantTensor"]
