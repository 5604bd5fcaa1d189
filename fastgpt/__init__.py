"""fastgpt: nanoGPT's model on hand-written Triton kernels."""
