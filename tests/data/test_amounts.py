"""Numbers that are written for people are read as what they are, or not at all."""

import csv
import io

import numpy as np
import pandas as pd
import pytest

from firstlight.data import Table
from firstlight.data.amounts import decimal_marks, find_decimal_marks, read_amount
from firstlight.errors import UsageError
from tests.data.helpers import ready

GENERATOR = np.random.default_rng(0)
NUMBERS = [*GENERATOR.integers(-1_000_000, 10_000_000, 40).tolist(), 0, 950, 1000, 999_999]
AMBIGUOUS = ["1,234", "56,789", "123,456"]


def written(number, mark=".", separator=","):
    return f"{number:,}".translate({ord(","): separator, ord("."): mark})


@pytest.mark.parametrize("sign", ["{}", "{}%", "${}", "USD {}", "{} €", "€ {}"])
@pytest.mark.parametrize(("mark", "separator"), [(".", ","), (".", " "), (".", "\u2019"), (",", "."), (",", "\u202f")])
def test_numbers_are_read_back_from_every_notation(mark, separator, sign):
    for number in [*NUMBERS, *(number / 100 for number in NUMBERS)]:
        text = sign.format(written(abs(number), mark, separator))
        read, found = read_amount("\u2212" + text if number < 0 else text, mark)
        assert float(read) == number
        assert found == sign.replace("{}", "").strip()


@pytest.mark.parametrize(("mark", "separator"), [(".", ","), (",", ".")])
def test_reading_equals_that_of_pandas(mark, separator):
    texts = [written(number / 100, mark, separator) for number in NUMBERS]
    expected = pd.read_csv(io.StringIO("\n".join(texts)), sep=";", header=None, thousands=separator, decimal=mark)[0]
    assert [float(read_amount(text, mark)[0]) for text in texts] == expected.tolist()


OTHER = ["1.5k", "12 kg", "1,23,456", "0,123,456", "1,2345", "12:30", "$5%", "$", "1.2.3", "--5", "+1 555 123 456"]


@pytest.mark.parametrize("text", [*OTHER, "1,234 567", ""])
def test_other_texts_are_no_numbers(text):
    assert read_amount(text, ".") is None


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        (["1,234,567", "1,234"], ["."]),
        (["1,234.50", "1,234"], ["."]),
        (["0,250", "1,234"], [","]),
        (["1,234", "1,2"], [","]),
        (["1.234.567 €", "1.234 €"], [","]),
        (["12%", "5%"], ["."]),
        (["$1,234", "$5,678"], ["."]),
        (["1 234", "5 678"], ["."]),
        (AMBIGUOUS, [".", ","]),
        (["1,234%", "5%", *(f"{n},345%" for n in range(1, 20))], [".", ","]),
        (["€1.234", "€5.678"], [".", ","]),
        (["950", *(f"{n},345" for n in range(1, 20))], ["."]),
        (["950 €", *(f"{n}.345 €" for n in range(1, 20))], [","]),
        (["1200", *(f"{n},345" for n in range(1, 20))], [".", ","]),
        (["950", *AMBIGUOUS], [".", ","]),
        (["12%", "5"], []),
        (["$1,200", "€1,300"], []),
        (["1,234", "n. a."], []),
    ],
)
def test_decimal_mark_follows_from_the_whole_column(values, marks):
    assert decimal_marks(values) == decimal_marks(values[::-1]) == marks


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ({}, {}),
        ({"b": ["1.234", "5.678"]}, {}),
        ({"b": ["48.85", "2.35"]}, {"a": "."}),
        ({"b": ["48,85", "2,35"]}, {"a": ",", "b": ","}),
        ({"b": ["48.85", "2.35"], "c": ["1,5", "2"]}, {"c": ","}),
    ],
)
def test_ambiguous_column_follows_the_others_if_they_agree(others, found):
    assert find_decimal_marks({"a": ["", *AMBIGUOUS, "NA"], **others}) == found


