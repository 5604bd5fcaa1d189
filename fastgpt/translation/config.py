"""Every key of ``fastgpt translate train``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgpt.training.config import COUNT, Dtype, check_limits


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """Train a translation model on a parallel text: an encoder and a decoder.

    Then use it: fastgpt translate --model DIR "text".
    """

    # A parallel text that is made here: numbers in English and German words, or words and their
    # letters from behind.
    task: Literal["numbers", "reverse"] | None = None
    # Or the text to translate, a line each, in UTF-8 ...
    source: Path | None = None
    # ... and its translation, line by line.
    target: Path | None = None
    # Or both in one file: each line a text, a tab, its translation.
    pairs: Path | None = None
    # Folder of the checkpoints and the log.
    out_dir: Path = Path("out-translate")
    # Go on from the newest checkpoint, by the same command.
    resume: bool = False
    # char: a token for each character. bpe, unigram: learned from the texts. Or a tokenizer: gpt2,
    # a tokenizer.json, a SentencePiece .model.
    tokenizer: str = "char"
    # Tokens to learn, with bpe and unigram.
    vocab_size: int = 8000
    # One vocabulary and one embedding for both languages.
    shared: bool = True
    # The longest source or target, in tokens with its end.
    max_length: int = 256
    # Different sources that are kept from training, for validation; by default a twentieth, at
    # most 1000.
    held_out: int | None = None
    # Layers of the encoder, and of the decoder.
    n_layer: int = 2
    # Heads of each attention.
    n_head: int = 4
    # Width of the embeddings; the layers between are four times as wide.
    n_embd: int = 128
    # Share of activations that training drops.
    dropout: float = 0.1
    # Share of the target distribution that is spread over the vocabulary.
    label_smoothing: float = 0.1
    # Tokens of the longer side in a batch, padding included.
    batch_tokens: int = 4096
    # Updates.
    max_iters: int = 3000
    # The rate rises for so many iterations, and then falls with their inverse square root.
    warmup_iters: int = 400
    # At the end of the warm-up; by default the paper's 1 / sqrt(n_embd * warmup_iters).
    learning_rate: float | None = None
    # Largest norm of the gradient; 0 turns clipping off.
    grad_clip: float = 1.0
    # Updates between two evaluations, which also save.
    eval_interval: int = 500
    # Updates between two reports of the loss.
    log_interval: int = 50
    # Seed of the built-in texts, what is held out, the weights, the batches and dropout.
    seed: int = 1337
    # cuda, cuda:N, cpu, mps, or auto.
    device: str = "auto"
    # auto is bfloat16 on a GPU that has it, float16 on an older one, float32 elsewhere.
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
