import numpy as np
import pytest

from firstlight.data import clean as module
from firstlight.data.samples import Samples
from firstlight.errors import UsageError


def clean(inputs, targets, missing="refuse", missing_targets="refuse", **fields):
    samples, rows = module.clean(Samples(np.asarray(inputs), np.asarray(targets), **fields), missing, missing_targets)
    return samples.inputs, samples.targets, rows


BAD = {
    "nan": (
        [[0.0], [np.nan]],
        [0, 1],
        {},
        r"^1 row with missing or invalid values: row 1 column 0 \(nan\); missing=drop",
    ),
    "infinity": ([[0.0, np.inf]], [0], {}, r"row 0 column 1 \(inf\)"),
    "too large for float32": ([[1.0], [1e39]], [0, 1], {}, r"row 1 column 0 \(1e\+39\)"),
    "text": ([["1", "apple"]], [0], {}, r"row 0 column 1 \(apple\)"),
    "an empty field": ([["1", ""]], [0], {}, r"row 0 column 1 \(empty\)"),
    "None": (np.array([[1, None]], object), [0], {}, r"row 0 column 1 \(empty\)"),
    "a named column": ([["1", "x"]], [0], {"columns": ["age", "height", "price"]}, r"row 0 column height \(x\)"),
    "a flattened sample": (np.full((1, 2, 3), [1, 2, np.nan]), [0], {}, r"row 0 column 2 .*row 0 column 5"),
    "a target": ([[0.0]] * 3, [0, np.nan, 1], {}, r"^1 row .*: row 1 target \(nan\)"),
    "a named target": ([["1", "2"]], ["x"], {"columns": ["age", "height", "price"]}, r"row 0 column price \(x\)"),
    "a target of integer inputs": (np.zeros((2, 3), np.uint8), [0, np.nan], {}, r"row 1 target \(nan\)"),
    "many": (
        np.full((9, 1), np.nan),
        np.arange(9),
        {},
        r"^9 rows .*row 0 .*row 1 .*row 2 column 0 \(nan\), \.\.\.; missing=drop drops such rows, missing=mean fills",
    ),
    "other lengths": (np.zeros((3, 1)), np.zeros(2), {}, "3 inputs, but 2 targets"),
    "no sample": (np.zeros((0, 3)), np.zeros(0), {}, "there are no samples"),
    "no column": (np.zeros((3, 0)), np.zeros(3), {}, r"shape \(3, 0\): .* with no empty axis"),
    "one axis": (np.zeros(3), np.zeros(3), {}, r"shape \(3,\): they must be \(samples, columns, \.\.\.\)"),
    "unsigned integers": (np.zeros((3, 1), np.uint16), np.zeros(3), {}, "inputs are uint16: use uint8 for pixels"),
    "a negative token": ([[1, 2], [3, -1]], [0, 1], {}, "row 1 column 1 is -1: tokens must be at least 0"),
    "a negative label": (
        [[0.0]] * 3,
        [0, 1, -1],
        {"class_names": ["a", "b"]},
        "row 2 has the label -1: labels must be integers from 0 to 1, the classes are a, b",
    ),
    "a label too large": (
        [[0.0]] * 3,
        [0, 2, 1],
        {"class_names": ["a", "b"]},
        "row 1 has the label 2: .* 0 to 1, .* a, b",
    ),
    "a fraction as label": ([[0.0]] * 2, [0, 0.5], {"class_names": ["a", "b"]}, r"row 1 has the label 0\.5"),
    "neither 0 nor 1": (
        [[0.0]] * 2,
        [[0], [2]],
        {"class_names": ["a", "b"]},
        "row 1 has the label 2: labels must be integers from 0 to 1",
    ),
    "one name for two classes": ([[0.0]] * 2, [[0], [1]], {"class_names": ["a"]}, r"\(2, 1\) do not fit 1 class name"),
    "two names for three columns": ([[0.0]], [[0, 1, 1]], {"class_names": ["a", "b"]}, r"\(1, 3\) do not fit 2 class"),
}


