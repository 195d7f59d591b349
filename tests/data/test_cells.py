import numpy as np
import pytest

from firstlight.data.cells import MISSING, codes, distinct, is_missing, notation, same, warn_doubtful

NOTATIONS = {
    "a date": "2024-01-31 31/01/2024 1.2.24 2024/1/3 2024-01-31T10:00:00Z 2024-01 Jan-2024 31-Jan-2024".split(),
    "a time": ["10:30", "10:30:05", "9:05 pm"],
    "a percentage": ["12%", "-3.5 %"],
    "an amount of money": ["$12.50", "-$3", "12 €", "€1,234.50", "1.234,50 EUR", "USD 7"],
    "a number with a thousands separator or a decimal comma": ["1,234", "-12,345"],
    "a number with thousands separators": [
        "1,234,567",
        "1,234.5",
        "1 234",
        "1\u00a0234",
        "1'234",
        "1\u2019234",
        "1.234.567",
        "1_000",
    ],
    "a number with a decimal comma": ["3,14", "-0,5", ",5", "1.234,5", "0,123"],
    "a negative number in another notation": ["\u22125", "(1,234)", "5-"],
    "a word": ["True", "no"],
    "a number with a unit": ["12 kg", "1.5k", "20°C"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in NOTATIONS.items() for text in texts])
def test_number_in_another_notation_is_told_as_what_it_is(kind, text):
    assert notation(f" {text} ").split(":")[0] == kind


@pytest.mark.parametrize("text", ["apple", "4A", "Rome, Italy", "May", "A-12", "1e5", "-2.5", "inf", "1/2", ""])
def test_other_texts_are_no_notation_of_a_number(text):
    assert notation(text) == ""


@pytest.mark.parametrize("text", sorted(MISSING))
def test_missing_value_is_one_notion_for_texts(text):
    assert all(map(is_missing, (text, f" {text}\t", f"\u00a0{text}\ufeff", f' "{text}"')))
    assert distinct(np.array([text, "a"], object)) == ["a"]


@pytest.mark.parametrize("value", ["0", 0, 0.0, False, "no", "-", "Nan Goldin", "Na"])
def test_other_values_are_not_missing(value):
    assert not is_missing(value)


def test_spellings_of_a_name_are_one_name():
    labels = np.array(
        ["b", " b", "b\u00a0", "New  York", "New York", "2.0", "2", "+2", "a\u0301", "\u00e1", "NA"], object
    )
    names = distinct(labels)
    assert names == ["2", "New York", "b", "\u00e1"]
    assert codes(labels, names).tolist() == [2, 2, 2, 1, 1, 0, 0, 0, 3, 3, "NA"]


def test_spelling_of_a_file_is_kept_where_it_is_the_only_one():
    assert distinct(np.array(["1.0", "0.0", "1.10", "01"], object)) == ["0.0", "01", "1.0", "1.10"]


def test_integers_beyond_float64_stay_different_names():
    assert same(str(2**53)) != same(str(2**53 + 1))


def test_names_that_look_alike_have_one_line_for_a_column(caplog):
    warn_doubtful([each + letter for letter in "abcdefg" for each in "xX"], "a.csv: column b")
    pairs = ", ".join(f"x{letter} and X{letter}" for letter in "abcde")
    assert caplog.messages == [f"a.csv: column b has {pairs}, and 2 more pairs, which count as different values"]
