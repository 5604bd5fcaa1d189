"""Generated parallel texts: numbers in English and German words, and reversed words."""

import random
from collections.abc import Callable

Pairs = list[tuple[str, str]]

_N_NUMBERS = 20_000
_N_WORDS = 50_000
_LETTERS = "abcdefghij"  # few, so that letters repeat within a word
_MAX_LETTERS = 12

_ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_GERMAN = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
    "sechzehn siebzehn achtzehn neunzehn"
).split()
_GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english(n: int) -> str:
    """0 <= n < 1,000,000 in words: "forty-two thousand one hundred and seven"."""
    if n < 20:
        return _ENGLISH[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return _ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH[ones]}" if ones else "")
    if n < 1000:
        hundreds, rest = divmod(n, 100)
        return f"{_ENGLISH[hundreds]} hundred" + (f" and {english(rest)}" if rest else "")
    thousands, rest = divmod(n, 1000)
    joint = " and " if rest < 100 else " "
    return f"{english(thousands)} thousand" + (joint + english(rest) if rest else "")


def german(n: int) -> str:
    """0 <= n < 1,000,000 in one word, ones before tens: "zweiundvierzigtausendeinhundertsieben"."""
    word = _german(n)
    return f"{word}s" if n % 100 == 1 else word  # ein → eins at the end


def _german(n: int) -> str:
    if n < 20:
        return _GERMAN[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return (f"{_GERMAN[ones]}und" if ones else "") + _GERMAN_TENS[tens - 2]
    unit, name = (100, "hundert") if n < 1000 else (1000, "tausend")
    many, rest = divmod(n, unit)
    return _german(many) + name + (_german(rest) if rest else "")


def numbers(seed: int) -> Pairs:
    """Distinct numbers of 1 to 6 digits, about equally many of each length as far as they exist."""
    draw = random.Random(seed)
    chosen: set[int] = set()
    for digits in range(1, 7):
        first, last = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits - 1
        still = (_N_NUMBERS - len(chosen)) // (7 - digits)
        chosen.update(draw.sample(range(first, last + 1), min(still, last + 1 - first)))
    return [(english(n), german(n)) for n in sorted(chosen)]


def reversals(seed: int) -> Pairs:
    """Distinct words of up to 12 letters, each with its reversal."""
    draw = random.Random(seed)
    words: set[str] = set()
    while len(words) < _N_WORDS:
        words.add("".join(draw.choices(_LETTERS, k=draw.randint(1, _MAX_LETTERS))))
    return [(word, word[::-1]) for word in sorted(words)]


TASKS: dict[str, Callable[[int], Pairs]] = {"numbers": numbers, "reverse": reversals}
