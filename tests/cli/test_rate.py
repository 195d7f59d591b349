"""`firstlight lr`: what it prints, writes and refuses."""

import json
import re

import pytest
import yaml
from PIL import Image

from firstlight.cli.rate import rate_option
from firstlight.errors import UsageError
from tests.helpers import CONFIG, called, firstlight, logged, newest

SMALL = ["--config", CONFIG, "--model.network.hidden=[8]"]
SHORT = [*SMALL, "--tries=0"]
OWN = ["--model=tests.preflight.test_lr_range.Quadratic", "--data=tests.preflight.test_lr_range.Ones", "--tries=0"]
SENTENCE = (
    r"^suggest  lr (\S+) \((\S+) to (\S+) over 3 orders of the data, batches of 32\): 1/2 of \S+, where the loss is "
    r"lowest; yours is 0.003$"
)


def test_lr_prints_a_plot_and_the_suggestion_and_writes_only_a_picture(tmp_path):
    printed = called("lr", *SHORT, cwd=tmp_path).stdout
    assert len(printed.splitlines()) <= 15 and "^" in printed
    rate, low, high = map(float, re.search(SENTENCE, printed, re.MULTILINE).groups())
    assert 1e-4 < low <= rate <= high < 1
    assert re.search(r"^test     [3-6]\d\d steps on copies, \S+ s$", printed, re.MULTILINE)
    assert [each.name for each in tmp_path.iterdir()] == ["lr.png"]
    with Image.open(tmp_path / "lr.png") as image:
        image.verify()
        assert (image.format, image.size) == ("PNG", (800, 400))


def test_overlay_sets_the_rate_of_a_run_and_nothing_else(tmp_path):
    before = called("fit", *SMALL, "--print_config", cwd=tmp_path).stdout
    (tmp_path / "found").mkdir()
    printed = called("lr", *SHORT, "--apply", "--output=found", "--quiet", cwd=tmp_path).stdout.splitlines()
    assert len(printed) == 2 and printed[1].startswith("apply    --config found/lr.yaml after your own sets model.op")
    rate = float(re.match(SENTENCE, printed[0])[1])
    overlay = tmp_path / "found" / "lr.yaml"
    assert yaml.safe_load(overlay.read_text()) == {"model": {"init_args": {"optimizer": {"init_args": {"lr": rate}}}}}
    after = called("fit", *SMALL, "--config", str(overlay), "--print_config", cwd=tmp_path).stdout
    changed = {*after.splitlines()} ^ {*before.splitlines()}
    assert {line.strip() for line in changed} == {"lr: 0.003", f"lr: {rate}"}
    called("run", *SMALL, "--config", str(overlay), "--trainer.max_epochs=1", cwd=tmp_path)
    assert f"lr: {rate}" in (newest(tmp_path) / "config.yaml").read_text()


