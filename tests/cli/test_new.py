"""`firstlight new` on each kind of data: what it writes runs, and its own tests pass."""

import csv
import sys

import nbformat
import numpy as np
import pytest
import yaml

from tests.helpers import ROOT, called, newest, results

GENERATOR = np.random.default_rng(0)


def write_csv(path, header, rows, separator=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])


def customers(count=200):
    """Return rows of a table with every kind of column."""
    for index in range(count):
        age, day = GENERATOR.integers(18, 80), GENERATOR.integers(1, 28)
        status = "left" if age + GENERATOR.normal(0, 5) > 45 else "stayed"
        yield [
            f"C{index:05d}",
            "" if index % 10 == 3 else age,
            ["north", "south", "east"][index % 3],
            f"2024-0{1 + index % 9}-{day:02d}",
            "yes",
            f"note {index} about the customer",
            status,
        ]


HEADER = ["customer_id", "age", "region", "joined", "active", "note", "status"]


@pytest.fixture
def table(tmp_path):
    write_csv(tmp_path / "customers.csv", HEADER, customers())
    return tmp_path


def new(cwd, *options, code=0):
    return called("new", "churn", *options, cwd=cwd, code=code)


def config(cwd):
    return yaml.safe_load((cwd / "churn" / "config.yaml").read_text())


def test_table_is_described_and_every_choice_has_its_reason(table):
    output = new(table, "--data", "customers.csv", "--target", "status").stdout
    assert len(output.splitlines()) <= 25
    assert "customers.csv: 200 rows, 7 columns" in output
    assert "1 numbers; 1 categories; 1 dates; 3 left out" in output
    assert "missing: age 10.0%" in output
    for reason in (
        "customer_id (it has another text in each row, like C00000)",
        "active (it has one value, yes)",
        "note (it has another text in each row, like note 0 about the customer)",
        "BinaryClassification: status has two classes, left and stayed",
        "texts     note: not used; a network for texts needs a file of one such column and status",
    ):
        assert reason in output
    data = config(table)["data"]["init_args"]
    assert data["path"] == "../customers.csv"
    assert (data["categorical"], data["dates"]) == (["region"], ["joined"])
    assert data["ignore"] == ["customer_id", "active", "note"]
    assert (data["missing"], data["indicators"]) == ("mean", True)


def test_table_runs_is_predicted_and_learns(table):
    new(table, "--data", "customers.csv", "--target", "status")
    called("run", "--config", "config.yaml", "--trainer.max_epochs=12", cwd=table / "churn")
    run = newest(table / "churn", "config")
    assert results(run)["metrics"]["test/accuracy"] > 0.7
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["network"]["init_args"]
    assert (saved["in_features"], saved["numeric_features"], saved["out_features"]) == (1 + 5 + 3 + 1, 6, 1)
    write_csv(table / "new.csv", HEADER[:-1], [row[:-1] for row in customers(30)])
    output = called("predict", "--run", str(run), "--data.path=../new.csv", cwd=table / "churn").stdout
    assert "predict  30 samples" in output


def folder_of_images(tmp_path):
    return str(ROOT / "configs" / "data" / "patterns")


def labelled_texts(tmp_path):
    words = {"animal": "cat dog horse cow", "plant": "rose oak grass fern"}
    rows = [
        [" ".join(GENERATOR.choice(words[label].split(), 3)) + f" {n}", label] for n in range(120) for label in words
    ]
    write_csv(tmp_path / "texts.csv", ["text", "kind"], rows)
    return "texts.csv"


def corpus(tmp_path):
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return "book.txt"


def parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([*customers()], columns=HEADER)
    frame["age"] = pandas.to_numeric(frame["age"])
    frame["joined"] = pandas.to_datetime(frame["joined"])
    frame.rename(columns={"status": "target"}).to_parquet(tmp_path / "customers.parquet")
    return "customers.parquet"


