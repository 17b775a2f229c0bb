"""Rows of one byte a value for inference, and their lookup."""

from mfdist.kernels.quantize.op import quantized_gather_sum
from mfdist.kernels.quantize.rows import QuantizedRows, dequantize, quantize

__all__ = ["QuantizedRows", "dequantize", "quantize", "quantized_gather_sum"]
