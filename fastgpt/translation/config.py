"""The keys of ``fastgpt translate train``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgpt.training.config import COUNT, Dtype, check_limits


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """Train a translation model, an encoder and a decoder, on a parallel text.

    Then use it: fastgpt translate --model DIR "text".
    """

    # A generated parallel text: numbers in English and German words, or words and their reversals.
    task: Literal["numbers", "reverse"] | None = None
    # Or the text to translate: a UTF-8 file with one text per line ...
    source: Path | None = None
    # ... and its translation, line by line.
    target: Path | None = None
    # Or both in one file: each line a text, a tab, its translation.
    pairs: Path | None = None
    # Folder for the checkpoints and the log.
    out_dir: Path = Path("out-translate")
    # Resume from the newest checkpoint. Give the same options as before.
    resume: bool = False
    # char: one token per character. bpe, unigram: learned from the texts. Or an existing tokenizer:
    # gpt2, a tokenizer.json, a SentencePiece .model.
    tokenizer: str = "char"
    # Vocabulary size for bpe and unigram.
    vocab_size: int = 8000
    # Use one vocabulary and one embedding for both languages.
    shared: bool = True
    # Maximum length of a source or target, in tokens including the end token.
    max_length: int = 256
    # Number of distinct sources held out for validation; by default a twentieth, at most 1000.
    held_out: int | None = None
    # Number of layers in each of encoder and decoder.
    n_layer: int = 2
    # Number of attention heads.
    n_head: int = 4
    # Width of the embeddings; the hidden layers of the MLPs are four times as wide.
    n_embd: int = 128
    # Dropout probability during training.
    dropout: float = 0.1
    # Share of the target distribution that is spread over the vocabulary.
    label_smoothing: float = 0.1
    # Maximum number of tokens per batch on the longer side, including padding.
    batch_tokens: int = 4096
    # Number of updates.
    max_iters: int = 3000
    # Number of warm-up updates, after which the learning rate decays as 1 / sqrt(iteration).
    warmup_iters: int = 400
    # Peak learning rate; by default the paper's 1 / sqrt(n_embd * warmup_iters).
    learning_rate: float | None = None
    # Maximum gradient norm; 0 disables clipping.
    grad_clip: float = 1.0
    # Updates between two evaluations; each also writes a checkpoint.
    eval_interval: int = 500
    # Updates between two reports of the loss.
    log_interval: int = 50
    # Seed for the generated texts, the held-out pairs, the weights, the batches and dropout.
    seed: int = 1337
    # cuda, cuda:N, cpu, mps, or auto (cuda if available, else cpu).
    device: str = "auto"
    # auto: bfloat16 on a GPU that supports it, float16 on an older GPU, float32 elsewhere.
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        given = [key for key in ("task", "source", "pairs") if getattr(self, key) is not None]
        if len(given) != 1 or (self.source is None) != (self.target is None):
            raise ValueError(
                "give one parallel text: --source and --target, or --pairs, or numbers or reverse; "
                f"got {', '.join(given) or 'none'}"
                + (" without target" if self.source and not self.target else "")
                + (" with target" if self.target and not self.source else "")
            )
        check_limits(self, max_iters=COUNT, warmup_iters=COUNT)
        if self.learning_rate == 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