def test_of_short_runs_the_one_with_the_lowest_loss_gives_the_rate(tmp_path):
    options = [*SMALL, "--trainer.max_epochs=2"]
    end = json.loads(called("lr", *options, "--tries=4", "--json", "--apply", cwd=tmp_path).stdout.splitlines()[-1])
    losses = {each["lr"]: each["val/loss"] for each in end["tries"]}
    assert len(losses) == 4 and 0.003 in losses
    assert end["rate"] == min(losses, key=losses.get)
    for rate, loss in losses.items():
        called("fit", *options, f"--model.optimizer.lr={rate}", cwd=tmp_path)
        assert min(value for _, value in logged(newest(tmp_path), "val/loss")) == pytest.approx(loss, rel=1e-6)
    assert yaml.safe_load((tmp_path / "lr.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"] == {
        "lr": end["rate"]
    }


def test_optimiser_that_takes_any_rate_is_refused_without_runs_and_searched_around_its_own_with_them(tmp_path):
    options = ["--config=firstlight:digits_mlp_adafactor", "--trainer.max_epochs=2", "--model.network.hidden=[8]"]
    refused = called("lr", *options, "--tries=0", cwd=tmp_path, code=2).stderr
    assert refused.startswith("firstlight: the loss is lowest at the highest rate, 10: an optimiser that limits its")
    end = json.loads(called("lr", *options, "--tries=2", "--json", cwd=tmp_path).stdout.splitlines()[-1])
    assert [each["lr"] for each in end["tries"]] == [end["own"], pytest.approx(3 * end["own"], rel=0.05)]


def test_where_runs_cannot_decide_one_line_says_why(tmp_path):
    two = ["--trainer.devices=2", "--trainer.accelerator=cpu", "--data.batch_size_is=global"]
    printed = firstlight("lr", *SMALL, *two, cwd=tmp_path).stdout
    assert "try      no runs, because several processes train together" in printed
    assert re.search(SENTENCE, printed, re.MULTILINE)


def test_without_a_validation_loss_the_range_test_decides_after_one_run(tmp_path):
    printed = called("lr", *SMALL, "--trainer.max_epochs=1", "--trainer.limit_val_batches=0", cwd=tmp_path).stdout
    assert "try      no more runs: " in printed and "try      lr" not in printed
    assert re.search(SENTENCE, printed, re.MULTILINE)


def test_second_test_replaces_its_own_files_and_no_others(tmp_path):
    own = [*OWN, "--apply"]
    called("lr", *own, cwd=tmp_path)
    first = (tmp_path / "lr.yaml").read_text()
    held = yaml.safe_load(first)["model"]["init_args"]["lr"]
    assert f"sets model.lr; it held {held}\n" in called("lr", *own, cwd=tmp_path).stdout
    assert (tmp_path / "lr.yaml").read_text() == first
    for name in ("lr.yaml", "lr.png"):
        mine = "model:\n  class_path: firstlight.tasks.Classification  # my own\n"
        (tmp_path / name).write_text(mine)
        refused = called("lr", *own, cwd=tmp_path, code=2)
        assert refused.stderr == f"firstlight: {name} exists, and firstlight lr has not written it: give --output DIR\n"
        assert refused.stdout == "" and (tmp_path / name).read_text() == mine
        (tmp_path / name).unlink()


def test_two_processes_agree_and_find_what_one_process_finds(tmp_path):
    options = [*SHORT, "--model.network.dropout=0", "--data.batch_size_is=global", "--json"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    one, several = (firstlight("lr", *options, *more, cwd=tmp_path).stdout.splitlines() for more in ([], two))
    assert len(one) == len(several) == 2
    first, second = json.loads(one[1]), json.loads(several[1])
    assert first.pop("seconds") > 0 and second.pop("seconds") > 0
    assert first == second and first["batch_size"] == 32 and first["own"] == 0.003


def test_json_has_the_suggestion_and_its_interval(tmp_path):
    start, end = map(json.loads, called("lr", *OWN, "--json", cwd=tmp_path).stdout.splitlines())
    assert start == {"event": "start", "verb": "lr"}
    assert end["event"] == "end" and end["low"] <= end["rate"] <= end["high"]
    assert (end["own"], end["batch_size"], end["plot"], end["overlay"]) == (0.1, 2, "lr.png", None)


REFUSED = {
    "manual optimisation": ([*OWN, "--model.fault=manual"], "lr sets the learning rate of each step, but Quadratic "),
    "no learning rate": ([*OWN, "--model.fault=no rate"], "SGD has no learning rate: no `lr` in its parameter groups"),
    "a run": (["--config", CONFIG, "--resume"], None),
    "an output that is no folder": ([*OWN, "--output=nowhere"], "--output nowhere is not a folder"),
    "an option of another verb": ([*OWN, "--seeds=3"], "--seeds is an option of repeat and sweep: leave it out of lr"),
    "a checkpoint": ([*OWN, "--ckpt=best"], "--ckpt is for validate, test, predict, export; fit resumes "),
    "fewer than no runs": ([*OWN, "--tries=-1"], "lr was given tries=-1"),
    "options that train nothing": ([*OWN, "--trainer.max_epochs=0"], "trainer.max_epochs=0 trains nothing"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_use_is_refused_in_one_line(options, message, tmp_path):
    if message is None:
        called("fit", *SMALL, "--trainer.max_epochs=1", cwd=tmp_path)
        message = "lr starts from new weights: leave out --resume, and give --config in place of --run"
    found = called("lr", *options, cwd=tmp_path, code=2).stderr
    assert found.count("\n") == 1 and found.startswith(f"firstlight: {message}")
    assert not (tmp_path / "lr.png").exists()


def test_other_verbs_do_not_take_the_options_of_lr(tmp_path):
    for option in ("--apply", "--output=x"):
        refused = called("fit", *SHORT, option, cwd=tmp_path, code=2).stderr
        assert refused == f"firstlight: {option.partition('=')[0]} is an option of lr: leave it out of fit\n"


def test_rate_without_an_option_of_its_own_is_not_guessed():
    with pytest.raises(UsageError, match=r"the model has no option named lr or learning_rate: leave out --apply"):
        rate_option({"model.optimizer": "SGD", "lr.decay": 0.1}, 0.1)
    with pytest.raises(UsageError, match=r"the model has model\.a\.lr=0\.1, model\.b\.lr=0\.1: leave"):
        rate_option({"model.a.lr": 0.1, "model.b.lr": 0.1}, 0.1)
    assert rate_option({"model.a.lr": 0.1, "model.b.lr": 0.2}, 0.1) == "model.a.lr"
