"""The rows of training on dialogues: each begins where a dialogue does."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.assistant.template import ASSISTANT, answer_mask

_Tokens = npt.NDArray[np.unsignedinteger[Any]]


class DialogueWindows:
    """Windows of ``length`` tokens of one file, one for each dialogue: it, and those behind it. The
    last dialogue of a window may be cut at the window's end, never at its beginning. Behind the
    file's end a window has ``<|dialogue|>`` tokens.

    Args:
        tokens: of the file, (N,).
        length: T + 1.
        begin: the id of ``<|dialogue|>``.

    Attributes:
        too_long: the number of dialogues that are longer than a window: what stands behind is
            never seen. Those of which no answer would be seen have no window.
    """

    def __init__(self, tokens: _Tokens, length: int, begin: int) -> None:
        self._tokens, self._begin = tokens, begin
        self._offsets = np.arange(length)
        starts = np.flatnonzero(tokens == begin)
        self.too_long = int((np.diff(starts, append=len(tokens)) > length).sum())
        # An answer is seen if the window goes on behind the token with which the answer begins.
        answers = np.append(np.flatnonzero(tokens == begin + ASSISTANT), len(tokens) + length)
        first = answers[np.searchsorted(answers, starts)]
        self._starts = starts[first - starts < length - 1]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, numbers: npt.NDArray[np.int64]) -> _Tokens:
        """The windows of these numbers (n,): (n, length)."""
        places = self._starts[numbers][:, None] + self._offsets
        inside = places < len(self._tokens)
        found = self._tokens[np.where(inside, places, 0)]
        found[~inside] = self._begin
        return found

    def targets(self, windows: _Tokens) -> npt.NDArray[np.int64]:
        """The targets (n, length - 1) of windows: the next tokens, and -1 where they are not part
        of an answer."""
        answers = answer_mask(windows, self._begin)
        return np.where(answers, windows.astype(np.int64), -1)[:, 1:]