def arrays(tmp_path):
    inputs = GENERATOR.normal(size=(150, 6))
    np.savez(tmp_path / "arrays.npz", X=inputs, y=(inputs[:, 0] > 0).astype(int))
    return "arrays.npz"


def images_in_arrays(tmp_path):
    inputs = GENERATOR.integers(0, 256, (90, 12, 12), np.uint8)
    np.savez(tmp_path / "arrays.npz", images=inputs, labels=np.arange(90) % 3)
    return "arrays.npz"


KINDS = {
    "arrays": arrays,
    "images in arrays": images_in_arrays,
    "images": folder_of_images,
    "texts": labelled_texts,
    "corpus": corpus,
    "parquet": parquet,
    "digits": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_tests_of_the_written_package_pass(kind, tmp_path):
    data = KINDS[kind] and ["--data", KINDS[kind](tmp_path)]
    new(tmp_path, *(data or []))
    folder = tmp_path / "churn"
    names = ["--model.network=churn.network.Network", "--data=churn.data.Data"]
    callback = "--trainer.callbacks=churn.callback.PrintEpoch"
    called("check", "--config", "config.yaml", cwd=folder)
    called("check", "--config", "config.yaml", *names, callback, cwd=folder)
    assert not [name for name in sys.modules if name.startswith("churn")]


def test_rows_without_a_text_are_dropped(tmp_path):
    with (tmp_path / labelled_texts(tmp_path)).open("a") as file:
        file.write(",animal\n")
    output = new(tmp_path, "--data", "texts.csv", "--target", "kind").stdout
    assert "missing   1 row without a text: dropped" in output
    assert config(tmp_path)["data"]["init_args"]["missing"] == "drop"
    called("check", "--config", "config.yaml", cwd=tmp_path / "churn")


def test_missing_values_in_arrays_are_filled(tmp_path):
    inputs = GENERATOR.normal(size=(150, 6))
    targets = inputs[:, 0].copy()
    inputs[3, 1] = np.nan
    np.savez(tmp_path / "arrays.npz", X=inputs, y=targets)
    output = new(tmp_path, "--data", "arrays.npz").stdout
    assert "missing: a value in 0.7% of the samples" in output
    assert config(tmp_path)["data"]["init_args"]["missing"] == "mean"
    called("check", "--config", "config.yaml", cwd=tmp_path / "churn")


@pytest.mark.slow
def test_pytest_passes_in_the_written_package(table):
    import subprocess

    new(table, "--data", "customers.csv", "--target", "status")
    subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=table / "churn", check=True, timeout=300)


