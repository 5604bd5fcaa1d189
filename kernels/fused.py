"""The public Triton ops under the names of ``reference`` and ``torch_ops``."""

from fastgpt.kernels import costs
from fastgpt.kernels._host import dropout_seed
from fastgpt.kernels.adamw import adamw
from fastgpt.kernels.attention import attention, attention_qkvpacked
from fastgpt.kernels.attention_decode import attention_decode
from fastgpt.kernels.embedding import embedding
from fastgpt.kernels.gelu import gelu
from fastgpt.kernels.layer_norm import layer_norm
from fastgpt.kernels.linear import linear
from fastgpt.kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt.kernels.mlp import mlp
from fastgpt.kernels.residual_layer_norm import residual_layer_norm

__all__ = [
    "adamw",
    "attention",
    "attention_decode",
    "attention_qkvpacked",
    "dropout_seed",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "residual_layer_norm",
]

costs.publish()
