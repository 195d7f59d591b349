import math
import os
import re
import shutil
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from PIL import Image

from firstlight.__main__ import main
from firstlight.callbacks import Insight
from firstlight.cli.parser import CLI
from firstlight.errors import say
from firstlight.networks import MLP
from firstlight.preflight import draw, dry_run, judge
from firstlight.preflight.report import CHECKS, readable
from tests.helpers import CONFIG, QUICK_CONFIGS, ROOT, newest, quick_or_slow
from tests.preflight import broken

FASHION = Path("/usr/share/datasets/fashion-mnist")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SEVERITIES = ("fault", "warning", "info")
OWN_MODULE = ["--model=tests.preflight.broken.Own", "--data=tests.preflight.broken.OwnData", "--trainer.max_epochs=2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checked(capsys, *args, code=0):
    """Return the lines of the table by check, and the error at the end."""
    printed = printed_by_check(capsys, *args, "--verbose", code=code)
    table = [line for line in printed.out.splitlines() if line.split()[:1] and line.split()[0] in CHECKS]
    return {
        line.split()[0]: line for line in table if line.split()[1] in ("ok", "warn", "FAIL", "skipped")
    }, printed.err


def printed_by_check(capsys, *args, code=0):
    config = [] if args[0].startswith("--model=") else ["--config", CONFIG]
    assert main(["check", *config, *args]) == code
    return capsys.readouterr()


def network(kind):
    return f"--model.network={kind.__module__}.{kind.__name__}"


def test_good_experiment_passes_without_a_warning_and_leaves_no_files(capsys, caplog):
    table, error = checked(capsys)
    assert tuple(table) == CHECKS
    assert all(line.split()[1] == "ok" for line in table.values()), table
    assert error == "" and caplog.text == ""
    assert not os.listdir()


def figures(line):
    return [int(number.replace(",", "")) for number in re.findall(r"\b[\d,]+\b", line)]


def test_figures_of_the_table_are_those_of_the_run(capsys):
    table, _ = checked(capsys)
    samples = figures(table["data"])
    assert sum(samples) == len(sklearn.datasets.load_digits().target)
    batches = [math.ceil(size / 32) for size in samples[:2]]
    assert figures(table["batches"]) == batches
    needed, free = re.search(r"need about ([\d.]+) MB, (.*) free$", table["output"]).groups()
    assert free.split()[1] == readable(shutil.disk_usage(".").free).split()[1]
    assert main(["fit", "--config", CONFIG, "--trainer.max_epochs=1", "--disable=progress"]) == 0
    printed = capsys.readouterr().out
    assert f"{samples[0]:,} train, {samples[1]:,} val, {samples[2]:,} test samples" in printed
    assert f", {batches[0]} optimiser steps" in printed
    written = newest(".") / "checkpoints" / "last.ckpt"
    assert 1e6 * float(needed) == pytest.approx(3 * written.stat().st_size, rel=0.1)


def test_parameter_without_a_gradient_is_named(capsys):
    table, error = checked(capsys, network(broken.Unused), code=2)
    assert "FAIL" in table["gradients"]
    assert "network.forgotten.weight, network.forgotten.bias" in table["gradients"]
    assert "network.last" not in table["gradients"]
    assert error == "firstlight: 1 of 15 checks failed: gradients\n"


def test_leak_between_samples_is_found(capsys):
    table, _ = checked(capsys, network(broken.Leaking), code=2)
    assert "FAIL" in table["mixing"]
    assert "Leaking mixes the samples" in table["mixing"]
    assert re.search(
        r"replacing one of 8 samples changes the outputs of the others by [\d.]+% ",
        table["mixing"],
    )


def test_dropout_is_not_a_leak(capsys):
    table, _ = checked(capsys, network(broken.Noisy))
    assert " ok " in table["mixing"]


def test_batch_normalisation_may_mix_samples_in_training_mode(capsys):
    table, _ = checked(capsys, "--model.network.norm=batch")
    assert " ok " in table["mixing"] and "batch normalisation mixes them by design" in table["mixing"]


RATES = {
    "learning_rate_too_high": [("torch.optim.AdamW", 3), ("torch.optim.SGD", 30), ("torch.optim.SGD", 1e30)],
    "learning_rate_too_low": [("torch.optim.AdamW", 1e-6), ("torch.optim.SGD", 1e-6), ("torch.optim.AdamW", 0)],
}
SIGMOID = ["--model.network.activation=torch.nn.Sigmoid", f"--model.network.hidden={[64] * 20}"]
NETWORKS = {
    "Unused": ["fault unused_parameters"],
    "Detached": ["fault detached_parameters"],
    "AllDetached": ["fault detached_parameters", "fault no_learning"],
    "Blind": ["fault ignores_inputs", "fault no_learning"],
    "Leaking": ["fault mixes_samples"],
    "StuckBatchNorm": ["fault mixes_samples"],
    "AlwaysDropping": ["warning train_eval_mismatch"],
    "Different": ["warning train_eval_mismatch"],
    "Frozen": ["info frozen_parameters"],
    "TooLarge": ["warning initial_loss_off"],
    "Linear": [],
    "Noisy": [],
}


def found(capsys, *args):
    config = [] if args[0].startswith("--model=") else ["--config", CONFIG]
    main(["check", *config, *args])
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.split()[:1] and line.split()[0] in SEVERITIES]
    return [" ".join(line.split()[:2]).rstrip(":") for line in lines], printed.out


