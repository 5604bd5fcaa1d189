"""fastgpt: nanoGPT's model on hand-written Triton kernels."""

from importlib import metadata

from fastgpt.bigram import Bigram
from fastgpt.blocks import MLP, Block, CausalSelfAttention, LayerNorm
from fastgpt.language_model import GPTConfig
from fastgpt.model import GPT

try:
    __version__ = metadata.version("fastgpt-triton")
except metadata.PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"

__all__ = [
    "GPT",
    "MLP",
    "Bigram",
    "Block",
    "CausalSelfAttention",
    "GPTConfig",
    "LayerNorm",
    "__version__",
]
