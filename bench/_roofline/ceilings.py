"""The peak rates of GPUs, and the least time that a training step can take at them."""

from dataclasses import dataclass

from fastgpt import GPTConfig


@dataclass(frozen=True)
class Ceilings:
    """``tflops``: rate of 16-bit matrix products. On these GPUs, TF32 (for float32) has half that
    rate and fp8, if supported, twice. ``tb_per_s``: device memory, read plus written."""

    name: str
    tflops: float
    tb_per_s: float

    def __post_init__(self) -> None:
        for name, value in (("tflops", self.tflops), ("tbps", self.tb_per_s)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def ms(self, flops: int, nbytes: int, half: bool, fp8: bool = False) -> float:
        """Milliseconds of a kernel bound by memory or products. ``half``: 16-bit products."""
        rate = 2 * self.tflops if fp8 else self.tflops if half else self.tflops / 2
        return max(flops / rate, nbytes / self.tb_per_s) / 1e9


# H200: measured (an 8192³ product, a device copy). Others: NVIDIA's data sheets, dense, SXM; about
# four fifths of the TFLOP/s and nine tenths of the TB/s are achievable.
DEVICES = {
    "a100": Ceilings("A100 80 GB (data sheet)", 312.0, 2.039),
    "h100": Ceilings("H100 (data sheet)", 989.0, 3.35),
    "h200": Ceilings("H200 (measured)", 788.0, 4.3),
    "b200": Ceilings("B200 (data sheet)", 2250.0, 8.0),
}


@dataclass(frozen=True)
class FloorRow:
    """One part of the step, summed over all layers."""

    name: str
    kind: str
    calls: int
    flops: int
    bytes: int
    ms: float


def floor(
    config: GPTConfig,
    batch_size: int,
    ceilings: Ceilings,
    itemsize: int = 2,
    params_itemsize: int = 4,
) -> list[FloorRow]:
    """Forward and backward of GPT with ideal kernels: each byte is moved once, residual additions
    and GELU are fused into the products, the logits are written and read once each way, and half of
    the scores are computed under the causal mask. Without dropout.

    ``itemsize``: bytes of an activation and of a weight as the products read it;
    ``params_itemsize``: of a parameter and its gradient.
    """
    layers, width, vocab = config.n_layer, config.n_embd, config.vocab_size
    length = config.block_size
    tokens = batch_size * length
    rows: list[FloorRow] = []

    def add(name: str, kind: str, calls: int, *parts: tuple[int, int]) -> None:
        """Add a row. ``parts``: FLOPs and bytes of a call's kernels, run one after another."""
        ms = sum(ceilings.ms(flops, nbytes, itemsize == 2) for flops, nbytes in parts)
        flops, nbytes = (sum(column) for column in zip(*parts, strict=True))
        rows.append(FloorRow(name, kind, calls, calls * flops, calls * nbytes, calls * ms))

    def activations(columns: int) -> int:
        return tokens * columns * itemsize

    def product(n_in: int, n_out: int) -> int:
        return 2 * tokens * n_in * n_out

    def forward(name: str, n_in: int, n_out: int, others: int) -> None:
        """A Linear; ``others``: columns moved in addition to its input and output."""
        nbytes = activations(n_in + n_out + others) + n_in * n_out * itemsize
        add(name, "matrix products", layers, (product(n_in, n_out), nbytes))

    def backward(name: str, n_in: int, n_out: int, others: int) -> None:
        """dX, then dW."""
        nbytes = activations(n_in + n_out)
        dx = nbytes + activations(others) + n_in * n_out * itemsize
        dw = nbytes + n_in * n_out * params_itemsize
        flops = product(n_in, n_out)
        add(name, "matrix products", layers, (flops, dx), (flops, dw))

    head_flops = product(width, vocab)
    head_bytes = activations(width + vocab) + width * vocab * itemsize
    table_bytes = min(tokens, vocab) * width * params_itemsize
    scores = tokens * length * width  # half of 2 T² D per head: one product under the mask
    lse = tokens * config.n_head * 4

    add("embedding and first LayerNorm", "embedding", 1, (0, activations(2 * width) + table_bytes))
    forward("QKV forward", width, 3 * width, 0)
    add("attention forward", "attention", layers, (2 * scores, activations(4 * width) + lse))
    forward("projection forward and residual", width, width, width)
    forward("FC, bias and GELU forward", width, 4 * width, 4 * width)
    forward("FC2 forward and residual", 4 * width, width, width)
    add("LayerNorm forward", "LayerNorm and residual", 2 * layers, (0, activations(2 * width)))
    add("head and log-sum-exp", "matrix products", 1, (head_flops, head_bytes))
    head_dw = activations(width + vocab) + width * vocab * params_itemsize
    add("head dX and dW", "matrix products", 1, (head_flops, head_bytes), (head_flops, head_dw))
    backward("FC2 dX with GELU', dW", 4 * width, width, 4 * width)
    backward("FC dX and dW", width, 4 * width, 0)
    backward("projection dX and dW", width, width, 0)
    add(
        "attention backward",
        "attention",
        layers,
        (0, activations(2 * width)),  # rowsum(dO ∘ O)
        (5 * scores, activations(7 * width) + 2 * lse),
    )
    backward("QKV dX and dW", width, 3 * width, 0)
    normed = activations(4 * width)
    add("LayerNorm backward and residual", "LayerNorm and residual", 2 * layers + 1, (0, normed))
    table_gradient = vocab * width * params_itemsize
    add("embedding backward", "embedding", 1, (0, activations(width) + table_gradient))
    return rows