def test_parquet_gives_the_features_of_the_csv_file(tmp_path):
    from firstlight.data import Table

    rows = [*customers()]
    write_csv(tmp_path / "a.csv", HEADER, rows)
    pandas = pytest.importorskip("pandas")
    pandas.read_csv(tmp_path / "a.csv", parse_dates=["joined"]).to_parquet(tmp_path / "a.parquet")
    found = []
    for name in ("a.csv", "a.parquet"):
        options = {"categorical": ["region"], "dates": ["joined"], "ignore": ["customer_id", "active", "note"]}
        data = Table(str(tmp_path / name), "status", missing="mean", indicators=True, **options)
        data.setup()
        found.append(data.tensors("train"))
    for one, other in zip(*found, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_read(separator, tmp_path):
    write_csv(tmp_path / "customers.csv", HEADER, customers(), separator)
    assert "200 rows, 7 columns" in new(tmp_path, "--data", "customers.csv", "--target", "status").stdout


def test_nothing_is_overwritten(table):
    (table / "churn").mkdir()
    (table / "churn" / "README.md").write_text("mine")
    error = new(table, "--data", "customers.csv", "--target", "status", code=2).stderr
    assert error == "firstlight: churn has README.md already, and nothing is overwritten: choose another folder\n"
    assert [path.name for path in (table / "churn").iterdir()] == ["README.md"]


REFUSED = {
    "target of a folder": (["--data", "folder.csv", "--target", "status"], "names a column of a table, but folder.csv"),
    "no target": (["--data", "customers.csv"], "which column of customers.csv is to be predicted? Give --target NAME"),
    "another target": (
        ["--data", "customers.csv", "--target", "stats"],
        "customers.csv has no column stats; available",
    ),
    "constant target": (["--data", "customers.csv", "--target", "active"], "column active has only the value yes"),
    "identifier as target": (["--data", "customers.csv", "--target", "note"], "it is neither a class nor a number"),
    "no file": (["--data", "nothing.csv"], "there is no nothing.csv"),
    "target without data": (["--target", "status"], "--target status needs --data PATH"),
    "unknown option": (["--date", "customers.csv"], "new does not take --date"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_use_is_refused_in_one_line(options, message, table):
    (table / "folder.csv").mkdir()
    error = new(table, *options, code=2).stderr
    assert message in error and error.count("\n") == 1
    assert not (table / "churn").exists()


@pytest.mark.slow
def test_notebook_of_the_written_package_runs(table):
    new(table, "--data", "customers.csv", "--target", "status")
    called("run", "--config", "config.yaml", "--trainer.max_epochs=3", cwd=table / "churn")
    notebook = nbformat.read(table / "churn" / "notebook.ipynb", as_version=4)
    nbclient = pytest.importorskip("nbclient")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(table / "churn")}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_numbers_in_a_notation_for_people_are_told(tmp_path):
    rows = [[*row[:-1], f"{index % 9}%", f"{index},{100 + index}", row[-1]] for index, row in enumerate(customers())]
    write_csv(tmp_path / "customers.csv", [*HEADER[:-1], "discount", "income", "status"], rows)
    output = new(tmp_path, "--data", "customers.csv", "--target", "status").stdout
    assert "discount counts as categories, because 0% is a percentage: write the number alone" in output
    assert "income (0,100 is a number with a decimal comma: write a decimal point)" in output


def test_suspicious_columns_are_told(tmp_path):
    rows = [[*row[:-1], row[-1] + "!", row[-1]] for row in customers()]
    write_csv(tmp_path / "customers.csv", [*HEADER[:-1], "outcome code", "status"], rows)
    output = new(tmp_path, "--data", "customers.csv", "--target", "status").stdout
    assert "look   column outcome code (1.000) alone predicts the target" in output


@pytest.mark.parametrize("column", ["the  size", "the\nsize", "the 'size'\n\"in\" \\cm"])
def test_columns_keep_the_spaces_and_line_breaks_of_their_names(column, tmp_path):
    rows = [[["red", "blue"][index % 2], f"{index * 0.37:.2f}", ["a\a", "b"][index % 3 > 0]] for index in range(60)]
    write_csv(tmp_path / "my  data.csv", [column, "other", "target"], rows)
    new(tmp_path, "--data", "my  data.csv")
    data = config(tmp_path)["data"]["init_args"]
    assert data["categorical"] == [column]
    assert data["path"] == "../my  data.csv"


def test_dates_that_became_floats_are_dates(tmp_path):
    rows = [["" if index % 9 == 0 else f"202401{10 + index % 20}.0", f"{index * 0.37:.2f}"] for index in range(60)]
    write_csv(tmp_path / "visits.csv", ["day", "target"], rows)
    new(tmp_path, "--data", "visits.csv")
    assert config(tmp_path)["data"]["init_args"]["dates"] == ["day"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((0, 3)), "holds no sample"),
        (np.ones((50, 3), int), "holds integers, which are tokens: if they are numbers, save X.astype('float32')"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(inputs, message, tmp_path):
    np.savez(tmp_path / "a.npz", X=inputs, y=np.arange(len(inputs)) % 2)
    assert message in new(tmp_path, "--data", "a.npz", code=2).stderr
