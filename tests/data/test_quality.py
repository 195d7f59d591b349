import csv
import math

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ks_2samp
from sklearn.datasets import load_iris
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict
from sklearn.tree import DecisionTreeClassifier

from firstlight.data import Table
from firstlight.data.quality.statistics import category_distance, number_distance
from tests.data.helpers import Arrays, ready

ROWS = 600


def draw(seed=0):
    return np.random.default_rng(seed)


def table(changes=None, classes=True, rows=ROWS, options=None, **fields):
    """Return a data module of three random columns a, b, c; `changes` replace columns."""
    generator = draw()
    columns = {name: generator.normal(size=rows) for name in "abc"} | (changes or {})
    targets = generator.integers(0, 2, rows) if classes else generator.normal(size=rows)
    names = ["no", "yes"] if classes else []
    inputs = np.stack([*columns.values()], axis=1)
    return Arrays(inputs, fields.pop("targets", targets), names, options, columns=[*columns, "y"], **fields)


def found(module):
    """Return the findings by name."""
    return {finding.name: finding for finding in ready(module).findings()}


def marked(train, val, test):
    return np.array(["train"] * train + ["val"] * val + ["test"] * test)


def test_random_data_has_no_finding():
    for classes in (True, False):
        assert not found(table(classes=classes))


def test_column_that_predicts_the_class_alone_is_told():
    targets = np.arange(ROWS) % 3
    leak = draw().permutation(3)[targets] + draw().normal(0, 0.02, ROWS)
    data = Arrays(np.stack([draw(1).normal(size=ROWS), leak], 1), targets, ["x", "y", "z"], columns=["a", "paid", "t"])
    finding = found(data)["leakage"]
    assert finding.severity == "fault"
    assert finding.evidence == {"paid": 1.0}
    assert str(finding) == (
        "column paid (1.000) alone predicts the target (balanced accuracy of a small tree): make sure that it is known "
        "before the target, or leave it out"
    )


def test_leak_of_few_samples_may_be_an_accident():
    targets = np.arange(60) % 3
    data = Arrays(
        np.stack([draw(1).normal(size=60), targets * 3.0], 1), targets, ["x", "y", "z"], columns=["a", "b", "t"]
    )
    assert found(data)["leakage"].severity == "info"


def test_column_that_is_missing_only_for_one_class_is_a_leak():
    targets = np.arange(ROWS) % 2
    leak = np.where(targets == 0, np.nan, draw().normal(size=ROWS))
    assert [*found(table({"end": leak}, targets=targets, options={"missing": "mean"}))["leakage"].evidence] == ["end"]


def test_leak_of_numbers_and_of_categories_in_any_order_is_told():
    targets = draw(9).normal(size=ROWS)
    assert [*found(table({"copy": targets * 3 + 7}, classes=False, targets=targets))["leakage"].evidence] == ["copy"]
    codes = draw().integers(0, 100, 5 * ROWS)
    labels = draw(1).permutation(np.arange(100) % 2)[codes]
    data = table(
        {"code": codes.astype(float)},
        rows=5 * ROWS,
        targets=labels,
        categories={"code": [f"c{code}" for code in range(100)]},
    )
    assert [*found(data)["leakage"].evidence] == ["code"]


def test_strong_but_honest_column_is_no_leak():
    iris = load_iris()
    names = ["sepal length", "sepal width", "petal length", "petal width", "kind"]
    scores = [
        balanced_accuracy_score(
            iris.target, cross_val_predict(DecisionTreeClassifier(random_state=0), iris.data[:, [column]], iris.target)
        )
        for column in range(4)
    ]
    assert 0.9 < max(scores) < 0.98
    assert "leakage" not in found(Arrays(iris.data, iris.target, ["a", "b", "c"], columns=names))


def test_copies_across_splits_are_counted_with_an_example():
    inputs = draw().normal(size=(300, 3))
    inputs[250:256] = inputs[:6]
    targets = np.arange(300) % 2
    targets[250:256] = targets[:6]
    finding = found(Arrays(inputs, targets, ["a", "b"], split=marked(200, 50, 50)))["duplicate_samples"]
    assert finding.severity == "fault"
    assert finding.evidence == {"samples": 6, "share": 0.12}
    assert finding.text == (
        "6 of 50 test samples (12.0%) are in the training split, too, for example row 0 and row 250"
    )


def test_copies_are_found_in_images_and_texts():
    for dtype, shape in ((np.uint8, (300, 1, 8, 8)), (np.int16, (300, 20))):
        inputs = draw().integers(1, 200, shape).astype(dtype)
        inputs[299] = inputs[0]
        finding = found(Arrays(inputs, np.arange(300) % 2, ["a", "b"], split=marked(200, 50, 50)))["duplicate_samples"]
        assert finding.evidence == {"samples": 1, "share": 0.02}


