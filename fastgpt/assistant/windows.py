"""Training windows for dialogues, each starting at the beginning of a dialogue."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.assistant.template import ASSISTANT, answer_mask

_Tokens = npt.NDArray[np.unsignedinteger[Any]]


class DialogueWindows:
    """Windows of ``length`` tokens, one for each dialogue that begins in a file: this dialogue and
    those that follow it. The last one may be cut off at the window's end. After the end of the last
    file, windows are filled with ``<|dialogue|>`` tokens.

    Args:
        tokens: the file's tokens, (N,).
        length: T + 1.
        begin: the id of ``<|dialogue|>``.
        after: the first ``length`` tokens of the following files, or as many as they have, because
            a file may end within a dialogue.

    Attributes:
        too_long: the number of dialogues that are longer than a window, whose ends are never seen.
            Dialogues without an answer inside the window have no window.
    """

    def __init__(self, tokens: _Tokens, length: int, begin: int, after: _Tokens) -> None:
        self._tokens, self._begin = tokens, begin
        self._offsets = np.arange(length)
        self._after = np.append(after, np.full(length - len(after), begin, after.dtype))
        starts = np.flatnonzero(tokens == begin)
        later = np.append(np.flatnonzero(after == begin), len(after))[0]
        self.too_long = int((np.diff(starts, append=len(tokens) + later) > length).sum())
        # An answer is inside if the window continues after the token that begins the answer.
        answers = np.concatenate(
            [
                np.flatnonzero(tokens == begin + ASSISTANT),
                len(tokens) + np.flatnonzero(after == begin + ASSISTANT),
                [len(tokens) + length],
            ]
        )
        first = answers[np.searchsorted(answers, starts)]
        self._starts = starts[first - starts < length - 1]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, numbers: npt.NDArray[np.int64]) -> _Tokens:
        """The windows with these indices (n,): (n, length)."""
        positions = self._starts[numbers][:, None] + self._offsets
        inside = positions < len(self._tokens)
        found = self._tokens[np.where(inside, positions, 0)]
        found[~inside] = self._after[positions[~inside] - len(self._tokens)]
        return found

    def targets(self, windows: _Tokens) -> npt.NDArray[np.int64]:
        """The targets (n, length - 1) of windows: the next tokens, and -1 where they are not part
        of an answer."""
        answers = answer_mask(windows, self._begin)
        return np.where(answers, windows.astype(np.int64), -1)[:, 1:]
