"""Plots the cross-attention of a translation model, averaged over the heads of each layer: one row
per token of the translation, one column per token of the source.

    python bench/attention_map.py --model=DIR --text="forty-two" --out=map.png
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli
from fastgpt import ops
from fastgpt._optional import optional
from fastgpt.seq2seq import Seq2Seq
from fastgpt.translation.pairs import encoded
from fastgpt.translation.search import beam_search
from fastgpt.translation.translator import Translator


@torch.no_grad()
def cross_attention(model: Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    """The attention probabilities (layers, H, T, S) of ``model`` over one source (1, S), for each
    token of its target (1, T)."""
    found: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        found.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[0])
        return ops.attention(q, k, v, **options)

    recording: Any = SimpleNamespace(**{**vars(ops), "attention": attention})
    twin = Seq2Seq(model.config, recording).eval()
    twin.load_state_dict(model.state_dict())
    twin(source, target)
    return torch.stack(found[model.config.n_layer :])  # after the encoder's self-attention


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description="Draw the cross-attention of one translation.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--text", required=True, help="the text to translate")
    parser.add_argument("--out", type=Path, default=Path("map.png"), help="the picture")
    options = parser.parse_args(argv)
    translator = Translator(options.model, "cpu")
    model, (source_tokens, target_tokens) = translator.model, translator.tokenizers
    source = encoded(options.text, source_tokens, model.config.block_size, "text")
    ids = torch.tensor([source])
    target = [*beam_search(model, ids)[0], model.end]
    maps = cross_attention(model, ids, torch.tensor([target])).mean(1)
    sides = ((source_tokens, source), (target_tokens, target))
    columns, rows = ([*(t.decode([i]) for i in ids[:-1]), "END"] for t, ids in sides)
    size = (1.5 + 0.42 * len(columns) * len(maps), 1.5 + 0.3 * len(rows))
    figure = optional("matplotlib.figure", "the picture", "log").Figure(
        figsize=size, layout="constrained"
    )
    for number, (axes, weights) in enumerate(
        zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True), start=1
    ):
        axes.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(f"layer {number}")
    figure.savefig(options.out, dpi=110)
    print(f"wrote {options.out}: {options.text} → {target_tokens.decode(target[:-1])}")


if __name__ == "__main__":
    sys.exit(cli.exit_of(main))
