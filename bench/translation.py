"""``fastgpt translate train`` against ``torch.nn.Transformer``, trained with the same initial
weights, batches, schedule, Adam and search.

    python bench/translation.py --pairs=messages.tsv --catalogs=FOLDER   # make the text, once
    python bench/translation.py --pairs=messages.tsv --model=fastgpt
    python bench/translation.py --pairs=messages.tsv --model=torch

The text: program messages and their translations, from the catalogs (``*.mo``) that Linux
distributions ship in ``/usr/share/locale/de/LC_MESSAGES``. Held-out pairs give BLEU and chrF.
"""

import gettext
import math
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli
from fastgpt._files import atomic_write
from fastgpt.language_model import Trainable
from fastgpt.seq2seq import PADDING, Seq2Seq
from fastgpt.training.config import check_limits
from fastgpt.translation.built_in import Pairs
from fastgpt.translation.config import TranslationConfig
from fastgpt.translation.trainer import BETAS, TranslationTrainer
from fastgpt.translation.translator import Translator, scores

_WORDS = range(2, 11)  # allowed numbers of words of a message and of its translation


class TorchTransformer(Trainable):
    """``torch.nn.Transformer`` with the weights of ``ours``, and the paper's embedding and loss."""

    def __init__(self, ours: Seq2Seq) -> None:
        super().__init__()
        config = self.config = ours.config
        self.wte, self.source_wte = (
            nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
            for table in (ours.wte, ours.source_wte)
        )
        if ours.source_wte is ours.wte:
            self.source_wte = self.wte
        self.drop = nn.Dropout(config.dropout)
        self.transformer = nn.Transformer(
            config.n_embd,
            config.n_head,
            config.n_layer,
            config.n_layer,
            4 * config.n_embd,
            config.dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        state = ours.state_dict()
        with torch.no_grad():
            for name, param in self.named_parameters():
                param.copy_(torch.cat([state[part] for part in our_names(name)]))

    def _embedded(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        width = self.config.n_embd
        places = torch.arange(ids.shape[1], device=ids.device)[:, None]
        angles = places / 10000 ** (torch.arange(0, width, 2, device=ids.device) / width)
        positions = torch.empty(ids.shape[1], width, device=ids.device)
        positions[:, 0::2], positions[:, 1::2] = angles.sin(), angles.cos()
        return self.drop(table(ids.clamp(min=0)) * math.sqrt(width) + positions)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and the loss, as in ``Seq2Seq``."""
        start = target.new_full((len(target), 1), self.config.vocab_size - 1)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], source.device)
        hidden = self.transformer(
            self._embedded(self.source_wte, source),
            self._embedded(self.wte, torch.cat((start, target[:, :-1]), dim=1)),
            tgt_mask=mask == -math.inf,
            src_key_padding_mask=source == PADDING,
            memory_key_padding_mask=source == PADDING,
            tgt_is_causal=True,
        )
        logits = F.linear(hidden, self.wte.weight)
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            target.flatten(),
            ignore_index=PADDING,
            label_smoothing=smoothing,
        )
        return logits, loss

    @torch.no_grad()
    def copy_to(self, ours: Seq2Seq) -> None:
        """Write the weights into ``ours``."""
        state = ours.state_dict()
        for name, param in self.named_parameters():
            parts = [state[part] for part in our_names(name)]
            for part, value in zip(parts, param.split([len(p) for p in parts]), strict=True):
                part.copy_(value)


def our_names(name: str) -> list[str]:
    """The parameters of ``Seq2Seq`` whose concatenation is the parameter ``name``."""
    if not name.startswith("transformer."):
        return [name]
    side, *rest = name.split(".")[1:]
    if rest[0] == "norm":
        return [f"ln_{side}.{rest[1]}"]
    number, layer, *kind = rest[1:]
    norms = ["ln_1", "ln_2"] if side == "encoder" else ["ln_1", "ln_cross", "ln_2"]
    layers = {f"norm{i}": norm for i, norm in enumerate(norms, start=1)}
    layers |= {"linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}
    layers |= {"self_attn": "attn", "multihead_attn": "cross"}
    ours = f"{side}.{number}.{layers[layer]}"
    what = kind[-1].removeprefix("in_proj_")
    if kind[0] == "out_proj":
        return [f"{ours}.c_proj.{what}"]
    if not kind[0].startswith("in_proj_"):
        return [f"{ours}.{what}"]
    parts = ["c_attn"] if layer == "self_attn" else ["c_q", "c_kv"]
    return [f"{ours}.{part}.{what}" for part in parts]


class TorchTrainer(TranslationTrainer):
    """The same run with PyTorch's model. Its weights are copied to ours to evaluate and to save."""

    def __init__(self, config: TranslationConfig, console: Any = None) -> None:
        super().__init__(config, console)
        self._torch = TorchTransformer(self.model)
        self.optimizer = self._torch.configure_optimizers(0.0, 0.0, BETAS, self.device.type)
        self._build_step(self._torch)

    def evaluate(self) -> dict[str, float]:
        self._torch.copy_to(self.model)
        return super().evaluate()

    def _save(self, publish: bool) -> Path:
        self._torch.copy_to(self.model)
        return super()._save(publish)


def messages(folder: Path) -> Pairs:
    """The short single-line messages in the catalogs of a folder, with their translations."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.mo")):
        with path.open("rb") as file:
            try:
                catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            except (OSError, ValueError, struct.error):
                raise ValueError(f"catalogs: {path} is damaged, or no file of gettext's") from None
        for key, text in catalog.items():
            source = key[0] if isinstance(key, tuple) else key  # of a plural
            source, target = source.rpartition("\x04")[2].strip(), text.strip()
            one_line = not set("\n\t\r") & set(source + target)
            short = all(len(side.split()) in _WORDS for side in (source, target))
            if one_line and short and source != target:
                found.setdefault(source, target)
    return list(found.items())


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description="One training of one model, and its scores.")
    parser.add_argument("--pairs", type=Path, required=True, help="the parallel text, as a table")
    parser.add_argument("--catalogs", type=Path, help="write --pairs from this folder and stop")
    parser.add_argument("--model", choices=("fastgpt", "torch"), default="fastgpt")
    parser.add_argument("--out_dir", type=Path, default=Path("out-translation"))
    parser.add_argument("--max_iters", type=int, default=1500)
    parser.add_argument("--beam", type=int, default=4)
    options = parser.parse_args(argv)
    check_limits(options)
    if options.catalogs is not None:
        if not options.catalogs.is_dir():
            raise NotADirectoryError(f"catalogs must be a folder, got {options.catalogs}")
        pairs = messages(options.catalogs)
        if not pairs:
            raise ValueError(f"catalogs must hold .mo files with texts, got {options.catalogs}")
        with atomic_write(options.pairs) as file:
            file.writelines(f"{a}\t{b}\n".encode() for a, b in pairs)
        print(f"wrote {len(pairs)} pairs to {options.pairs}")
        return
    config = TranslationConfig(
        pairs=options.pairs,
        out_dir=options.out_dir / options.model,
        tokenizer="bpe",
        vocab_size=4000,
        max_length=128,
        batch_tokens=1024,
        max_iters=options.max_iters,
        warmup_iters=300,
        learning_rate=3e-3,
    )
    trainer = (TranslationTrainer if options.model == "fastgpt" else TorchTrainer)(config)
    start = time.process_time()
    trainer.run()
    seconds = time.process_time() - start
    sources, references = zip(*trainer.held_out, strict=True)
    found = scores(Translator(config.out_dir, config.device)(sources, options.beam), references)
    figures = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    print(f"{options.model}: {figures}, {seconds:.0f} s of CPU")


if __name__ == "__main__":
    sys.exit(cli.exit_of(main))
