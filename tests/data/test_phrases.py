"""What holds for the made-up pairs: the words are right, the parts are apart, and an index names one example."""

import datetime
import random
import time
from itertools import combinations, islice

import pytest
from num2words import num2words

from triglot.data.phrases import cardinal, date, example, examples, part_of

LANGUAGES = ("de", "fr", "cs")


@pytest.mark.parametrize(
    ("number", "english", "german", "french", "czech"),
    [
        (0, "zero", "null", "zéro", "nula"),
        (21, "twenty-one", "einundzwanzig", "vingt et un", "dvacet jedna"),
        (80, "eighty", "achtzig", "quatre-vingts", "osmdesát"),
        (101, "one hundred and one", "einhunderteins", "cent un", "sto jedna"),
        (200, "two hundred", "zweihundert", "deux cents", "dvě stě"),
        (1001, "one thousand and one", "eintausendeins", "mille un", "tisíc jedna"),
        (2222, "two thousand, two hundred and twenty-two", "zweitausendzweihundertzweiundzwanzig",
         "deux mille deux cent vingt-deux", "dva tisíce dvě stě dvacet dva"),
        (201_000, "two hundred and one thousand", "zweihunderteintausend", "deux cent un mille", "dvě stě jedna tisíc"),
        (5_000_500, "five million, five hundred", "fünf Millionen fünfhundert", "cinq millions cinq cents",
         "pět milionů pět set"),
    ],
)  # fmt: skip
def test_known_numbers_in_words(number, english, german, french, czech):
    assert [cardinal(number, language) for language in ("en", *LANGUAGES)] == [english, german, french, czech]


@pytest.mark.parametrize("language", ["en", "de", "fr"])
def test_numbers_are_the_librarys_but_for_its_slips(language):
    draw = random.Random(0)
    numbers = [
        *range(131),
        *(draw.randrange(10 ** draw.randint(3, 9)) for _ in range(499)),
        10**6,
        10**6 + 1,
        999_000_999,
    ]
    for number in numbers:
        assert cardinal(number, language) == num2words(number, lang=language).replace("einstausend", "eintausend")


def test_known_dates_in_words():
    day = datetime.date(1952, 3, 14)
    assert date(day, "full", "en") == "Friday, March 14, 1952"
    assert [date(day, "full", language) for language in LANGUAGES] == [
        "Freitag, 14. März 1952", "vendredi 14 mars 1952", "pátek 14. března 1952",
    ]  # fmt: skip
    assert [date(day, "long", language) for language in LANGUAGES] == [
        "14. März 1952", "14 mars 1952", "14. března 1952",
    ]  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_index_names_one_example(language):
    run = list(islice(examples(7, language, "train", start=11), 31))
    assert run == [example(7, index, language, "train") for index in range(11, 42)]
    assert run != list(islice(examples(8, language, "train", start=11), 31))


def test_the_parts_share_no_source_whatever_the_seed():
    parts = {
        part: {one.source for seed in (0, 1) for one in islice(examples(seed, "de", part), 251)}
        for part in ("train", "valid", "test")
    }
    for one, other in combinations(parts.values(), 2):
        assert not one & other
    for part, sources in parts.items():
        assert {part_of(source) for source in sources} == {part}


def test_both_numbers_and_dates_of_all_sizes_occur():
    sources = [one.source for one in islice(examples(0, "de", "train"), 997)]
    dates = [source for source in sources if source[-4:].isdigit()]
    assert 0.4 < len(dates) / len(sources) < 0.6
    assert sum("million" in source for source in sources) > 97
    assert sum("thousand" not in source and "million" not in source for source in sources if source not in dates) > 97


def test_an_epoch_is_made_in_seconds():
    began = time.process_time()
    assert sum(1 for _ in islice(examples(1, "cs", "train"), 5_000)) == 5_000
    assert time.process_time() - began < 2
