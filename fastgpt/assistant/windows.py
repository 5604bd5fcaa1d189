"""The rows of training on dialogues: each begins where a dialogue does."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.assistant.template import ASSISTANT, answer_mask

_Tokens = npt.NDArray[np.unsignedinteger[Any]]


class DialogueWindows:
    """Windows of ``length`` tokens, one for each dialogue that begins in one file: it, and those
    behind it. The last dialogue of a window may be cut at the window's end, never at its beginning.
    Behind the last file's end a window has ``<|dialogue|>`` tokens.

    Args:
        tokens: of the file, (N,).
        length: T + 1.
        begin: the id of ``<|dialogue|>``.
        behind: the first ``length`` tokens of the files behind this one, or as many as they have:
            a file may end within a dialogue.

    Attributes:
        too_long: the number of dialogues that are longer than a window: what stands behind is
            never seen. Those of which no answer would be seen have no window.
    """

    def __init__(self, tokens: _Tokens, length: int, begin: int, behind: _Tokens) -> None:
        self._tokens, self._begin = tokens, begin
        self._offsets = np.arange(length)
        self._behind = np.append(behind, np.full(length - len(behind), begin, behind.dtype))
        starts = np.flatnonzero(tokens == begin)
        later = np.append(np.flatnonzero(behind == begin), len(behind))[0]
        self.too_long = int((np.diff(starts, append=len(tokens) + later) > length).sum())
        # An answer is seen if the window goes on behind the token with which the answer begins.
        answers = np.concatenate(
            [
                np.flatnonzero(tokens == begin + ASSISTANT),
                len(tokens) + np.flatnonzero(behind == begin + ASSISTANT),
                [len(tokens) + length],
            ]
        )
        first = answers[np.searchsorted(answers, starts)]
        self._starts = starts[first - starts < length - 1]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, numbers: npt.NDArray[np.int64]) -> _Tokens:
        """The windows of these numbers (n,): (n, length)."""
        places = self._starts[numbers][:, None] + self._offsets
        inside = places < len(self._tokens)
        found = self._tokens[np.where(inside, places, 0)]
        found[~inside] = self._behind[places[~inside] - len(self._tokens)]
        return found

    def targets(self, windows: _Tokens) -> npt.NDArray[np.int64]:
        """The targets (n, length - 1) of windows: the next tokens, and -1 where they are not part
        of an answer."""
        answers = answer_mask(windows, self._begin)
        return np.where(answers, windows.astype(np.int64), -1)[:, 1:]