@pytest.mark.parametrize(
    ("name", "optimizer", "rate"),
    [
        pytest.param(name, *each, marks=[pytest.mark.slow] if number else [])
        for name, cases in RATES.items()
        for number, each in enumerate(cases)
    ],
)
def test_wrong_learning_rate_is_named_with_its_direction_and_a_better_one(name, optimizer, rate, capsys):
    names, printed = found(capsys, f"--model.optimizer={optimizer}", f"--model.optimizer.lr={rate}")
    assert names == [f"fault {name}"]
    if rate:
        better = float(re.search(r": try ([\d.e+-]+)", printed)[1])
        assert (better < rate) == (name == "learning_rate_too_high")


def test_vanishing_gradient_is_named_before_its_symptoms(capsys):
    names, printed = found(capsys, *SIGMOID)
    assert names == ["fault vanishing_gradient", "fault ignores_inputs", "fault no_learning"]
    assert "in network.hidden0.0.weight, and" in printed and "a symptom: mend what stands above it first" in printed


@pytest.mark.parametrize("kind", quick_or_slow(NETWORKS, {"AllDetached", "Leaking", "AlwaysDropping", "Linear"}))
def test_fault_of_a_network_is_named(kind, capsys):
    assert found(capsys, network(getattr(broken, kind)))[0] == NETWORKS[kind]


def test_loss_that_broadcasts_outputs_over_the_targets_of_others_is_wrong(capsys):
    names, printed = found(capsys, "--model.loss=tests.preflight.broken.OfOtherTargets")
    assert names[0] == "fault wrong_loss" and "stays the same when samples exchange their targets" in printed


@pytest.mark.parametrize("loss", ["Flipped", "OfOutputsOnly"])
def test_loss_that_does_not_fall_towards_the_targets_is_wrong(loss, capsys):
    assert found(capsys, f"--model.loss=tests.preflight.broken.{loss}")[0] == ["fault wrong_loss"]


OWN = {
    "": [],
    "detached": ["fault detached_parameters"],
    "flipped": ["fault wrong_loss"],
    "not_zeroed": ["fault gradient_not_zeroed"],
    "unscaled": ["warning unscaled_inputs"],
}


@pytest.mark.parametrize("fault", quick_or_slow(OWN, {"", "not_zeroed"}))
def test_fault_of_any_lightning_module_is_named(fault, capsys):
    assert found(capsys, *OWN_MODULE, f"--model.fault={fault}", f"--data.fault={fault}")[0] == OWN[fault]


@pytest.mark.parametrize(
    ("lr", "name"),
    [(30, "learning_rate_too_high"), pytest.param(1e-6, "learning_rate_too_low", marks=pytest.mark.slow)],
)
def test_wrong_learning_rate_of_any_lightning_module_is_named(lr, name, capsys):
    assert found(capsys, *OWN_MODULE, f"--model.lr={lr}")[0] == [f"fault {name}"]


def test_schedule_of_any_lightning_module_is_drawn(capsys):
    printed = found(capsys, *OWN_MODULE)[1]
    curve = [line.partition("|")[2] for line in printed.splitlines() if line[:12].endswith("|")]
    assert len(curve) == draw.HEIGHT and curve[0].startswith("*" * 9)
    assert "step 80" in printed  # Two epochs of 40 batches.


