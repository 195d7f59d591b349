"""`firstlight new` on each kind of data: what it writes runs, and its own tests pass."""

import ast
import csv
import shutil
import sys

import nbformat
import numpy as np
import pytest
import yaml

from tests.helpers import ROOT, called, newest, quick_or_slow, results

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
    assert "customers.csv: 200 rows, 7 columns\n" in output
    assert "1 number; 1 category; 1 date; 3 left out" in output
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
    called("run", "--config", "config.yaml", "--trainer.max_epochs=12", "--report=false", cwd=table / "churn")
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


def split_arrays(tmp_path):
    inputs = GENERATOR.normal(size=(150, 6))
    targets = (inputs[:, 0] > 0).astype(int)
    np.savez(
        tmp_path / "arrays.npz", x_train=inputs[:110], y_train=targets[:110], x_test=inputs[110:], y_test=targets[110:]
    )
    return "arrays.npz"


def images_in_arrays(tmp_path):
    inputs = GENERATOR.integers(0, 256, (90, 12, 12), np.uint8)
    np.savez(tmp_path / "arrays.npz", images=inputs, labels=np.arange(90) % 3)
    return "arrays.npz"


KINDS = {
    "arrays": arrays,
    "arrays of splits": split_arrays,
    "images in arrays": images_in_arrays,
    "images": folder_of_images,
    "texts": labelled_texts,
    "corpus": corpus,
    "parquet": parquet,
    "digits": None,
}


@pytest.mark.parametrize("kind", quick_or_slow(KINDS, {"images in arrays", "texts", "digits"}))
def test_written_package_passes_its_checks(kind, tmp_path):
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


def test_target_names_one_of_two_arrays(tmp_path):
    inputs = GENERATOR.normal(size=(150, 6))
    np.savez(tmp_path / "arrays.npz", windows=inputs, activity=np.where(inputs[:, 0] > 0, "run", "sit"))
    error = new(tmp_path, "--data", "arrays.npz", code=2).stderr
    assert "arrays.npz holds windows (150, 6), activity (150,), and none of the usual names" in error
    assert "--target of firstlight new" in error
    assert "target class: 2 classes" in new(tmp_path, "--data", "arrays.npz", "--target", "activity").stdout
    assert config(tmp_path)["data"]["init_args"]["targets_name"] == "activity"
    called("check", "--config", "config.yaml", cwd=tmp_path / "churn")


def test_inputs_of_several_axes_are_predicted_without_targets(tmp_path):
    inputs = GENERATOR.normal(size=(150, 3, 4))
    np.savez(tmp_path / "arrays.npz", X=inputs, y=np.where(inputs[:, 0, 0] > 0, "run", "sit"))
    np.savez(tmp_path / "inputs.npz", X=inputs[:7])
    new(tmp_path, "--data", "arrays.npz")
    folder = tmp_path / "churn"
    called("run", "--config", "config.yaml", "--trainer.max_epochs=1", "--refit=false", "--report=false", cwd=folder)
    done = called("predict", "--run", "runs/config/latest", "--data.path=../inputs.npz", cwd=folder)
    assert "predict  7 samples" in done.stdout


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


@pytest.mark.parametrize("name", ['my "data"', '"""', "back\\slash", "'''", "ends\\"])
def test_folder_may_have_any_name(name, tmp_path):
    called("new", name, cwd=tmp_path)
    (package,) = {path.parent for path in (tmp_path / name).glob("*/network.py")}
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())) == f"The parts of {name}."
    assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["data"]
    nbformat.validate(nbformat.read(tmp_path / name / "notebook.ipynb", as_version=4))


def test_nothing_is_overwritten(table):
    (table / "churn").mkdir()
    (table / "churn" / "README.md").write_text("mine")
    error = new(table, "--data", "customers.csv", "--target", "status", code=2).stderr
    assert error == "firstlight: churn has README.md already, and nothing is overwritten: choose another folder\n"
    assert [path.name for path in (table / "churn").iterdir()] == ["README.md"]


REFUSED = {
    "target of a folder": (["--data", "folder.csv", "--target", "status"], "names a column of a table or an array"),
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
@pytest.mark.parametrize("kind", ["table", "arrays", "digits"])
def test_notebook_of_the_written_package_draws_and_predicts(kind, table):
    options = {
        "table": ["--data", "customers.csv", "--target", "status"],
        "arrays": ["--data", arrays(table)],
        "digits": [],
    }
    new(table, *options[kind])
    called("run", "--config", "config.yaml", "--trainer.max_epochs=2", "--refit=false", cwd=table / "churn")
    notebook = nbformat.read(table / "churn" / "notebook.ipynb", as_version=4)
    nbclient = pytest.importorskip("nbclient")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(table / "churn")}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    (last,) = [output for output in notebook.cells[-1].outputs if "data" in output]
    assert "prediction" in last["data"]["text/html"]


