"""Sequences of several documents, and the start of each token's document."""

import torch
from torch import Tensor


def starts_of(length: int, *rows: list[int], device: str = "cpu") -> Tensor:
    """(B, T) int32 for B rows; each row lists the starts of its documents, except 0."""
    doc_start = torch.zeros(len(rows), length, dtype=torch.int32)
    for row, borders in zip(doc_start, rows, strict=True):
        for border in sorted(borders):
            row[border:] = border
    return doc_start.to(device)


# Length and borders. Tiles of the interpreter have 64 rows.
DOCUMENTS: list[tuple[int, list[int]]] = [
    (1, []),
    (7, [1, 2, 3, 4, 5, 6]),  # documents of one token
    (64, [1, 63]),
    (129, [64, 128]),  # at tile boundaries
    (129, [5, 6, 70]),
    (200, [64, 127, 129, 199]),
    (193, [190]),
    (200, [10]),  # full tiles between a border and the diagonal
]