def test_check_changes_no_bit_of_the_fit_that_follows(tmp_path):
    weights = []
    for is_checked in (False, True):
        options = ["--config", CONFIG, "--trainer.max_epochs=1", f"--runs={tmp_path / str(is_checked)}"]
        experiment = CLI("fit", options).training()
        if is_checked:
            assert not experiment.check().failed
        experiment.fit()
        weights.append(experiment.task.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_plan_has_the_figures_of_the_run(capsys):
    printed = found(capsys, "--trainer.max_epochs=3", "--trainer.val_check_interval=0.5")[1]
    assert "plan     120 optimiser steps, 6 of them warm-up; 40 training and 9 validation batches an epoch" in printed
    network = MLP(64, [256, 128], 10, dropout=0.3)
    count = sum(each.numel() for each in network.parameters())
    assert f"model    {count:,} parameters; memory with 32 samples a batch:" in printed
    assert f" {4 * count / 1000:.0f} kB weights" in printed
    assert f"{8 * count / 1000:.0f} kB optimiser" in printed
    assert re.search(r"loss     2\.3\d+ before the first step; 2\.303 for 10 equal logits", printed)
    assert re.search(r"time     about [\d.]+ s, .* a batch, .* a validation on cpu", printed)


def test_the_time_includes_what_is_recorded_at_steps_and_validations(capsys, monkeypatch):
    clock = [0.0]

    def advance(hook, seconds):
        original = getattr(Insight, hook)

        def slower(self, trainer, *args):
            original(self, trainer, *args)
            clock[0] += 0 if trainer.sanity_checking else seconds

        monkeypatch.setattr(Insight, hook, slower)

    advance("on_train_batch_end", 0.0625)
    advance("on_validation_end", 2.0)
    monkeypatch.setattr(dry_run, "_now", lambda module: clock[0])
    monkeypatch.setattr(Insight, "evaluate", lambda *args, **options: say("seen   in a dry run"))
    monkeypatch.chdir(ROOT)
    facts = CLI("check", ["--config", "configs/wine.yaml"]).experiment.check().facts  # 60 epochs of 8 batches
    assert facts.seconds == pytest.approx(480 * 0.0625 + 60 * 2.0)
    assert "seen" not in capsys.readouterr().out


def test_verbose_lists_layers_and_classes(capsys):
    printed = found(capsys, "--verbose")[1]
    assert re.search(r"network.hidden0.0 +Linear +32 x 256 +16,640 +33 %", printed)
    assert "0: 124 (9.9 %)" in printed


def test_plot_is_a_png_with_schedule_and_images(capsys, tmp_path):
    found(capsys, "--plot=seen.png")
    with Image.open("seen.png") as image:
        assert image.format == "PNG" and image.size[0] == 800 and image.size[1] > 400
    assert main(["fit", "--config", CONFIG, "--plot=seen.png"]) == 2
    assert "--plot is an option of check" in capsys.readouterr().err
    assert main(["check", "--config", CONFIG, "--plot=nowhere/seen.png"]) == 2
    assert "the folder" in capsys.readouterr().err
    assert main(["check", "--config", CONFIG, "--plot=seen.jpg"]) == 2
    assert "must end in .png" in capsys.readouterr().err


def test_wrong_labels_end_the_check_before_the_dry_run(capsys):
    table, error = checked(capsys, "--model.classes=5", code=2)
    assert "FAIL" in table["data"]
    assert "classes=5" in table["data"]
    assert error == "firstlight: 1 of 3 checks failed: data; 12 more checks not tried\n"
    assert "overfit" not in table


@pytest.mark.parametrize("split", ["train", "val"])
def test_limit_that_leaves_no_batch_fails_in_check_and_fit(split, capsys):
    option = f"--trainer.limit_{split}_batches=0.001"
    assert "FAIL" in checked(capsys, option, code=2)[0]["start"]
    assert main(["fit", "--config", CONFIG, option]) == 2
    assert f"limit_{split}_batches" in capsys.readouterr().err
    assert not os.listdir()


@pytest.mark.filterwarnings("ignore:Total length of .* is zero")
@pytest.mark.parametrize(("split", "check"), [("training", "start"), ("validation", "batches")])
def test_split_without_a_batch_is_refused(split, check, capsys, monkeypatch):
    empty = split == "training"
    monkeypatch.setattr(
        "firstlight.data.loader.ResumableDistributedSampler.__len__", lambda self: 0 if self.shuffle is empty else 2
    )
    constant = "--model.schedule=firstlight.schedules.Constant"
    table = checked(capsys, constant, code=2)[0]
    assert "FAIL" in table[check]
    assert f"the {split} data has no batch" in table[check]
    assert main(["fit", "--config", CONFIG, constant]) == 2
    assert f"the {split} data has no batch" in capsys.readouterr().err
    assert not os.listdir()


def test_monitor_that_validation_does_not_log_is_refused(capsys):
    options = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor=val/acuracy",
    ]
    table, _ = checked(capsys, *options, code=2)
    assert "val/acuracy" in table["monitors"]
    assert "did you mean val/accuracy?" in table["monitors"]
    assert main(["fit", "--config", CONFIG, *options]) == 2
    assert "ModelCheckpoint monitors val/acuracy" in capsys.readouterr().err
    assert not os.listdir()


def test_disk_without_room_is_refused(capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    table, _ = checked(capsys, code=2)
    assert "FAIL     runs/digits_mlp has no room" in table["output"]
    assert main(["fit", "--config", CONFIG]) == 2
    assert "1,000 are free" in capsys.readouterr().err
    assert not os.listdir()


@pytest.mark.parametrize(
    "config",
    quick_or_slow(CONFIGS, QUICK_CONFIGS),
    ids=lambda path: path.stem,
)
def test_every_config_passes(config, tmp_path, monkeypatch, capsys):
    if str(FASHION) in config.read_text() and not FASHION.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    monkeypatch.chdir(ROOT)  # Paths in the files start there.
    code = main(["check", "--config", str(config), "--runs", str(tmp_path / "runs")])
    printed = capsys.readouterr()
    assert code == 0, printed
    told = [line.split()[:2] for line in printed.out.splitlines() if line.startswith(("fault", "warning"))]
    assert not {name.rstrip(":") for _, name in told} & {*judge.CAUSES_FIRST}, printed.out
    assert not os.listdir(tmp_path)
