import math

import pytest

from firstlight.errors import UsageError, about, check_range, did_you_mean, innermost_statement, root_cause


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5, 0.999], [-1e-9, 1, 1.5]),
        ("(0, 1]", [1e-9, 1], [0, 1.001]),
        ("[1, inf)", [1, 10**9], [0, -1, 0.5]),
        ("(0, inf)", [1e-9, 5], [0, math.inf]),
    ],
)
def test_check_range_follows_the_interval(interval, inside, outside):
    for value in inside:
        check_range("Part", interval, size=value)
    for value in [*outside, math.nan]:
        with pytest.raises(UsageError, match=r"Part was given size="):
            check_range("Part", interval, size=value)


@pytest.mark.parametrize(
    ("interval", "value", "message"),
    [
        ("[0, 1)", 1.5, "MLP was given dropout=1.5: it must be in [0, 1)"),
        ("[1, inf)", 0, "MLP was given dropout=0: it must be at least 1"),
        ("(0, inf)", 0, "MLP was given dropout=0: it must be above 0"),
        ("[1, inf)", (3, 0), "MLP was given dropout=(3, 0): each must be at least 1"),
    ],
)
def test_check_range_names_owner_value_and_rule(interval, value, message):
    with pytest.raises(UsageError) as refused:
        check_range("MLP", interval, dropout=value)
    assert str(refused.value) == message


def test_check_range_names_the_first_wrong_value():
    with pytest.raises(UsageError, match="second=-1"):
        check_range("Part", "[0, inf)", first=0, second=-1, third=-2)


@pytest.mark.parametrize(
    ("word", "hint"), [("val/los", "val/loss"), ("VAL/LOSS", "val/loss"), ("val", "val/loss"), ("x", None), ("", None)]
)
def test_did_you_mean_finds_typing_errors_other_capitals_and_beginnings(word, hint):
    assert did_you_mean(word, ["val/loss", "lr"]) == (f"; did you mean {hint}?" if hint else "")


def test_about_names_the_source_and_leaves_other_exceptions_alone():
    with pytest.raises(UsageError, match=r"^a\.csv: no row$"), about("a.csv"):
        raise UsageError("no row")
    with pytest.raises(KeyError, match="a bug"), about("a.csv"):
        raise KeyError("a bug")


def test_root_cause_is_the_first_usage_error_or_the_end_of_the_chain():
    wrong, bug = UsageError("wrong"), KeyError("bug")
    wrong.__cause__ = bug
    outer = ValueError("outer")
    outer.__cause__ = wrong
    assert root_cause(outer) is wrong
    outer.__cause__ = bug
    assert root_cause(outer) is bug
    assert root_cause(bug) is bug


def test_innermost_statement_drops_the_outer_lines():
    message = """Parser key "trainer":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'int'>, <class 'NoneType'>]
      Errors:
        - Expected a <class 'int'>. Got value: abc
        - Expected a <class 'NoneType'>
      Given value type: <class 'str'>
      Given value: abc"""
    assert innermost_statement(message) == "expected int, got abc"