def test_splits_of_arrays_are_told(tmp_path):
    output = new(tmp_path, "--data", split_arrays(tmp_path)).stdout
    assert "split     the arrays: 110 train, of which 15 % become val, 40 test" in output
    assert "refit     the best steps are found on the validation rows" in output


def folder_of_squares(folder, count, side):
    from PIL import Image

    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (side, side), 100 + 100 * (index % 2) + index % 50).save(path)
    return str(folder)


def chosen_for_images(tmp_path, count, side):
    """Return what `new` prints and writes for a folder of grey squares."""
    output = new(tmp_path, "--data", folder_of_squares(tmp_path / "images", count, side)).stdout
    written = config(tmp_path)
    network, data = written["model"]["init_args"]["network"], written["data"]["init_args"]
    return output, network["class_path"].rpartition(".")[2], network["init_args"], data, written


@pytest.mark.parametrize(
    ("count", "side", "widths", "augment", "size", "epochs"),
    [
        (120, 72, [16, 32, 64, 128], ["firstlight.data.RandomShift"], 64, 100),
        (300, 28, [16, 32, 64, 128], ["firstlight.data.RandomShift"], None, 43),
        (1200, 8, [32, 64, 128], [], None, 43),
        (20, 3, [128], [], None, 100),
    ],
)
def test_few_images_get_a_small_network(count, side, widths, augment, size, epochs, tmp_path):
    output, network, options, data, written = chosen_for_images(tmp_path, count, side)
    assert f"network   ConvNet with {len(widths)} stages: with few images, better and faster" in output
    assert ("augment   RandomShift, by at most 1/8 of height and width" in output) == bool(augment)
    assert (network, options["widths"]) == ("ConvNet", widths)
    assert (data["augment"], data["size"], written["trainer"]["max_epochs"]) == (augment, size, epochs)
    assert written["early_stopping"]["patience"] == epochs
    called("check", "--config", "config.yaml", cwd=tmp_path / "churn")


def test_many_images_get_a_residual_network(tmp_path):
    output, network, options, data, _ = chosen_for_images(tmp_path, 2000, 8)
    assert "network   ResNet with 14 layers: the form for small images" in output
    assert (network, options, data["augment"]) == ("ResNet", {"depth": 14}, [])


def test_images_that_cannot_be_read_are_counted_and_dropped(tmp_path):
    images = shutil.copytree(folder_of_images(tmp_path), tmp_path / "images")
    first, second = sorted(images.rglob("*.*"))[:2]
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"nothing")
    count = sum(path.is_file() for path in images.rglob("*"))
    output = new(tmp_path, "--data", "images").stdout
    assert f"cannot be read: 2 of {count}, like {first.relative_to(images)}" in output
    assert "missing   images that cannot be read are dropped, and the run names them" in output
    assert config(tmp_path)["data"]["init_args"]["missing"] == "drop"
    called("check", "--config", "config.yaml", cwd=tmp_path / "churn")


@pytest.mark.parametrize(
    ("column", "values", "left_out"),
    [
        ("year", lambda row: row + 1960, ""),
        ("number", lambda row: row + 1, "it numbers the rows"),
        ("number", lambda row: row, "it numbers the rows"),
        ("number", lambda row: 60 - row, ""),
        ("number", lambda row: "" if row == 59 else row, ""),
        ("order_id", lambda row: (row * 7) % 61 + 500, "another integer in each row, and its name: identifiers"),
    ],
)
def test_only_integers_that_number_the_rows_are_left_out(column, values, left_out, tmp_path):
    rows = [[values(row), row * 5 % 7, "ab"[row % 3 > 0]] for row in range(60)]
    write_csv(tmp_path / "table.csv", [column, "other", "target"], rows)
    output = new(tmp_path, "--data", "table.csv").stdout
    assert config(tmp_path)["data"]["init_args"]["ignore"] == [column] * bool(left_out)
    assert (f"left out: {column} ({left_out})" in output) == bool(left_out)


def test_numbers_in_a_notation_for_people_are_read_and_told(tmp_path):
    notations = [
        lambda n: f"{n % 9}%",
        lambda n: f"${1000 + 37 * n:,}",
        lambda n: f"{n},{100 + n}",
        lambda n: f"{n}.5 kg",
    ]
    rows = [[*row[:-1], *(each(index) for each in notations), row[-1]] for index, row in enumerate(customers())]
    columns = ["discount", "income", "size", "weight"]
    write_csv(tmp_path / "customers.csv", [*HEADER[:-1], *columns, "status"], rows)
    output = new(tmp_path, "--data", "customers.csv", "--target", "status").stdout
    assert "read as numbers: discount (0% is 0), income ($1,000 is 1000), size (0,100 is 0.100)\n" in output
    assert "weight (0.5 kg is a number with a unit: write the number alone)" in output
    marks = config(tmp_path)["data"]["init_args"]["decimal_marks"]
    assert marks == {"discount": ".", "income": ".", "size": ","}
    printed = called("check", "--config", "config.yaml", cwd=tmp_path / "churn").stdout
    assert "FAIL" not in printed


