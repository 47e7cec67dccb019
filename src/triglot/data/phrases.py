"""A data set without end that any run can be checked on: English numbers and dates with their translations.

Cardinals below 10⁹ come from num2words, dates from 1900 to 2099 from the Unicode CLDR through Babel.
"""

import datetime
import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Literal

from babel.dates import format_date
from num2words import num2words

from triglot.data.corpus import Example

Part = Literal["train", "valid", "test"]
_FIRST_DAY = datetime.date(1900, 1, 1).toordinal()
_NUM_DAYS = datetime.date(2100, 1, 1).toordinal() - _FIRST_DAY
# Where num2words departs from the usual spelling: 201 000 is zweihunderteintausend, 200 is two words in Czech.
_SPELLING = {
    "de": {"einstausend": "eintausend"},
    "cs": {
        "dvěstě": "dvě stě",
        "třista": "tři sta",
        "čtyřista": "čtyři sta",
        "pětset": "pět set",
        "šestset": "šest set",
    }
    | {"sedmset": "sedm set", "osmset": "osm set", "devětset": "devět set"},
}


def examples(seed: int, language: str, part: Part, start: int = 0) -> Iterator[Example]:
    """The examples of a part from the `start`-th on, without end."""
    index = start
    while True:
        yield example(seed, index, language, part)
        index += 1


def example(seed: int, index: int, language: str, part: Part) -> Example:
    """The `index`-th example of a part: the first of a sequence of chance candidates that falls into it."""
    attempt = 0
    while True:
        chance = _hash(f"{seed} {part} {index} {attempt}")
        source = _phrase(chance, "en")
        if part_of(source) == part:
            return Example(source, _phrase(chance, language))
        attempt += 1


def part_of(source: str) -> Part:
    """Where a source belongs: one in twenty is for validation and another one for the test, whatever the seed."""
    share = _hash(source) % 20
    return "valid" if share == 0 else "test" if share == 1 else "train"


def cardinal(number: int, language: str) -> str:
    """A number below 10⁹ in words, put together from its millions, thousands and rest, since num2words is slow."""
    millions, thousands, rest = number // 10**6 * 10**6, number // 1000 % 1000 * 1000, number % 1000
    groups = [group for group in (millions, thousands, rest) if group] or [0]
    text = _words(groups[0], language)
    for before, group in pairwise(groups):
        between = {"en": " and " if group < 100 else ", ", "de": "" if before < 10**6 else " "}.get(language, " ")
        text += between + _words(group, language)
    return text


def date(day: datetime.date, style: Literal["full", "long"], language: str) -> str:
    """A date as it is written out: full has the day of the week, long has not."""
    return format_date(day, style, locale=language)


def _phrase(chance: int, language: str) -> str:
    chance, is_date = divmod(chance, 2)
    if is_date:
        chance, full = divmod(chance, 2)
        return date(datetime.date.fromordinal(_FIRST_DAY + chance % _NUM_DAYS), "full" if full else "long", language)
    chance, digits = divmod(chance, 9)
    return cardinal(chance % 10 ** (digits + 1), language)


@cache
def _words(number: int, language: str) -> str:
    text: str = num2words(number, lang=language)
    for theirs, ours in _SPELLING.get(language, {}).items():
        text = text.replace(theirs, ours)
    return text


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())
