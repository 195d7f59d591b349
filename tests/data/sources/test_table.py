import csv

import numpy as np
import pytest
import torch
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


def test_features_are_those_of_scikit_learn(path):
    data = ready(Table(path, "label", "multiclass", **INPUTS))
    cells = np.array(rows(), object)
    train = cells[data.rows("train")]
    encoded = []
    for split in ("train", "test"):
        part = cells[data.rows(split)]
        columns = []
        for place in range(4):
            column = part[:, [place]]
            if place in (1, 3):
                column = OneHotEncoder(sparse_output=False).fit(train[:, [place]]).transform(column)
            columns.append(column.astype(float))
        encoded.append(np.hstack(columns))
    expected = StandardScaler().fit(encoded[0]).transform(encoded[1])
    assert expected.shape[1] == 7
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
def test_targets_are_what_their_kind_says(target, kind, kept, names, path):
    data = ready(Table(path, target, kind, ["height"]))
    assert data.class_names == names
    targets = data.dataset("val").targets
    assert targets.dtype == (torch.int64 if kind == "multiclass" else torch.float32)
    np.testing.assert_allclose(targets, [kept(rows()[row]) for row in data.rows("val")], rtol=1e-6)


def test_several_labels_are_named_by_their_columns(tmp_path):
    lines = [[str(index), str(index % 2), str(index % 3 // 2)] for index in range(40)]
    data = ready(Table(write(tmp_path / "a.csv", lines, ["x", "odd", "two"]), ["odd", "two"], "multilabel"))
    assert data.class_names == ["odd", "two"]
    expected = [[row % 2, row % 3 // 2] for row in data.rows("train")]
    assert data.dataset("train").targets.tolist() == expected


def test_all_columns_but_the_target_and_the_split_are_inputs_by_default(path):
    data = ready(Table(path, "price", "regression", categorical=["city", "colour", "label"], split="part"))
    assert data.dataset("train").inputs.shape[1] == 2 + 3 + 2 + 3
    assert set(data.rows("test")) == set(range(40, 60))


def test_a_category_that_no_training_row_has_is_none_of_them(tmp_path):
    lines = rows()
    for line in lines[40:]:
        line[1] = "Lima"
    data = ready(Table(write(tmp_path / "a.csv", lines), "label", "multiclass", ["city"], ["city"], split="part"))
    assert data.state_dict()["categories"] == {"city": sorted(CITIES)}
    unscaled = data.dataset("test").inputs * data.state_dict()["std"] + data.state_dict()["mean"]
    torch.testing.assert_close(unscaled.float(), torch.zeros(20, 3), atol=1e-6, rtol=0)


def test_what_is_missing_becomes_the_mean_when_asked_to(tmp_path):
    lines = rows()
    lines[3][0] = lines[3][1] = ""
    path = write(tmp_path / "a.csv", lines)
    with pytest.raises(UsageError, match=r"a\.csv: 1 row .* line 5 column age \(empty\), line 5 column city \(empty\)"):
        Table(path, "label", "multiclass", **INPUTS).setup()
    data = ready(Table(path, "label", "multiclass", **INPUTS, missing="mean"))
    (split,) = (split for split in data.indices if 3 in data.rows(split))
    inputs = data.dataset(split).inputs[data.rows(split).tolist().index(3)]
    assert inputs[:4].tolist() == [0, 0, 0, 0]
    assert ready(Table(path, "label", "multiclass", **INPUTS, missing="drop")).dropped == 1


def predict(trained, path, **options):
    data = Table(path, "label", "multiclass", **{**INPUTS, **options})
    data.load_state_dict(trained.state_dict())
    return torch.cat([inputs for inputs, _ in data.predict_dataloader()]), data


def test_a_new_file_is_encoded_as_the_checkpoint_was_trained(path, tmp_path):
    trained = ready(Table(path, "label", "multiclass", **INPUTS))
    place = trained.rows("test")[:4]
    lines = [[rows()[row][HEADER.index(name)] for name in ("colour", "height", "city", "age")] for row in place]
    new = write(tmp_path / "new.csv", [["extra", *line] for line in lines], ["x", "colour", "height", "city", "age"])
    for columns in (INPUTS["columns"], None):
        inputs, data = predict(trained, new, columns=columns)
        torch.testing.assert_close(inputs, trained.dataset("test").inputs[:4])
        assert data.class_names == ["a", "b", "c"]
        with pytest.raises(UsageError, match=r"new\.csv: there is no column label among x, colour.*not tested"):
            data.test_dataloader()


def test_a_new_file_with_some_of_the_classes_keeps_their_numbers(path, tmp_path):
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
    "a missing column": ([["1"]], ["age"], {}, r"new\.csv: there is no column city among age"),
    "other columns": (rows(), HEADER, {"columns": ["age"], "categorical": []}, r"on the columns \['age', 'city',"),
}


@pytest.mark.parametrize(("lines", "header", "options", "message"), NEW.values(), ids=NEW)
def test_new_files_that_do_not_fit_are_refused(lines, header, options, message, path, tmp_path):
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
        r"data\.csv: there is no column lable among .*did you mean label\?",
    ),
    "no such input": (rows(), {"columns": ["aeg"], "categorical": []}, r"no column aeg among .*did you mean age\?"),
    "no such category": (rows(), {"categorical": ["town"]}, "no column town among age, city, height, colour"),
    "no such split": (rows(), {"split": "prat"}, r"no column prat among .*did you mean part\?"),
    "an unknown split": (changed(5, "part", "vla"), {"split": "part"}, "data.csv: line 7 is marked as split vla"),
    "no test split": ([[*line[:6], "train"] for line in rows()], {"split": "part"}, "the test split is empty"),
    "a class alone": (changed(5, "label", "z"), {}, r"data\.csv: too few samples of class z \(line 7\)"),
    "three classes for two": (rows(), {"kind": "binary"}, "column label has 3 classes, a, b, c: binary has 2"),
    "labels that are neither 0 nor 1": (
        rows(),
        {"target": ["age", "price"], "kind": "multilabel", "columns": ["height"], "categorical": []},
        "line 2 has the label",
    ),
    "too few values": ([*rows(), ["1"]], {}, r"data\.csv: line 62 has 1 value, but the header names 7 columns"),
    "no rows": ([], {}, r"data\.csv has no rows below its header"),
}


@pytest.mark.parametrize(("lines", "options", "message"), BAD.values(), ids=BAD)
def test_files_that_cannot_be_trained_on_are_refused(lines, options, message, tmp_path):
    options = {"target": "label", "kind": "multiclass", **INPUTS, **options}
    with pytest.raises(UsageError, match=message):
        Table(write(tmp_path / "data.csv", lines), **options).setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,\xff\n", r"data\.csv is not UTF-8: line 2 has the byte 0xff"),
        (b'a,b\n1,"2\n', r"data\.csv is no CSV file: line 2"),
        (b"a,b\n1,2\n3,4\0\n", r"data\.csv is no CSV file: line 3 has the byte 0x00"),
        (b"a|b\n1|2\n", r"data\.csv: its values are separated by '\|', in a CSV file they are by commas"),
        (b"a,a\n1,2\n", r"data\.csv: column 2 is named 'a': each column has a name of its own"),
        (b"", r"data\.csv is empty: its first line names the columns"),
        (None, r"cannot read .*data\.csv: No such file"),
    ],
)
def test_files_that_are_no_tables_are_refused(content, message, tmp_path):
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Table(str(path), "b", "regression").setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'name,x,y\r\n\r\n"two\r\nlines",1,2\r\n\r\nfour,bad,3\r\n', r"data\.csv: 1 row .* line 6 column x \(bad\)"),
        (b'name,x,y\n"two\nlines",bad,2\nc,1,2\n', r"data\.csv: 1 row .* line 2 column x \(bad\)"),
        (b'name,x,y\na,1,2\n"b,3,4\nc,5,6\n', r"data\.csv is no CSV file: line 3: unexpected end of data"),
    ],
    ids=["below an empty line", "of two lines", "where a quote is not closed"],
)
def test_a_row_is_named_by_the_line_where_an_editor_shows_its_beginning(content, message, tmp_path):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Table(str(tmp_path / "data.csv"), "y", "regression", ["x"]).setup()


@pytest.mark.parametrize(("target", "kind"), [(["a", "b"], "binary"), (["a", "b"], "multiclass"), ("a", "multilabel")])
def test_a_kind_has_its_number_of_targets(target, kind):
    with pytest.raises(UsageError, match=f"kind={kind}"):
        Table("data.csv", target, kind)
