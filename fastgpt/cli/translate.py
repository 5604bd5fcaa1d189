"""The commands ``fastgpt translate train`` and ``fastgpt translate``."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from fastgpt._optional import optional
from fastgpt.cli.prepare import shown
from fastgpt.training.config import Dtype, Limited
from fastgpt.translation.config import TranslationConfig
from fastgpt.translation.pairs import read_lines, read_tsv, read_two_files
from fastgpt.translation.trainer import TranslationTrainer
from fastgpt.translation.translator import Translator, exact_match, scores

# how --help shows the keys of ``translate train``, whose class does not import tyro
TRANSLATION_MARKS: dict[str, tuple[Any, ...]] = {
    "task": (tyro.conf.Positional, shown("[numbers|reverse]", "none")),
    "source": (shown("FILE", "none"),),
    "target": (shown("FILE", "none"),),
    "pairs": (shown("FILE.tsv", "none"),),
    "held_out": (shown("N", "a twentieth, at most 1000"),),
    "learning_rate": (shown("RATE", "1 / sqrt(n_embd * warmup_iters)"),),
}

_SHOWN = 3  # translations at the end of a training run


@dataclass(frozen=True, kw_only=True)
class Translate(Limited):
    """Translate texts: fastgpt translate --model DIR "text".

    Or translate the lines of a file, and with a reference for each print scores: BLEU and chrF
    (which need sacrebleu) and exact matches. To train a model: fastgpt translate train.
    """

    # Texts to translate.
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], shown("[TEXT ...]", "none")] = ()
    # Folder of the model.
    model: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("out-translate")
    # A UTF-8 file with one text per line.
    source: Annotated[Path | None, shown("FILE", "none")] = None
    # Reference translations of --source, line by line: print scores instead of translations.
    target: Annotated[Path | None, shown("FILE", "none")] = None
    # Or both in one file: a text, a tab and its translation per line.
    pairs: Annotated[Path | None, shown("FILE.tsv", "none")] = None
    # Number of hypotheses in the beam search; 1 is greedy search.
    beam: Annotated[int | None, shown("N", "4, or the vocabulary size if smaller")] = None
    # How strongly longer translations are preferred: alpha of Wu et al. 2016.
    length_penalty: float = 0.6
    # cuda, cuda:N, cpu, mps, or auto (cuda if available, else cpu).
    device: str = "auto"
    # auto: bfloat16 on a GPU that supports it, float16 on an older GPU, float32 elsewhere.
    dtype: Dtype = "auto"


def run_translate(command: Translate, console: Console) -> None:
    """Print translations, or their scores if there are references."""
    given = [bool(command.texts), command.source is not None, command.pairs is not None]
    if sum(given) != 1 or (command.target is not None and command.source is None):
        raise ValueError(
            "give texts to translate, or --source with or without --target, or --pairs"
        )
    texts, references = list(command.texts), list[str]()
    if command.pairs is not None:
        texts, references = map(list, zip(*read_tsv(command.pairs), strict=True))
    elif command.source is not None and command.target is not None:
        both = read_two_files(command.source, command.target)
        texts, references = map(list, zip(*both, strict=True))
    elif command.source is not None:
        texts = read_lines(command.source)
    if references:
        optional("sacrebleu", "BLEU", "translate")  # so that it fails before the work
    translator = Translator(command.model, command.device, command.dtype)
    translations = translator(texts, command.beam, command.length_penalty)
    if references:
        found = scores(translations, references)
        console.print(
            f"BLEU {found['BLEU']:.2f}, chrF {found['chrF']:.2f}, exact {found['exact']:.2f}% of "
            f"{len(texts)}"
        )
        return
    for text in translations:
        console.out(text)  # print would expand tabs


def run_translate_train(config: TranslationConfig, console: Console) -> None:
    """Train, translate the held-out pairs, and print the share of exact translations."""
    trainer = TranslationTrainer(config, console)
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    source, target = trainer.tokenizers
    sizes = str(target.vocab_size)
    if trainer.model.config.source_vocab_size is not None:
        sizes = f"{source.vocab_size} and {sizes}"
    console.print(
        f"{n_parameters:,} parameters on {trainer.device}, "
        f"{str(trainer.dtype).removeprefix('torch.')}; vocabulary of {sizes}; {len(trainer.train)} "
        f"batches an epoch, {trainer.train.padding():.1%} of them padding; "
        f"{len(trainer.held_out)} pairs held out"
    )
    trainer.run()
    translator = Translator(config.out_dir, config.device, config.dtype)
    texts, references = zip(*trainer.held_out, strict=True)
    translations = translator(texts)
    console.print(f"{exact_match(translations, references):.2%} of what was held out is exact")
    for text, translation in list(zip(texts, translations, strict=True))[:_SHOWN]:
        console.print(f"{text} → {translation}")
    where = shlex.quote(str(config.out_dir))
    console.print(f'translate with it: fastgpt translate --model {where} "TEXT"')