HEADER = ["area", "share", "income", "rent", "price"]
MARKS = {"area": ".", "share": ".", "income": ".", "rent": ",", "price": ","}


def rows(count=60, seed=0):
    """Return rows of a table as people write them, and as computers do."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        area, share, income, rent = generator.integers(200, 200_000), *generator.uniform(0.1, 9000, 3).round(2)
        price = int(area + 10 * rent)
        gap = index % 9 == 4
        people = [f"{area:,}", f"{share}%", "" if gap else f"${income:,}", written(rent, ",", "."), f"{price} €"]
        yield people, [str(area), str(share), "" if gap else str(income), str(rent), str(price)]


def write(path, lines):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *lines])
    return str(path)


def tables(tmp_path):
    both = zip(*rows(), strict=True)
    people, plain = (write(tmp_path / f"{name}.csv", lines) for name, lines in zip("ab", both, strict=True))
    options = {"target": "price", "kind": "regression", "missing": "mean", "scale": "quantile"}
    return ready(Table(people, decimal_marks=MARKS, **options)), ready(Table(plain, **options))


def test_table_is_that_of_the_plain_numbers(tmp_path):
    people, plain = tables(tmp_path)
    for split in ("train", "val", "test"):
        for one, other in zip(people.tensors(split), plain.tensors(split), strict=True):
            assert one.equal(other)
    assert people.raw_numbers("test", np.arange(5)).equal(plain.raw_numbers("test", np.arange(5)))
    described = people.columns_described()
    assert {each["name"]: each.get("unit") for each in described} == {
        "area": None, "share": "%", "income": "$", "rent": None,
    }  # fmt: skip


def test_new_rows_are_read_as_the_training_rows_were(tmp_path):
    people, plain = tables(tmp_path)
    new, same = zip(*rows(20, seed=1), strict=True)
    expected = plain.prepare(write(tmp_path / "new.csv", same))[0].inputs
    frame = pd.DataFrame(new, columns=HEADER)
    frame.to_parquet(tmp_path / "new.parquet")
    numbers = frame.assign(rent=[float(row[3]) for row in same], area=[float(row[0]) for row in same])
    numbers.to_parquet(tmp_path / "numbers.parquet")
    for raw in (write(tmp_path / "new.csv", new), frame, frame.to_dict("records"), tmp_path / "new.parquet"):
        assert people.prepare(raw)[0].inputs.equal(expected)
    for raw in (numbers, numbers.to_dict("records"), tmp_path / "numbers.parquet"):
        assert people.prepare(raw)[0].inputs.equal(expected)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("share", "12", "line 3 column share is 12: other values have %, and all must have the same"),
        ("income", "€12", "line 3 column income is €12: other values have $, and all must have the same"),
        ("area", "12 kg", "line 3 column area is 12 kg: it must be a number with the decimal mark ."),
    ],
)
def test_value_that_does_not_agree_is_refused(column, value, message, tmp_path):
    people, _ = tables(tmp_path)
    lines = [line for line, _ in rows()]
    lines[1][HEADER.index(column)] = value
    path = write(tmp_path / "wrong.csv", lines)
    for refused in (lambda: people.prepare(path), Table(path, "price", decimal_marks=MARKS, missing="mean").setup):
        with pytest.raises(UsageError) as error:
            refused()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decimal_marks": {"aera": "."}}, "has no column aera; available: .*did you mean area"),
        ({"decimal_marks": {"area": ";"}}, "given decimal_marks={'area': ';'}: a mark must be . or ,"),
        ({"decimal_marks": MARKS, "categorical": ["area"]}, "given area in categorical and in decimal_marks"),
    ],
)
def test_wrong_decimal_marks_are_refused(options, message, tmp_path):
    path = write(tmp_path / "a.csv", [line for line, _ in rows()])
    with pytest.raises(UsageError, match=message):
        Table(path, "price", **options).setup()