def test_equal_rows_of_a_table_with_few_different_values_are_no_copies():
    inputs = draw().integers(0, 3, (ROWS, 3)).astype(float)
    assert not found(Arrays(inputs, np.arange(ROWS) % 2, ["a", "b"]))


def test_constant_and_equal_columns_are_told_once_each():
    a = draw().normal(size=ROWS)
    findings = found(table({"a": a, "d": a, "e": np.full(ROWS, 3.0), "f": np.full(ROWS, 3.0)}))
    assert findings["constant"].text == "columns e (3), f (3) have one value in all rows"
    assert findings["duplicate"].text == "column d (a) has the values of another one in all rows"
    assert {finding.severity for finding in findings.values()} == {"info"}


def test_category_with_renamed_values_is_a_duplicate():
    codes = draw().integers(0, 4, ROWS)
    data = table(
        {"code": codes * 1.0, "name": 3.0 - codes},
        categories={"code": ["1", "2", "3", "4"], "name": ["a", "b", "c", "d"]},
    )
    assert found(data)["duplicate"].text == "column name (code) has the values of another one in all rows"


def test_integers_that_are_all_different_identify_rows_only_if_the_name_says_so():
    numbers = draw().permutation(10 * ROWS)[:ROWS].astype(float)
    assert not found(table({"price": numbers}))
    assert "customer_id (another integer in each row)" in found(table({"customer_id": numbers}))["identifier"].text


def test_majority_of_80_percent_is_told():
    targets = (np.arange(ROWS) % 10 < 2).astype(int)
    finding = found(table(targets=targets))["class_imbalance"]
    assert str(finding) == (
        "80.0% of the samples have the class no: an accuracy of 0.800 needs no learning, so read balanced accuracy, F1 "
        "or AUROC"
    )
    assert "class_imbalance" not in found(table(targets=(np.arange(ROWS) % 10 < 3).astype(int)))


def test_classes_with_few_samples_are_told_with_their_numbers():
    targets = np.r_[np.arange(ROWS - 10) % 2, np.full(10, 2)]
    data = Arrays(draw().normal(size=(ROWS, 2)), targets, ["a", "b", "rare"])
    finding = found(data)["few_samples"]
    counts = [int((data.dataset(split).targets == 2).sum()) for split in ("train", "val", "test")]
    assert finding.text == "class rare ({} train, {} val, {} test) has few samples".format(*counts)
    assert counts[0] >= 5 and finding.severity == "info"
    assert finding.evidence == {"rare": min(counts)}


def test_column_that_is_mostly_missing_is_told():
    values = np.where(np.arange(ROWS) % 5 < 3, np.nan, draw().normal(size=ROWS))
    finding = found(table({"d": values}, options={"missing": "mean"}))["missing"]
    assert finding.evidence["d"] == pytest.approx(0.6, abs=0.03)
    assert finding.text == f"column d ({finding.evidence['d']:.0%}) has no value in at least half of the rows"


@pytest.mark.parametrize("code", [-999.0, 9999.0])
def test_frequent_value_far_from_all_others_may_mean_a_missing_one(code):
    values = np.where(np.arange(ROWS) % 20 == 0, code, draw(1).normal(50, 10, ROWS))
    finding = found(table({"d": values}))["missing_code"]
    assert finding.severity == "warning" and finding.text.startswith(f"column d ({code:g} in ")


def test_usual_columns_hold_no_code_for_a_missing_value():
    generator = draw(1)
    amounts = np.where(np.arange(ROWS) % 2 == 0, 0.0, generator.lognormal(3, 1, ROWS))
    columns = {"d": amounts, "e": generator.standard_cauchy(ROWS), "f": generator.integers(0, 2, ROWS) * 1000.0}
    assert "missing_code" not in found(table(columns))


def test_codes_that_predict_the_target_without_an_order_are_told_and_numbers_are_not():
    generator = draw(2)
    codes = generator.integers(0, 40, 4 * ROWS)
    targets = generator.normal(size=40)[codes] + generator.normal(size=4 * ROWS)
    finding = found(table({"d": codes * 1.0}, classes=False, rows=4 * ROWS, targets=targets))["codes"]
    assert finding.severity == "warning" and finding.text.startswith("column d (40 values explain ")
    for numbers in (codes / 5.0, np.sin(codes / 6.0), (codes - 20.0) ** 2 / 100):
        targets = numbers + generator.normal(size=4 * ROWS)
        assert "codes" not in found(table({"d": codes * 1.0}, classes=False, rows=4 * ROWS, targets=targets))


def test_many_dropped_rows_are_told():
    values = np.where(np.arange(ROWS) % 5 == 0, np.nan, draw().normal(size=ROWS))
    finding = found(table({"a": values}, options={"missing": "drop"}))["dropped"]
    assert finding.evidence == {"rows": 120, "share": 0.2}


