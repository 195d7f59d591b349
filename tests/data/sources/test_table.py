import csv
import re

import numpy as np
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from firstlight.data import Table
from firstlight.errors import UsageError
from tests.data.helpers import ready

HEADER = ["age", "city", "height", "colour", "label", "price", "part"]
CITIES, COLOURS, LABELS = ("Oslo", "Rome", "Bern"), ("red", "blue"), ("b", "a", "c")


def rows(count=60):
    generator = np.random.default_rng(0)
    return [
        [
            str(generator.integers(20, 60)),
            str(generator.choice(CITIES)),
            f"{generator.normal(170, 9):.1f}",
            str(generator.choice(COLOURS)),
            LABELS[index % 3],
            f"{generator.normal(9, 2):.2f}",
            "train" if index < 40 else "test",
        ]
        for index in range(count)
    ]


def write(path, lines, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return str(path)


def changed(row, column, value):
    lines = rows()
    lines[row][HEADER.index(column)] = value
    return lines


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "data.csv", rows())


INPUTS = {"columns": ["age", "city", "height", "colour"], "categorical": ["city", "colour"]}


def test_features_equal_those_of_scikit_learn(path):
    data = ready(Table(path, "label", "multiclass", **INPUTS))
    cells = np.array(rows(), object)
    train = cells[data.rows("train")]
    numbers, categories = StandardScaler(), OneHotEncoder(sparse_output=False)
    encode = ColumnTransformer([("numbers", numbers, [0, 2]), ("categories", categories, [1, 3])]).fit(train)
    expected = encode.transform(cells[data.rows("test")]).astype(float)
    assert expected.shape[1] == data.sizes()["in_features"] == 7
    assert data.sizes()["numeric_features"] == 2
    np.testing.assert_allclose(data.dataset("test").inputs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "kind", "kept", "names"),
    [
        ("label", "multiclass", lambda row: "abc".index(row[4]), ["a", "b", "c"]),
        ("colour", "binary", lambda row: [float(row[3] == "red")], ["blue", "red"]),
        ("price", "regression", lambda row: [float(row[5])], []),
        (["price", "age"], "regression", lambda row: [float(row[5]), float(row[0])], []),
    ],
)
def test_targets_match_their_kind(target, kind, kept, names, path):
    data = ready(Table(path, target, kind, ["height"]))
    assert data.class_names == names
    targets = data.dataset("val").targets
    assert targets.dtype == {"multiclass": torch.int64, "binary": torch.float32}.get(kind, torch.float64)
    np.testing.assert_allclose(targets, [kept(rows()[row]) for row in data.rows("val")], rtol=1e-6)


