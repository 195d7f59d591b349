import csv
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from threading import Barrier

import pytest
import torch

from firstlight.errors import UsageError
from firstlight.run import directory


def finished(root, experiment="digits"):
    run = directory.create(root, experiment)
    directory.write_config(run, "seed: 0\n")
    return run


def test_new_run_is_in_its_experiment_and_named_by_the_time(tmp_path):
    run = directory.create(tmp_path / "not" / "there", "digits")
    assert run.is_dir()
    assert run.parent == tmp_path / "not" / "there" / "digits"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)


def test_latest_names_the_newest_run(tmp_path):
    first, second = finished(tmp_path), finished(tmp_path)
    assert first != second
    assert (tmp_path / "digits" / "latest").read_text().strip() == second.name
    assert directory.find(tmp_path / "digits" / "latest") == second
    assert directory.find(first) == first


def test_each_experiment_has_its_own_latest(tmp_path):
    first, second = finished(tmp_path, "one"), finished(tmp_path, "two")
    assert directory.find(tmp_path / "one" / "latest") == first
    assert directory.find(tmp_path / "two" / "latest") == second


def test_creating_a_run_leaves_only_the_run_and_latest(tmp_path):
    run = directory.create(tmp_path, "digits")
    assert {path.name for path in run.parent.iterdir()} == {run.name, "latest"}


def test_experiment_with_a_slash_is_refused(tmp_path):
    with pytest.raises(UsageError, match="'a/b' is not a folder name"):
        directory.create(tmp_path, "a/b")
    assert not list(tmp_path.iterdir())


def test_run_that_cannot_be_created_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot create the folder .*file/digits/.*: Not a directory"):
        directory.create(tmp_path / "file", "digits")


def test_name_that_exists_gets_a_number(tmp_path):
    assert [directory.make_unique(tmp_path, "a").name for _ in range(3)] == ["a", "a-1", "a-2"]


def test_twenty_threads_at_the_same_time_get_twenty_directories(tmp_path):
    barrier = Barrier(20)

    def make(_):
        barrier.wait()
        return directory.make_unique(tmp_path / "new" / "parent", "same")

    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(make, range(20)))
    assert len(set(made)) == 20
    assert set((tmp_path / "new" / "parent").iterdir()) == set(made)


@pytest.mark.faults
def test_twenty_processes_at_the_same_time_get_twenty_runs_and_one_is_latest(figure, tmp_path):
    code = f"""
import sys; from pathlib import Path; from firstlight.run import directory
directory.timestamp = lambda: "2026-01-31_09-30-05"
sys.stdin.readline()
print(directory.create(Path({str(tmp_path)!r}), "digits"))
"""
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(20)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    made = {Path(process.communicate()[0].strip()) for process in processes}
    assert [process.returncode for process in processes] == [0] * 20
    with figure("20 runs started at the same time: a directory each", 20) as count:
        count.reached = len(made)
    latest = tmp_path / "digits" / "latest"
    assert tmp_path / "digits" / latest.read_text().strip() in made
    assert set(latest.parent.iterdir()) == {*made, latest}


def test_missing_run_is_refused_with_a_close_name(tmp_path):
    run = finished(tmp_path)
    wrong = run.with_name(run.name[:-1] + "x")
    with pytest.raises(UsageError, match=f"there is no run {wrong}: {wrong} does not exist; did you mean {run.name}"):
        directory.find(wrong)


def test_missing_experiment_is_refused_with_a_close_name(tmp_path):
    finished(tmp_path, "digits")
    with pytest.raises(UsageError, match=f"{tmp_path}/digit does not exist; did you mean digits"):
        directory.find(tmp_path / "digit" / "latest")


def test_missing_run_is_refused_for_a_relative_path(tmp_path, monkeypatch):
    finished(tmp_path, "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no run digit/latest: digit does not exist; did you mean digits"):
        directory.find(Path("digit/latest"))


def test_file_or_broken_link_in_the_path_of_a_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "latest").symlink_to(tmp_path / "unmounted")
    for path, wrong in (("file/latest", "file"), ("latest", "latest")):
        with pytest.raises(UsageError, match=f"there is no run {tmp_path}/{path}: {tmp_path}/{wrong} is not a folder$"):
            directory.find(tmp_path / path)


def test_folder_without_a_config_is_not_a_run(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run, because it has no config\.yaml"):
        directory.find(tmp_path)


def test_checkpoint_is_found_by_its_name(tmp_path):
    path = tmp_path / "checkpoints" / "best.ckpt"
    path.parent.mkdir()
    path.touch()
    path.with_name("last.ckpt").mkdir()
    assert directory.checkpoint(tmp_path, "best") == path
    with pytest.raises(UsageError, match=r"has no last checkpoint; its checkpoints: best\.ckpt$"):
        directory.checkpoint(tmp_path, "last")


def test_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UsageError, match="its checkpoints: none"):
        directory.checkpoint(tmp_path, "best")


