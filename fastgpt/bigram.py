"""The bigram baseline: predicts the next token from the current one alone."""

from torch import Tensor, nn

from fastgpt.language_model import GPTConfig, LanguageModel


class Bigram(LanguageModel):
    """A lookup table: row ``i`` holds the logits of the token that follows token ``i``.

    Has the interface of ``GPT``: ``forward``, ``generate`` and ``configure_optimizers``. Uses only
    ``vocab_size`` and ``block_size`` of the config. Its lowest possible loss is the bigram entropy
    of the text. The state dict contains one tensor, ``table.weight`` (V, V).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        self.apply(self._init_weights)  # logits near zero: the first loss is about ln V

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        return self.table(idx[:, -1:] if last_only else idx)