def test_multilabel_classes_are_named_by_their_columns(tmp_path):
    lines = [[str(index), str(index % 2), str(index % 3 // 2)] for index in range(40)]
    data = ready(Table(write(tmp_path / "a.csv", lines, ["x", "odd", "two"]), ["odd", "two"], "multilabel"))
    assert data.class_names == ["odd", "two"]
    expected = [[row % 2, row % 3 // 2] for row in data.rows("train")]
    assert data.dataset("train").targets.tolist() == expected


def test_default_inputs_are_all_columns_except_target_and_split(path):
    data = ready(Table(path, "price", "regression", categorical=["city", "colour", "label"], split="part"))
    assert data.dataset("train").inputs.shape[1] == 2 + 3 + 2 + 3
    assert set(data.rows("test")) == set(range(40, 60))


def test_category_that_no_training_row_has_is_encoded_as_zeros_and_told(tmp_path, caplog):
    lines = rows()
    for line in lines[40:]:
        line[1] = "Lima"
    caplog.clear()
    data = ready(Table(write(tmp_path / "a.csv", lines), "label", "multiclass", ["city"], ["city"], split="part"))
    assert data.state_dict()["categories"] == {"city": sorted(CITIES)}
    assert data.dataset("test").inputs.tolist() == [[0, 0, 0]] * 20
    (warning,) = caplog.messages
    assert warning.endswith("column city has categories that no training row has: Lima; they are encoded as zeros")


def test_missing_mean_fills_numbers_and_categories_with_the_mean(tmp_path):
    lines = rows()
    lines[3][0] = lines[3][1] = ""
    path = write(tmp_path / "a.csv", lines)
    with pytest.raises(UsageError, match=r"a\.csv: 1 row .* line 5 column age \(empty\), line 5 column city \(empty\)"):
        Table(path, "label", "multiclass", **INPUTS).setup()
    data = ready(Table(path, "label", "multiclass", **INPUTS, missing="mean"))
    (split,) = (split for split in data.indices if 3 in data.rows(split))
    inputs = data.dataset(split).inputs[data.rows(split).tolist().index(3)]
    shares = [np.mean([rows()[row][1] == city for row in data.rows("train") if row != 3]) for city in sorted(CITIES)]
    torch.testing.assert_close(inputs[[0, 2, 3, 4]], torch.tensor([0, *shares]).float())
    assert ready(Table(path, "label", "multiclass", **INPUTS, missing="drop")).dropped == 1


def predict(trained, path, **options):
    data = Table(path, "label", "multiclass", **{**INPUTS, **options})
    data.load_state_dict(trained.state_dict())
    return torch.cat([inputs for inputs, _ in data.predict_dataloader()]), data


def test_new_file_is_encoded_with_the_fitted_state_of_the_checkpoint(path, tmp_path):
    trained = ready(Table(path, "label", "multiclass", **INPUTS))
    place = trained.rows("test")[:4]
    lines = [[rows()[row][HEADER.index(name)] for name in ("colour", "height", "city", "age")] for row in place]
    new = write(tmp_path / "new.csv", [["extra", *line] for line in lines], ["x", "colour", "height", "city", "age"])
    for columns in (INPUTS["columns"], None):
        inputs, data = predict(trained, new, columns=columns)
        torch.testing.assert_close(inputs, trained.dataset("test").inputs[:4])
        assert data.class_names == ["a", "b", "c"]
        with pytest.raises(
            UsageError, match=r"^only predict works .*new\.csv has no column label; available: x, colour"
        ):
            data.test_dataloader()


def test_new_file_with_fewer_classes_keeps_their_indices(path, tmp_path):
    trained = ready(Table(path, "label", "multiclass", **INPUTS))
    _, data = predict(trained, write(tmp_path / "new.csv", [line for line in rows() if line[4] == "c"]))
    assert data.dataset("test").targets.tolist() == [2] * 20


NEW = {
    "an unknown class": (
        changed(7, "label", "d"),
        HEADER,
        {},
        "new.csv: line 9 column label is d, .*classes a, b, c",
    ),
    "a number for a class": (changed(7, "label", "1"), HEADER, {}, "line 9 column label is 1, .*classes a, b, c"),
    "a missing column": ([["1"]], ["age"], {}, r"new\.csv has no column city; available: age"),
    "other columns": (rows(), HEADER, {"columns": ["age"], "categorical": []}, r"on the columns \['age', 'city',"),
}


@pytest.mark.parametrize(("lines", "header", "options", "message"), NEW.values(), ids=NEW)
def test_new_file_that_does_not_fit_the_checkpoint_is_refused(lines, header, options, message, path, tmp_path):
    trained = ready(Table(path, "label", "multiclass", **INPUTS))
    with pytest.raises(UsageError, match=message):
        predict(trained, write(tmp_path / "new.csv", lines, header), **options)


BAD = {
    "text among numbers": (changed(5, "height", "tall"), {}, r"^.*data\.csv: 1 row .* line 7 column height \(tall\)"),
    "infinity": (changed(5, "age", "inf"), {"missing": "mean"}, r"line 7 column age \(inf\)"),
    "an empty label": (changed(5, "label", ""), {"missing": "mean"}, r"line 7 column label \(empty\)"),
    "no such target": (
        rows(),
        {"target": "lable"},
        r"data\.csv has no column lable; available: .*; did you mean label\?",
    ),
    "no such input": (
        rows(),
        {"columns": ["aeg"], "categorical": []},
        r"has no column aeg; available: .*; did you mean age\?",
    ),
    "no such category": (rows(), {"categorical": ["town"]}, "has no column town; available: age, city, height, colour"),
    "no such split": (rows(), {"split": "prat"}, r"has no column prat; available: .*; did you mean part\?"),
    "an unknown split": (
        changed(5, "part", "vla"),
        {"split": "part"},
        "data.csv: line 7 has split=vla: it must be one",
    ),
    "no test split": ([[*line[:6], "train"] for line in rows()], {"split": "part"}, "the test split is empty"),
    "a class with one sample": (changed(5, "label", "z"), {}, r"data\.csv: class z has too few samples \(line 7\)"),
    "three classes for two": (
        rows(),
        {"kind": "binary"},
        "label has 3 classes, a, b, c: kind=binary must have 2",
    ),
    "labels that are neither 0 nor 1": (
        rows(),
        {"target": ["age", "price"], "kind": "multilabel", "columns": ["height"], "categorical": []},
        "line 2 has the label",
    ),
    "an input that is the target": (
        rows(),
        {"columns": ["age", "label"], "categorical": []},
        "column label is an input and",
    ),
    "a target twice": (
        rows(),
        {"target": ["age", "age"], "kind": "regression", "columns": ["height"], "categorical": []},
        r"target=\['age', 'age'\]: age is named twice",
    ),
    "an input twice": (rows(), {"columns": ["age", "age"], "categorical": []}, "column age is an input twice"),
    "an integer beyond float64": (
        changed(5, "age", str(2**53 + 1)),
        {},
        r"line 7 column age is 9007199254740993, which float64 rounds: leave age out, or name it in categorical",
    ),
    "a target beyond float64": (
        changed(5, "price", str(2**60 + 1)),
        {"target": "price", "kind": "regression"},
        r"line 7 column price is 1152921504606846977, which float64 rounds: subtract one constant from all values",
    ),
    "a word for a truth value": (
        [[*line[:4], "yes", *line[5:]] for line in rows()],
        {"target": ["label", "price"], "kind": "multilabel", "columns": ["height"], "categorical": []},
        r"line 2 column label \(yes\) is a word: write 1 or 0",
    ),
    "no target at all": (
        [[*line[:4], "NA", *line[5:]] for line in rows()],
        {"missing_targets": "drop"},
        r"data\.csv has no target in any row",
    ),
    "an empty column": (
        [[*line[:2], "NA", *line[3:]] for line in rows()],
        {"missing": "mean"},
        r"data\.csv: column height has no value in the training split: leave it out with ignore=\[height\]",
    ),
    "an empty category": (
        [[line[0], "?", *line[2:]] for line in rows()],
        {"missing": "mean"},
        r"data\.csv: column city has no value in the training split: leave it out with ignore=\[city\]",
    ),
    "words as target of a regression": (
        rows(),
        {"kind": "regression"},
        r"no numbers in label \(b, \.\.\.\): kind=regression needs numbers, kind=multiclass takes classes$",
    ),
    "one class": ([[*line[:4], "a", *line[5:]] for line in rows()], {}, "all samples have the class a: there must be"),
    "an empty split": (changed(5, "part", " "), {"split": "part"}, "line 7 has split=empty: it must be one"),
    "a very long text": (
        changed(5, "age", "1" * 5000),
        {},
        r"line 7 column age \(1{40}\.\.\.\); missing=drop drops such",
    ),
    "too few values": ([*rows(), ["1"]], {}, r"data\.csv: line 62 has 1 value, but the header has 7 columns"),
    "no rows": ([], {}, r"data\.csv has no rows below its header"),
}


@pytest.mark.parametrize(("lines", "options", "message"), BAD.values(), ids=BAD)
def test_file_that_cannot_be_trained_on_is_refused(lines, options, message, tmp_path):
    options = {"target": "label", "kind": "multiclass", **INPUTS, **options}
    with pytest.raises(UsageError, match=message):
        Table(write(tmp_path / "data.csv", lines), **options).setup()


@pytest.mark.parametrize(
    ("target", "kind", "found"),
    [
        (["a", "b"], "binary", "2 targets: it must have 1"),
        (["a", "b"], "multiclass", "2 targets: it must have 1"),
        ("a", "multilabel", "1 target: it must have one for each label"),
    ],
)
def test_wrong_number_of_targets_is_refused(target, kind, found):
    with pytest.raises(UsageError, match=f"Table was given kind={kind} and {found}"):
        Table("data.csv", target, kind)


def test_unknown_categories_of_a_new_file_give_zeros_and_one_warning(path, tmp_path, caplog):
    trained = ready(Table(path, "label", "multiclass", **INPUTS))
    lines = rows()
    lines[0][1], lines[1][1] = "Lima", "Kyiv"
    caplog.clear()
    inputs, _ = predict(trained, write(tmp_path / "new.csv", lines))
    assert inputs[:2, 2:5].tolist() == [[0, 0, 0]] * 2
    assert inputs[2:, 2:5].sum(1).tolist() == [1] * (len(lines) - 2)
    warnings = [line for line in caplog.messages if "city" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith(
        "column city has categories that the checkpoint does not know: Kyiv, Lima; they are encoded as zeros"
    )


def test_rare_categories_of_the_training_split_are_known(tmp_path, caplog):
    cities = ["Oslo", "Rome"] * 30 + ["Bern", "Ulm", "Bonn"]
    lines = [[city, "ab"[index % 2], "val" if 4 < index < 15 else "train"] for index, city in enumerate(cities)]
    path = write(tmp_path / "a.csv", [*lines, *[["Oslo", each, "test"] for each in "ab"]], ["city", "y", "part"])
    options = {"kind": "multiclass", "categorical": ["city"], "split": "part", "min_frequency": 3}
    trained = ready(Table(path, "y", **options))
    assert not caplog.records
    assert trained.state_dict()["categories"]["city"] == ["Oslo", "Rome"]
    again = Table(path, "y", **options)
    again.load_state_dict(trained.state_dict())
    again.prepare(path)
    assert not caplog.records
    new = write(tmp_path / "new.csv", [["Ulm", "a", ""], ["Lima", "b", ""]], ["city", "y", "part"])
    features = again.prepare(new)[0].inputs
    assert "column city has categories that the checkpoint does not know: Lima; they are encoded as rare" in caplog.text
    assert features.tolist() == [[0, 0, 1]] * 2


@pytest.mark.parametrize("text", ["", "NA", "nan", "N/A", "null", "?", "   "])
def test_missing_value_is_missing_as_number_category_and_label(text, tmp_path):
    found = {}
    for column in ("age", "city", "label"):
        path = write(tmp_path / "data.csv", changed(5, column, text))
        shown = text.strip() or "empty"
        with pytest.raises(UsageError) as error:
            Table(path, "label", "multiclass", **INPUTS).setup()
        assert f"1 row with missing or invalid values: line 7 column {column} ({shown});" in str(error.value)
        found[column] = ready(Table(path, "label", "multiclass", **INPUTS, missing="drop", missing_targets="drop"))
    assert [data.dropped for data in found.values()] == [1, 1, 1]
    assert all(data.class_names == ["a", "b", "c"] for data in found.values())
    assert found["city"].state_dict()["categories"]["city"] == sorted(CITIES)


@pytest.mark.parametrize(
    ("first", "second"), [("a", " a"), ("a", "a "), ("0", "0.0"), ("New York", "New  York"), ("a", ' "a"'), ("é", "é")]
)
def test_spellings_of_a_label_or_category_are_one(first, second, tmp_path):
    spelt = [*[first, second] * 20, *["z"] * 20]
    generator = np.random.default_rng(0)
    lines = [[str(index), generator.choice(spelt), label] for index, label in enumerate(spelt)]
    data = ready(Table(write(tmp_path / "a.csv", lines, ["x", "c", "y"]), "y", "binary", categorical=["c"]))
    assert data.class_names == sorted([first, "z"])
    assert data.state_dict()["categories"] == {"c": sorted([first, "z"])}
    for split in ("train", "val", "test"):
        assert data.dataset(split).targets[:, 0].tolist() == [
            data.class_names.index("z" if row >= 40 else first) for row in data.rows(split)
        ]


def test_new_file_may_spell_its_labels_and_categories_otherwise(tmp_path, caplog):
    lines = [[str(index), str(index % 3 % 2), str(index % 2)] for index in range(60)]
    trained = ready(Table(write(tmp_path / "a.csv", lines, ["x", "c", "y"]), "y", "multiclass", categorical=["c"]))
    floats = [[x, f"{c}.0", f"{y}.0 "] for x, c, y in lines]
    data = Table(write(tmp_path / "b.csv", floats, ["x", " c ", "y"]), "y", "multiclass", categorical=["c"])
    data.load_state_dict(trained.state_dict())
    inputs, targets = data.tensors("test")
    rows = trained.rows("train")
    torch.testing.assert_close(inputs[rows], trained.dataset("train").inputs)
    assert targets.tolist() == [index % 2 for index in range(60)]
    assert not [line for line in caplog.messages if "encoded as zeros" in line]


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        (["yes", "Yes"], "column y has Yes and yes, which count as different values"),
        (["1", "01"], "column y has 01 and 1, which count as different values"),
        (["a", "\uff41"], "column y has a and \uff41, which count as different values"),
        (["b", "'b'"], "column y has 'b' and b, which count as different values"),
        (["Null", "a"], "column y has the value Null: leave the cell empty if it means a missing value"),
    ],
)
def test_labels_that_look_alike_are_told(values, warning, tmp_path, caplog):
    lines = [[str(index), values[index % 2]] for index in range(40)]
    ready(Table(write(tmp_path / "a.csv", lines, ["x", "y"]), "y", "multiclass"))
    assert [line for line in caplog.messages if line.endswith(warning)]


def test_new_file_with_an_empty_target_column_is_predicted(path, tmp_path):
    trained = ready(Table(path, "label", "multiclass", **INPUTS))
    lines = [[*line[:4], "", *line[5:]] for line in rows()]
    inputs, data = predict(trained, write(tmp_path / "new.csv", lines))
    assert len(inputs) == 60
    with pytest.raises(UsageError, match=r"only predict works without targets: .*new\.csv has no target in any row"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("column", "values", "finding"),
    [
        ("age", lambda row: "7", "column age (7) has one value in all rows: leave it out with ignore=[age]"),
        ("city", lambda row: "Rome", "column city (Rome) has one value in all rows: leave it out with ignore=[city]"),
        (
            "city",
            lambda row: f"A{row}",
            "column city (42 different values in 42 rows) identifies rows and cannot help with new ones: leave it out "
            "with ignore=[city]",
        ),
        (
            "age",
            lambda row: str(row + 1),
            "column age (it counts the rows) identifies rows and cannot help with new ones: leave it out with "
            "ignore=[age]",
        ),
        (
            "age",
            lambda row: f"2024{row % 12 + 1:02}{row % 28 + 1:02}",
            "column age (2024DATE) seems to hold dates: name it in dates=[age]",
        ),
    ],
)
def test_column_without_use_is_told(column, values, finding, tmp_path):
    lines = rows()
    for row, line in enumerate(lines):
        line[HEADER.index(column)] = values(row)
    data = ready(Table(write(tmp_path / "a.csv", lines), "label", "multiclass", **INPUTS))
    assert finding in [re.sub("2024[0-9]{4}", "2024DATE", str(each)) for each in data.findings()]


def test_integers_beyond_float64_are_different_classes_and_categories(tmp_path):
    ids = [str(2**53), str(2**53 + 1)]
    lines = [[ids[index % 2], ids[index % 3 % 2]] for index in range(60)]
    data = ready(Table(write(tmp_path / "a.csv", lines, ["c", "y"]), "y", "multiclass", categorical=["c"]))
    assert data.class_names == data.state_dict()["categories"]["c"] == ids
    assert data.dataset("train").targets.tolist() == [row % 3 % 2 for row in data.rows("train")]


@pytest.mark.parametrize("kept", [1, 5])
@pytest.mark.parametrize(("text", "kind"), [("1,234", "a number with"), ("2024-01-31", "a date"), ("$5", "an amount")])
def test_column_in_another_notation_is_told_as_what_it_is(text, kind, kept, tmp_path):
    lines = [[str(index) if index % kept else text, "ab"[index % 2]] for index in range(40)]
    path = write(tmp_path / "a.csv", lines, ["x", "y"])
    with pytest.raises(UsageError) as error:
        Table(path, "y", "multiclass", missing="drop").setup()
    assert f"a.csv: line 2 column x ({text}) is {kind}" in str(error.value)


def test_text_without_a_number_asks_for_categorical(path):
    found = r"data\.csv: no numbers in city \(\w+, \.\.\.\), colour \(\w+, \.\.\.\): .*categorical=\[city,colour\]"
    with pytest.raises(UsageError, match=found):
        Table(path, "label", "multiclass", ["age", "city", "colour"]).setup()
