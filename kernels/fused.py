"""The public Triton ops under the names of ``reference`` and ``portable``."""

from fastgpt.kernels.attention import attention, attention_qkvpacked
from fastgpt.kernels.gelu import gelu
from fastgpt.kernels.layer_norm import layer_norm
from fastgpt.kernels.reference import dropout_seed
from fastgpt.kernels.residual_layer_norm import residual_layer_norm

__all__ = [
    "attention",
    "attention_qkvpacked",
    "dropout_seed",
    "gelu",
    "layer_norm",
    "residual_layer_norm",
]
