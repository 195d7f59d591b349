import re
from pathlib import Path

import numpy as np
import pytest

from firstlight.data import Table
from firstlight.errors import UsageError
from tests.data.helpers import ready

SPLITS = ("train", "val", "test")
ROWS = 400


def table(folder, groups=None, times=None, kind="regression", **options):
    """Return a data module of a table with the columns x, patient, day and y, split by patient or by day."""
    generator = np.random.default_rng(0)
    groups = groups or [f"p{each}" for each in generator.integers(0, 60, ROWS)]
    days = [f"2024-{1 + each // 28:02}-{1 + each % 28:02}" for each in generator.integers(0, 300, ROWS)]
    lines = ["x,patient,day,y"]
    for row, (group, time) in enumerate(zip(groups, times or days, strict=True)):
        target = f"{generator.normal():.3f}" if kind == "regression" else "ab"[row % 5 == 0]
        lines.append(f"{generator.normal():.3f},{group},{time},{target}")
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    given = {"ignore": ["patient"]} if "time" in options else {"ignore": ["day"], "group": "patient"}
    return Table(str(path), "y", kind, **given, **options)


def parts_of(module, name):
    """Return the values of a column of the file in each split."""
    lines = [line.split(",") for line in Path(module.path).read_text().splitlines()]
    values = np.array([line[lines[0].index(name)] for line in lines[1:]])
    return {split: values[module.rows(split)] for split in SPLITS}


@pytest.mark.parametrize("kind", ["regression", "multiclass"])
@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_in_two_splits_and_sizes_are_about_the_fractions(kind, seed, tmp_path):
    data = ready(table(tmp_path, kind=kind, split_seed=seed))
    parts = parts_of(data, "patient")
    assert sum(len({*part}) for part in parts.values()) == len({*np.concatenate([*parts.values()])})
    sizes = [len(part) for part in parts.values()]
    assert sum(sizes) == ROWS
    assert sizes == pytest.approx([280, 60, 60], abs=20)
    if kind == "multiclass":
        shares = [float((data.dataset(split).targets == 1).float().mean()) for split in SPLITS]
        assert shares == pytest.approx([0.2] * 3, abs=0.06)
    assert data.dataset("train").inputs.shape[1] == 1
    counts = ", ".join(f"{len({*part})} {split}" for split, part in parts.items())
    assert data.split_note == f"by group patient: {counts} groups"


def test_groups_that_look_alike_are_told(tmp_path, caplog):
    ready(table(tmp_path))
    assert not caplog.text
    ready(table(tmp_path, ["P01", "p01", "P1", "P-01", *(f"p{row % 50 + 2}" for row in range(ROWS - 4))]))
    told = "table.csv: column patient has P-01 and P01, P-01 and P1, P-01 and p01, which count as different values"
    assert told in caplog.text


def test_split_by_group_is_the_same_each_time_and_another_for_another_seed(tmp_path):
    first, again, other = (ready(table(tmp_path, split_seed=seed)) for seed in (0, 0, 1))
    assert first.fitted["split"] == again.fitted["split"] != other.fitted["split"]
    again.load_state_dict(first.state_dict())
    with pytest.raises(UsageError, match=r"missing_targets, group and time$"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("kind", ["regression", "multiclass"])
def test_training_rows_are_the_earliest_and_test_rows_the_latest(kind, tmp_path):
    data = ready(table(tmp_path, kind=kind, time="day"))
    parts = parts_of(data, "day")
    assert max(parts["train"]) < min(parts["val"]) <= max(parts["val"]) < min(parts["test"])
    assert [len(part) for part in parts.values()] == pytest.approx([280, 60, 60], abs=4)
    firsts = ", ".join(f"{split} from {min(part)}" for split, part in parts.items())
    assert data.split_note == f"by time day: {firsts}"
    assert data.dataset("train").inputs.shape[1] == 1


def test_time_may_be_a_number_and_ties_stay_together(tmp_path):
    years = [str(each) for each in np.random.default_rng(0).permutation([*range(90, 115)] * 16)]
    parts = parts_of(ready(table(tmp_path, times=years, time="day")), "day")
    assert {split: sorted({*map(int, part)}) for split, part in parts.items()} == {
        "train": [*range(90, 107)],
        "val": [107, 108, 109, 110],
        "test": [111, 112, 113, 114],
    }


def test_time_that_is_named_in_dates_is_an_input_too(tmp_path):
    assert ready(table(tmp_path, time="day", dates=["day"])).dataset("train").inputs.shape[1] == 1 + 5


@pytest.mark.parametrize(
    ("groups", "times", "message"),
    [
        (["a"] * 400, None, "group patient has one value in 400 rows, a: it cannot give a test split"),
        (["a", *["b"] * 399], None, "the test split would have 1 rows in place of 60, because rows of one group stay"),
        (["a"] * 399 + [""], None, "line 401 column patient is empty: each row needs a group"),
        (None, ["7"] * 400, "time day has one value in 400 rows, 7: it cannot give a test split"),
        (
            None,
            ["1"] * 200 + ["2"] * 200,
            "the test split would have 200 rows in place of 60, because rows of one time",
        ),
        (None, ["2024-01-01", "x"] * 200, "column day: x is not a date"),
        (None, ["01.2023", "12.2022"] * 200, "column day: numbers like 01.2023 are dates that do not sort by time"),
        (None, ["31122022", "01012023"] * 200, "column day: numbers like 31122022 are dates that do not sort by time"),
        (None, ["2023.10", "2023.9"] * 200, "column day: numbers like 2023.9 are dates that do not sort by time"),
    ],
)
def test_split_that_is_impossible_is_refused_in_one_line(groups, times, message, tmp_path):
    options = {} if times is None else {"time": "day"}
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        table(tmp_path, groups, times, **options).setup()
    assert "\n" not in str(error.value)


def test_group_and_time_together_or_with_a_complete_split_column_are_refused(tmp_path):
    with pytest.raises(UsageError, match="Table was given group=a and time=b: one of them can decide the split"):
        Table("a.csv", "y", group="a", time="b")
    path = tmp_path / "a.csv"
    lines = [f"{row},{row % 7},{part},{row}" for row, part in enumerate(["train", "val", "test"] * 20)]
    path.write_text("\n".join(["x,g,part,y", *lines]) + "\n")
    with pytest.raises(UsageError, match="the data define all splits, so the group g decides none: leave group out"):
        Table(str(path), "y", "regression", split="part", group="g").setup()


def test_validation_rows_are_the_latest_of_the_training_rows_of_a_split_column(tmp_path):
    path = tmp_path / "a.csv"
    lines = [f"{row % 11},{row},{'test' if row % 5 == 0 else 'train'},{row % 3}" for row in range(100)]
    path.write_text("\n".join(["x,t,part,y", *lines]) + "\n")
    data = ready(Table(str(path), "y", "regression", split="part", time="t", val_fraction=0.25))
    assert sorted(data.rows("test")) == [*range(0, 100, 5)]
    assert data.rows("train").max() < data.rows("val").min()
    assert len(data.rows("val")) == 20


def test_new_rows_need_no_group(tmp_path):
    trained = ready(table(tmp_path))
    path = tmp_path / "new.csv"
    path.write_text("x,patient\n1.5,\n2.5,\n")
    data = Table(str(path), "y", "regression", ignore=["day"], group="patient")
    data.load_state_dict(trained.state_dict())
    data._prepare()
    assert len(data.dataset("test")) == 2
    path.write_text("x\n1.5\n")
    assert len(trained.prepare(path)[0]) == 1