def test_drift_of_inputs_and_target_is_told_with_its_distance():
    split = marked(400, 100, 100)
    shifted = draw().normal(size=ROWS) + (split == "test")
    targets = draw().integers(0, 2, ROWS) | (split == "test")
    targets[:400:7] = 1
    targets[-1] = 0
    finding = found(table({"a": shifted}, targets=targets, split=split))["drift"]
    assert finding.evidence["a"] == pytest.approx(ks_2samp(shifted[:400], shifted[500:]).statistic)
    shares = targets[:400].mean(), targets[500:].mean()
    assert finding.evidence["y"] == pytest.approx(shares[1] - shares[0])
    assert finding.text.endswith("have another distribution in test than in training")


def test_random_splits_of_many_columns_show_no_drift():
    inputs = draw().standard_t(3, size=(400, 300))
    names = {finding.name for finding in ready(Arrays(inputs, np.arange(400) % 2, ["a", "b"])).findings()}
    assert "drift" not in names


def test_value_in_another_unit_is_out_of_range():
    values = draw().normal(1.7, 0.1, ROWS)
    values[-1] = 178.0
    finding = found(table({"height": values}, split=marked(400, 100, 100)))["out_of_range"]
    assert finding.text.startswith("column height (178 in test, training 1.")
    assert not found(table({"height": draw().standard_t(3, ROWS)}, split=marked(400, 100, 100)))


def test_brightness_that_tells_the_class_is_told():
    labels = np.arange(200) % 2
    images = draw().integers(0, 100, (200, 1, 6, 6), np.uint8) + (labels * 100).astype(np.uint8)[:, None, None, None]
    finding = found(Arrays(images, labels, ["day", "night"]))["leakage"]
    assert [*finding.evidence] == ["brightness"]
    assert finding.advice.endswith("or collect the samples of all classes in the same way")


def test_distances_and_probabilities_are_those_of_scipy():
    first, second = draw().normal(size=500), draw().normal(0.2, 1.0, size=300)
    distance, chance = number_distance(first, second)
    expected = ks_2samp(first, second, method="asymp")
    assert distance == pytest.approx(expected.statistic)
    assert chance == pytest.approx(expected.pvalue, rel=0.1)
    first, second = draw().integers(0, 4, 500) * 1.0, draw(1).integers(0, 3, 300) * 1.0
    counts = np.stack([np.bincount(each.astype(int), minlength=4) for each in (first, second)])
    distance, chance = category_distance(first, second)
    assert distance == pytest.approx(np.abs(counts[0] / 500 - counts[1] / 300).sum() / 2)
    assert chance == pytest.approx(chi2_contingency(counts, correction=False).pvalue)
    assert category_distance(np.full(5, math.nan), np.full(5, math.nan)) == (0.0, 1.0)


def test_data_that_is_only_scored_has_no_finding():
    data = ready(table({"d": np.full(ROWS, 3.0)}, digest="first"))
    other = table({"d": np.full(ROWS, 3.0)}, digest="second")
    other.load_state_dict(data.state_dict())
    other._prepare()
    assert other.findings() == []
    assert data.findings() == data.findings() != []


def test_findings_before_a_split_need_no_split(tmp_path):
    lines = [
        "a,id,y",
        *(
            f"{value:.3f},{row},{'rare' if row == 7 else 'ab'[row % 2]}"
            for row, value in enumerate(draw().normal(size=60))
        ),
    ]
    path = tmp_path / "a.csv"
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    findings = {finding.name: finding for finding in Table(str(path), "y").findings_before_split()}
    assert findings["few_samples"].text == "class rare (1 train) has few samples"
    assert findings["duplicate_samples"].text.startswith(
        "1 of 61 samples (1.6%) is copies of another one, for example line 2 and line 62"
    )


@pytest.mark.parametrize("has_ignore", [True, False])
def test_advice_names_options_that_the_data_take(has_ignore, tmp_path):
    rows = [[1, 20240101 + row % 28, row, row % 7, row % 7, row % 2] for row in range(60)]
    header = ["one", "day", "number", "week", "again", "target"]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    values = np.array(rows, float)
    arrays = Arrays(values[:, :-1], values[:, -1].astype(int), ["a", "b"], columns=header)
    told = found(Table(str(tmp_path / "a.csv"), "target") if has_ignore else arrays)
    left_out = {"constant": "one", "identifier": "number", "duplicate": "again"}
    advice = {name: told[name].advice for name in left_out}
    assert advice == {name: "leave it out" + f" with ignore=[{left_out[name]}]" * has_ignore for name in left_out}
    assert ("dates=[day]" in told["dates"].advice) == has_ignore