def test_target_in_a_notation_for_people_is_a_number(tmp_path):
    rows = [[str(index * 7 % 53), f"${1000 + 37 * index:,}.50"] for index in range(60)]
    write_csv(tmp_path / "prices.csv", ["size", "price"], rows)
    output = new(tmp_path, "--data", "prices.csv", "--target", "price").stdout
    assert "read as numbers: price ($1,000.50 is 1000.50)" in output
    assert "target price: numbers from 1000.5 to 3183.5" in output
    assert config(tmp_path)["data"]["init_args"]["kind"] == "regression"


def test_ambiguous_numbers_are_not_guessed(tmp_path):
    rows = [[f"{index},{100 + index}", f"{10 + index},{200 + index}"] for index in range(1, 61)]
    write_csv(tmp_path / "prices.csv", ["size", "price"], rows)
    message = new(tmp_path, "--data", "prices.csv", "--target", "price", code=2).stderr
    assert "11,201 is a number with a thousands separator or a decimal comma: write 1234 or 1.234" in message


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


X = np.linspace(0, 1, 200, dtype=np.float32).reshape(50, 4)
CLASSES = np.arange(50) % 2


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (X[:0], CLASSES[:0], "holds no sample"),
        (X.astype(int), CLASSES, "holds integers, which are tokens: if they are numbers, save X.astype('float32')"),
        (X[:, 0], CLASSES, "a.npz: the inputs have shape (50,): they must be (samples, columns, ...)"),
        (X.astype(np.uint16), CLASSES, "a.npz: the inputs are uint16: use uint8 for pixels"),
        (np.where(X > 0.9, np.inf, X), CLASSES, "rows with missing or invalid values: row 45 column 0 (inf)"),
        (X, CLASSES[:40], "a.npz: there are 50 inputs, but 40 targets"),
        (X, CLASSES - 1, "a.npz: row 0 has the label -1: labels must be integers from 0"),
        (X, CLASSES * 0, "a.npz has only the class 0: there is nothing to predict"),
        (X, CLASSES[:, None], "a.npz: the targets are int64 (50, 1): they must be classes, integers or texts (N,), or"),
        (X, CLASSES[:, None].astype(np.uint64), "a.npz: the targets are uint64 (50, 1): they must be classes"),
        (X, X, "a.npz: the targets are float32 (50, 4): they must be classes, integers or texts (N,), or numbers"),
        (X, X[:, 0] * np.nan, "a.npz: there is no target in any sample"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(inputs, targets, message, tmp_path):
    np.savez(tmp_path / "a.npz", X=inputs, y=targets)
    assert message in new(tmp_path, "--data", "a.npz", code=2).stderr
    assert not (tmp_path / "churn").exists()


@pytest.mark.parametrize(
    "targets", [np.where(X[:, 0] < 0.1, np.nan, X[:, 0]), np.array(["cat", "dog", " cat", "", "NA"])[np.arange(50) % 5]]
)
def test_samples_of_arrays_without_a_target_are_dropped_and_told(targets, tmp_path):
    np.savez(tmp_path / "a.npz", X=X, y=targets)
    without = 5 if targets.dtype.kind == "f" else 20
    assert f"targets   {without} samples without a valid target are dropped" in new(tmp_path, "--data", "a.npz").stdout
    done = called("run", "--config", "config.yaml", "--trainer.max_epochs=1", "--report=false", cwd=tmp_path / "churn")
    assert f", {without} dropped" in done.stdout


@pytest.mark.parametrize("options", [[], ["--target", "y"]])
def test_json_is_refused_and_a_text_says_how_a_table_is_given(options, tmp_path):
    (tmp_path / "rows.json").write_text('[{"a": 1, "y": 0}, {"a": 2, "y": 1}]')
    error = new(tmp_path, "--data", "rows.json", *options, code=2).stderr
    assert "rows.json is JSON: write a table as CSV, for example pandas.read_json('rows.json').to_csv(" in error
    (tmp_path / "rows").write_text("a y\n1 2\n" * 5000)
    output = new(tmp_path, "--data", "rows").stdout
    assert "rows: a text of 40,000 bytes\n" in output
    assert "a table would be named .csv, .tsv or .parquet, or be given with --target NAME" in output
