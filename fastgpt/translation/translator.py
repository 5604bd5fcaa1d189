"""Translate texts with a trained model, and score translations.

translator = Translator("out-translate")
translator(["twenty-one"])           # ["einundzwanzig"]
"""

from collections.abc import Sequence
from pathlib import Path

from fastgpt._files import check_folder
from fastgpt._optional import optional
from fastgpt._progress import progress_bar
from fastgpt.data.batches import padded
from fastgpt.devices import autocast, resolve_device, resolve_dtype
from fastgpt.seq2seq import PADDING, Seq2Seq, Seq2SeqConfig
from fastgpt.tokenizer import Tokenizer, unpacked
from fastgpt.training import checkpoint as ckpt
from fastgpt.translation.pairs import cut_by_tokens, encoded
from fastgpt.translation.search import beam_search

LAST = "last.pt"  # the newest state; ckpt.BEST has the best validation loss

Tokenizers = tuple[Tokenizer, Tokenizer]  # of sources and targets; may be the same one

_BATCH_TOKENS = 2048
_BEAM = 4


def load_model(checkpoint: ckpt.Checkpoint, path: Path) -> tuple[Seq2Seq, Tokenizers]:
    """The model, on the CPU, and its tokenizers.

    Raises ValueError naming ``path``, from which the checkpoint was loaded.
    """
    if "source_tokenizer" not in checkpoint:
        raise ValueError(f"{path} is not a translation model: fastgpt translate train writes one")
    try:
        source = unpacked(checkpoint["source_tokenizer"])
        target = unpacked(checkpoint["target_tokenizer"])
        if source is None or target is None:
            raise ValueError("it has no tokenizer")
        model = Seq2Seq(Seq2SeqConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds no translation model: {reason}") from error
    return model, (source, target)


class Translator:
    """Translates with the model that ``fastgpt translate train`` wrote to ``folder``: the best by
    validation loss, or the newest if the run was stopped before its first evaluation.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or of another kind.
    """

    def __init__(self, folder: str | Path, device: str = "auto", dtype: str = "auto") -> None:
        folder = Path(folder)
        check_folder(folder, "the model must be a folder")
        path = next((p for p in (folder / ckpt.BEST, folder / LAST) if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"there is no model {folder / ckpt.BEST}: fastgpt translate train writes one"
            )
        model, self.tokenizers = load_model(ckpt.load(path), path)
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        self._autocast = autocast(self.device, resolve_dtype(dtype, self.device))

    def __call__(
        self, texts: Sequence[str], beam: int | None = None, length_penalty: float = 0.6
    ) -> list[str]:
        """Translate each text; see ``beam_search`` for the options. The default beam is 4, or the
        vocabulary size if that is smaller. Raises ValueError for a text that is empty, too long, or
        has a character that is not in the vocabulary."""
        source, target = self.tokenizers
        limit = self.model.config.block_size
        if beam is None:
            beam = min(_BEAM, self.model.config.vocab_size)
        for text in texts:
            if not text.strip():
                raise ValueError(f"a text to translate must not be empty, got {text!r}")
        rows = [encoded(text, source, limit, f"text {text[:40]!r}") for text in texts]
        if not rows:
            return []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths together
        starts = cut_by_tokens((len(rows[i]) for i in order), _BATCH_TOKENS)
        found: dict[int, str] = {}
        with progress_bar("translating", hidden=len(starts) < 2) as show:
            for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
                numbers = order[start:stop]
                batch = padded([rows[i] for i in numbers], PADDING, self.device)
                with self._autocast:
                    best = beam_search(self.model, batch, beam, length_penalty)
                found.update(zip(numbers, map(target.decode, best), strict=True))
                show(stop / len(rows))
        return [found[i] for i in range(len(rows))]


def exact_match(translations: Sequence[str], references: Sequence[str]) -> float:
    """The share of translations that equal the reference exactly."""
    same = sum(a == b for a, b in zip(translations, references, strict=True))
    return same / len(references)


def scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF in [0, 100] by sacrebleu, and exact matches in percent.

    Raises ImportError without sacrebleu.
    """
    sacrebleu = optional("sacrebleu", "BLEU", "translate")
    return {
        "BLEU": sacrebleu.corpus_bleu(translations, [references]).score,
        "chrF": sacrebleu.corpus_chrf(translations, [references]).score,
        "exact": 100.0 * exact_match(translations, references),
    }
