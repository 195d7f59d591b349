"""`--quiet` prints what went wrong and the result; `--json` prints objects, and nothing else, on standard output."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from firstlight.__main__ import main
from tests.helpers import CONFIG, DDP, Ranks, called, logged, newest, results

QUICK = ["--config", CONFIG, "--trainer.max_epochs=3", "--model.network.hidden=[8]"]

NOISY = """
import os, subprocess, sys
from firstlight.networks import MLP

class Noisy(MLP):
    def forward(self, inputs):
        print("python")
        os.write(1, b"descriptor\\n")
        if not hasattr(self, "told"):
            self.told = subprocess.run(["echo", "child"])
        return super().forward(inputs)
"""


BROKEN = """
from lightning.pytorch import Callback

class Broken(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise ValueError("mine")
"""


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def events(text, findings=False):
    """Return the objects of the lines, those of findings only if asked; a line that is no JSON object fails."""
    found = [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]
    return [each for each in found if findings or each["event"] != "finding"]


def names(found):
    return [each["event"] for each in found]


def test_a_run_tells_start_epochs_metrics_and_end_as_objects(tmp_path):
    done = called("run", *QUICK, "--json", cwd=tmp_path)
    run = newest(tmp_path)
    start, *epochs, metrics, end = events(done.stdout)
    assert done.stderr == ""
    assert names([start, *epochs, metrics, end]) == ["start", *["epoch"] * 3, "metrics", "end"]
    assert start == {
        "event": "start", "verb": "run", "run": str(run.relative_to(tmp_path)), "parameters": 610, "steps": 120,
        "samples": {"train": 1257, "val": 270, "test": 270}, "epochs": 3, "steps_done": 0,
    }  # fmt: skip
    assert [(each["epoch"], each["epochs"], each["step"]) for each in epochs] == [(1, 3, 40), (2, 3, 80), (3, 3, 120)]
    losses = [value for _, value in logged(run, "val/loss")]
    assert [each["metrics"]["val/loss"] for each in epochs] == losses
    assert [each["best"]["val/loss"] for each in epochs] == [min(losses[: n + 1]) for n in range(3)]
    assert [each["metrics"]["train/loss"] for each in epochs] == [
        value for step, value in logged(run, "train/loss") if (step + 1) % 40 == 0
    ]
    assert epochs[-1]["seconds_left"] == 0
    saved = results(run)
    assert metrics["metrics"] == end["metrics"] == saved["metrics"]
    assert {name: end[name] for name in ("best", "steps", "findings", "checkpoint", "seconds")} == {
        name: saved[name] for name in ("best", "steps", "findings", "checkpoint", "seconds")
    }


def test_standard_output_has_only_objects_whatever_else_prints(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    options = ["--model.network=noisy.Noisy", "--model.network.in_features=64", "--model.network.out_features=10"]
    args = ["run", *QUICK, *options, "--trainer.max_epochs=1", "--report=false", "--json"]
    done = Ranks(main, args, cwd=tmp_path).succeed()
    assert names(events(done.stdout)) == ["start", "epoch", "metrics", "end"]
    assert all(word in done.stderr.splitlines() for word in ("python", "descriptor", "child"))


def test_a_resumed_run_continues_to_count_epochs_and_keeps_the_best(tmp_path):
    called("fit", *QUICK, cwd=tmp_path)
    best = results(newest(tmp_path))["best"]["val/loss"]
    done = called(
        "fit", "--run", str(newest(tmp_path)), "--trainer.max_epochs=4", "--model.optimizer.lr=9", "--allow_inexact",
        "--json", cwd=tmp_path,
    )  # fmt: skip
    start, epoch, end = events(done.stdout)
    assert (start["steps_done"], epoch["epoch"], epoch["best"]) == (120, 4, {"val/loss": best})
    again = called("fit", "--run", str(newest(tmp_path)), "--json", cwd=tmp_path)
    assert events(again.stdout) == [{**end, "versions": results(newest(tmp_path))["versions"]}]


def test_evaluations_tell_start_and_end_as_objects(finished):
    folder, run, _ = finished
    for verb in ("validate", "test"):
        start, metrics, end = events(called(verb, "--run", str(run), "--json", cwd=folder).stdout)
        assert (start["event"], start["verb"], start["checkpoint"]) == ("start", verb, end["checkpoint"])
        assert metrics["metrics"] == end["metrics"]
        (written,) = run.glob(f"evaluations/{verb}-*")
        assert end["wrote"] == str(written) and end["metrics"] == results(written)["metrics"]
    start, end = events(called("predict", "--run", str(run), "--json", cwd=folder).stdout)
    assert end["wrote"].endswith("predictions.csv")


def test_check_tells_each_check_as_an_object(tmp_path):
    found = events(called("check", *QUICK, "--json", cwd=tmp_path).stdout)
    assert names(found)[0] == "start" and names(found)[-1] == "end"
    assert {each["state"] for each in found[1:-1]} <= {"ok", "skipped", "warn"}
    wrong = events(called("check", *QUICK, "--json", "--model.network.out_features=7", cwd=tmp_path, code=2).stdout)
    assert wrong[-1]["event"] == "error" and wrong[-2]["event"] == "check" and wrong[-2]["state"] == "fail"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fit", "--json", *QUICK, "--model.network.hiden=[3]"], "hiden"),
        (["fit", "--json", "--config", "missing.yaml"], "missing.yaml"),
        (["test", "--json", *QUICK], "test needs a checkpoint"),
        (["fitt", "--json"], "did you mean fit?"),
    ],
)
def test_wrong_use_is_an_object_with_the_same_message_and_exit_code(options, message, tmp_path):
    done = called(*options, cwd=tmp_path, code=2)
    (error,) = events(done.stdout)
    assert (error["event"], error["kind"], error["exit_code"]) == ("error", "usage", 2)
    assert message in error["message"] and done.stderr == f"firstlight: {error['message']}\n"


def test_a_bug_is_an_object_and_keeps_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    done = Ranks(main, ["fit", *QUICK, "--trainer.callbacks+=broken.Broken", "--json"], cwd=tmp_path)
    assert done.wait() == [1]
    assert events(done.stdout)[-1] == {"event": "error", "kind": "bug", "message": "ValueError: mine", "exit_code": 1}
    assert "Traceback" in done.stderr and done.stderr.endswith("ValueError: mine\n")


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    off = "--disable=nonfinite,early_stopping,best,last"
    done = called("fit", *QUICK, off, "--model.optimizer.lr=1e30", "--json", cwd=tmp_path)
    assert events(done.stdout)[1]["metrics"]["val/loss"] is None


def test_a_signal_is_an_object_that_names_the_command_to_resume(tmp_path):
    run = Ranks(main, ["fit", *QUICK, "--trainer.max_epochs=100000", "--json"], cwd=tmp_path)
    assert run.wait_for('"event": "epoch"')
    os.kill(run.processes[0].pid, signal.SIGTERM)
    assert run.wait() == [143]
    *_, error = events(run.stdout)
    assert (error["event"], error["kind"], error["exit_code"]) == ("error", "interrupted", 143)
    assert f"firstlight fit --run {newest(tmp_path).relative_to(tmp_path)}" in error["message"]


def test_a_reader_that_ends_does_not_end_the_run(tmp_path):
    command = [sys.executable, "-m", "firstlight", "run", *QUICK, "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().replace(b"epoch", b"") == b"" and process.wait(120) == 141
    process.stderr.close()
    assert "test/accuracy" in results(newest(tmp_path))["metrics"]


def test_quiet_prints_the_result_only(tmp_path):
    done = called("run", *QUICK, "--quiet", cwd=tmp_path)
    told = [line.split()[0] for line in done.stdout.splitlines()]
    assert [word for word in told if word != "seen"] == ["best", "test", "run"]
    wrong = [each for each in results(newest(tmp_path))["findings"] if each["severity"] != "info"]
    assert told.count("seen") == min(len(wrong), 4)  # Three, and a line that counts the others.
    assert done.stderr == ""
    done = called("validate", "--run", str(newest(tmp_path)), "--quiet", cwd=tmp_path)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["validate", "wrote"]
    assert called("check", *QUICK, "--quiet", cwd=tmp_path).stdout == ""


def test_quiet_prints_what_went_wrong(tmp_path):
    rows = [f"{index % 7},{index % 2},{index % 2}" for index in range(100)]  # A column equals the target.
    (tmp_path / "data.csv").write_text("\n".join(["a,b,y", *rows]))
    data = ["--data=Table", "--data.path=data.csv", "--data.target=y", "--data.kind=multiclass"]
    data += ["--data.columns=[a,b]"]
    network = ["--model=Classification", "--model.classes=2", "--model.network=MLP", "--model.network.hidden=[4]"]
    network += ["--model.network.in_features=2", "--model.network.out_features=2"]
    rest = ["--model.loss=CrossEntropyLoss", "--model.optimizer=torch.optim.AdamW", "--model.schedule=Constant"]
    options = [*data, *network, *rest, "--trainer.max_epochs=1"]
    loud, quiet, objects = (
        called("fit", *options, *more, cwd=tmp_path).stdout for more in ([], ["--quiet"], ["--json"])
    )
    found = [each for each in events(objects, findings=True) if each["event"] == "finding"]
    severe = [each["text"] for each in found if each["severity"] != "info"]
    assert severe and all(text in loud and text in quiet for text in severe)
    assert not any(each["text"] in quiet for each in found if each["severity"] == "info")
    refused = called("fit", *options, "--quiet", "--data.target=z", cwd=tmp_path, code=2)
    assert refused.stderr.startswith("firstlight: ")


@pytest.mark.parametrize("option", ["json", "quiet"])
def test_a_configuration_file_cannot_choose_the_output(option, tmp_path):
    (tmp_path / "loud.yaml").write_text(f"{option}: true\n")
    refused = called("fit", *QUICK, "--config", "loud.yaml", cwd=tmp_path, code=2)
    assert refused.stderr == (
        f"firstlight: {option} is an option of one command: give --{option}, not {option}: true in a file\n"
    )


def test_the_saved_configuration_does_not_hold_the_output(tmp_path):
    called("fit", *QUICK, "--json", cwd=tmp_path)
    text = (newest(tmp_path) / "config.yaml").read_text()
    assert "json: false" in text and "quiet: false" in text


def test_two_processes_print_each_object_once(tmp_path):
    done = Ranks(main, ["fit", *QUICK, "--config", DDP, "--json"], cwd=tmp_path, ranks=2).succeed()
    assert names(events(done.stdout)) == ["start", *["epoch"] * 3, "end"]


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path):
    escape = "\x1b]0;owned\x07\x1b[2J\x9b1m"
    (tmp_path / "loud.yaml").write_text(yaml.safe_dump({"data": {f"x{escape}": 1}}))
    refused = called("fit", *QUICK, "--config", "loud.yaml", cwd=tmp_path, code=2).stderr
    called("fit", *QUICK, cwd=tmp_path)
    config = newest(tmp_path) / "config.yaml"
    saved = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**saved, "experiment": f"digits{escape}"}))
    changed = called("fit", "--run", str(config.parent), "--experiment=digits_mlp", cwd=tmp_path).stdout
    for text in (refused, changed):
        assert "\\x1b" in text and not [each for each in text if each < " " and each != "\n"]