@pytest.mark.parametrize(("inputs", "targets", "fields", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_refused_by_row_and_column(inputs, targets, fields, message):
    with pytest.raises(UsageError, match=message):
        clean(inputs, targets, **fields)


def test_messages_name_the_loaded_row_after_others_were_dropped():
    with pytest.raises(UsageError, match="row 2 has the label 7"):
        clean([[np.nan], [0], [0]], [0, 1, 7], "drop", class_names=["a", "b"])


def test_text_of_numbers_becomes_numbers():
    inputs, _, rows = clean(np.array([["1", "2.5"], ["-3", "4e2"]]), np.arange(2))
    assert inputs.tolist() == [[1, 2.5], [-3, 400]]
    assert (inputs.dtype, rows.tolist()) == (np.float64, [0, 1])


def test_missing_drop_drops_bad_rows_with_their_targets():
    inputs = np.arange(10.0).reshape(5, 2, 1)
    inputs[1, 0] = np.nan
    inputs[3, 1] = np.inf
    kept, targets, rows = clean(inputs, np.arange(5), "drop")
    assert kept.tolist() == [[[0], [1]], [[4], [5]], [[8], [9]]]
    assert targets.tolist() == rows.tolist() == [0, 2, 4]


def test_missing_drop_of_all_rows_is_refused():
    with pytest.raises(UsageError, match=r"^no row is left: 2 rows with .* row 0 column 0"):
        clean(np.full((2, 2), np.nan), np.arange(2), "drop")


@pytest.mark.parametrize("missing", [np.nan, None, "", "NA", "N/A", "null", "?", "  ", "\u200bnan "])
def test_missing_mean_keeps_missing_inputs_as_nan(missing):
    inputs, _, _ = clean(np.array([["1", missing]], object), [0], "mean")
    np.testing.assert_array_equal(inputs, [[1, np.nan]])


@pytest.mark.parametrize("bad", [np.inf, "apple"])
def test_missing_mean_refuses_invalid_values(bad):
    with pytest.raises(UsageError, match=r"row 0 column 1 \(.*\); missing=drop drops such rows$"):
        clean(np.array([[1, bad]], object), [0], "mean")


def test_missing_mean_refuses_missing_targets():
    with pytest.raises(
        UsageError, match=r"row 1 target \(nan\); missing_targets=drop drops rows without a valid target$"
    ):
        clean(np.zeros((2, 1)), [0, np.nan], "mean")


def test_inputs_are_filled_while_rows_without_a_target_are_dropped():
    inputs, targets, rows = clean([[np.nan], [1], [2]], [0, np.nan, 1], "mean", "drop")
    np.testing.assert_array_equal(inputs, [[np.nan], [2]])
    assert (targets.flatten().tolist(), rows.tolist()) == ([0, 1], [0, 2])


ADVICE = {"missing=drop", "missing=mean", "missing_targets=drop"}
FAULTS = {"nan": np.nan, "inf": np.inf, "text": "apple", "none": None}


@pytest.mark.parametrize("missing", ["refuse", "drop", "mean"])
@pytest.mark.parametrize("missing_targets", ["refuse", "drop"])
@pytest.mark.parametrize("value", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("target", [0, *FAULTS.values()], ids=["valid", *FAULTS])
def test_each_advice_of_a_message_helps_and_is_not_set_already(missing, missing_targets, value, target):
    def attempt(missing, missing_targets):
        try:
            clean(
                np.array([[value], [1], [2], [3]], object),
                np.array([0, target, 1, 0], object),
                missing,
                missing_targets,
            )
        except UsageError as error:
            return str(error)
        return ""

    message = attempt(missing, missing_targets)
    given = [advice for advice in ADVICE if f"{advice} " in message]
    assert not {f"missing={missing}", f"missing_targets={missing_targets}"} & {*given}
    assert bool(given) == bool(message)
    for advice in given:
        followed = dict(missing=missing, missing_targets=missing_targets) | dict([advice.split("=")])
        again = attempt(**followed)
        option = advice.split("=")[0] + "="
        assert f"{option}drop drops" not in again


@pytest.mark.parametrize("missing", ["refuse", "drop", "mean"])
def test_numbers_in_another_notation_are_refused_even_if_rows_may_be_dropped(missing):
    with pytest.raises(UsageError, match=r"^row 1 column 0 \(1,050\) is a number with a thousands separator"):
        clean(np.array([["950"], ["1,050"], ["apple"]]), np.zeros(3), missing, "drop")
    with pytest.raises(UsageError, match=r"^row 1 target \(1,050\) is a number with a thousands separator"):
        clean(np.zeros((2, 1)), np.array(["950", "1,050"]), missing, "drop")


def test_padding_cannot_be_filled():
    with pytest.raises(UsageError, match=r"row 0 without a token; missing=drop drops such rows$"):
        clean(np.array([[0, 0], [1, 0]]), [0, 1])


@pytest.mark.parametrize(
    ("targets", "names", "shape", "kind"),
    [
        (np.array([0, 1], np.uint8), ["a", "b"], (2,), np.int64),
        (np.array([0.0, 1.0]), ["a", "b"], (2,), np.int64),
        (np.array([True, False]), ["a", "b"], (2,), np.int64),
        (np.array([[0], [1]]), ["a", "b"], (2, 1), np.float32),
        (np.array([[0, 1, 1], [1, 1, 0]], bool), ["a", "b", "c"], (2, 3), np.float32),
        (np.array([0.5, 1.5]), [], (2, 1), np.float64),
        (np.array([[0.5, 1.5], [1, 2]]), [], (2, 2), np.float64),
        (np.array([[5, 6, 7], [8, 9, 9]], np.int16), [], (2, 3), np.int16),
        (np.array([5, 6], np.uint8), [], (2,), np.int64),
    ],
)
def test_targets_have_the_documented_shape_and_type(targets, names, shape, kind):
    found = clean(np.zeros((2, 1)), targets, class_names=names)[1]
    assert (found.shape, found.dtype) == (shape, kind)
    assert found.flatten().tolist() == targets.flatten().tolist()


def test_integer_targets_keep_every_digit():
    assert clean(np.zeros((1, 1)), [2**24 + 1])[1].tolist() == [2**24 + 1]