def test_results_are_written_with_package_versions(tmp_path):
    directory.write_results(tmp_path, {"test/accuracy": 0.5})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test/accuracy"] == 0.5
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_results_are_written_where_firstlight_is_not_installed(tmp_path, monkeypatch):
    def not_installed(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(directory, "version", not_installed)
    directory.write_results(tmp_path, {"test/accuracy": 0.5})
    assert json.loads((tmp_path / "results.json").read_text())["versions"]["firstlight"] is None


def test_new_results_keep_the_earlier_file(tmp_path):
    directory.write_results(tmp_path, {"test/accuracy": 0.5})
    older = (tmp_path / "results.json").read_text()
    directory.write_results(tmp_path, {"test/accuracy": 0.75})
    assert json.loads((tmp_path / "results.json").read_text())["test/accuracy"] == 0.75
    (kept,) = tmp_path.glob("results-until-*.json")
    assert kept.read_text() == older


def test_equal_results_keep_no_earlier_file(tmp_path):
    for _ in range(2):
        directory.write_results(tmp_path, {"test/accuracy": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_new_config_keeps_the_earlier_file(tmp_path):
    directory.write_config(tmp_path, "seed: 0\n")
    directory.write_config(tmp_path, "seed: 1\n")
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
    assert [path.read_text() for path in tmp_path.glob("config-until-*.yaml")] == ["seed: 0\n"]


def read(folder):
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions_have_a_line_per_sample_and_class_names(tmp_path):
    columns = {"prediction": [1, 0], "probabilities": [[0.25, 0.75], [0.5, 0.5]], "target": [1, 1]}
    directory.write_predictions(tmp_path, columns, [12, 3], ["a cat", "Hund, groß"])
    assert read(tmp_path) == [
        ["index", "prediction", "probabilities/a cat", "probabilities/Hund, groß", "target"],
        ["12", "Hund, groß", "0.25", "0.75", "Hund, groß"],
        ["3", "a cat", "0.5", "0.5", "Hund, groß"],
    ]


def test_run_that_never_started_is_not_resumed(tmp_path):
    assert directory.find_resumable(tmp_path / "digits") is None
    started = directory.create(tmp_path, "digits")
    directory.write_config(started, "a: 1\n")
    assert directory.find_resumable(tmp_path / "digits") is None
    (started / "checkpoints").mkdir()
    (started / "checkpoints" / "last.ckpt").touch()
    directory.create(tmp_path, "digits")  # Killed before its first step.
    assert directory.find_resumable(tmp_path / "digits") == started


def test_predictions_of_several_labels_have_a_column_per_label(tmp_path):
    columns = {"prediction": [[1, 0]], "probabilities": [[0.75, 0.25]], "target": [[1.0, 1.0]]}
    directory.write_predictions(tmp_path, columns, [5], ["sea", "sun"])
    assert read(tmp_path)[0] == [
        "index",
        *(f"{name}/{label}" for name in ("prediction", "probabilities", "target") for label in ("sea", "sun")),
    ]
    assert read(tmp_path)[1] == ["5", "1", "0", "0.75", "0.25", "1.0", "1.0"]


def test_predictions_without_classes_are_numbers(tmp_path):
    directory.write_predictions(tmp_path, {"prediction": [0.125, 2.0], "both": [[1.0, 2.0], [3.0, 4.0]]}, [0, 1], [])
    assert read(tmp_path) == [
        ["index", "prediction", "both/0", "both/1"],
        ["0", "0.125", "1.0", "2.0"],
        ["1", "2.0", "3.0", "4.0"],
    ]


def test_predictions_with_another_length_than_the_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        directory.write_predictions(tmp_path, {"prediction": [1.0]}, [0, 1], [])


def test_every_earlier_config_is_kept_within_one_second(tmp_path):
    for number in range(4):
        directory.write_config(tmp_path, f"{number}\n")
    assert sorted(path.read_text() for path in tmp_path.glob("config*.yaml")) == ["0\n", "1\n", "2\n", "3\n"]


def test_broken_link_is_refused(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(UsageError, match="cannot create the folder"):
        directory.create(tmp_path / "runs", "digits")


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_experiment_outside_its_folder_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="is not a folder name"):
        directory.create(tmp_path, name)


def test_discarding_the_only_run_leaves_no_folder(tmp_path):
    directory.discard(directory.create(tmp_path / "runs", "digits"))
    assert not list(tmp_path.iterdir())


def test_discarding_a_run_lets_latest_name_the_newest_started_run(tmp_path):
    started = [finished(tmp_path / "runs") for _ in range(2)]
    directory.create(tmp_path / "runs", "digits")  # Killed before its first step.
    refused = directory.create(tmp_path / "runs", "digits")
    assert (refused.parent / "latest").read_text() == refused.name + "\n"
    directory.discard(refused)
    assert not refused.exists()
    assert (refused.parent / "latest").read_text() == started[1].name + "\n"
    assert directory.find(refused.parent / "latest") == started[1]


def test_discarding_a_run_keeps_other_experiments_and_files(tmp_path):
    other = finished(tmp_path / "runs", "other")
    refused = directory.create(tmp_path / "runs", "digits")
    (refused.parent / "notes.txt").write_text("mine")
    directory.discard(refused)
    assert other.is_dir() and directory.find(other.parent / "latest") == other
    assert [path.name for path in refused.parent.iterdir()] == ["notes.txt"]


def test_logged_steps_are_counted_from_complete_lines(tmp_path):
    assert directory.logged_steps(tmp_path) == 0
    (tmp_path / "metrics.csv").write_text("step,name,value\n49,lr,0.1\n79,lr,0.1\n39,val/loss,1.5\n99,lr")
    assert directory.logged_steps(tmp_path) == 80
