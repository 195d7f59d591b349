import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from firstlight.__main__ import main
from firstlight.cli.parser_errors import explain

CONFIG = str(Path(__file__).parents[2] / "configs" / "digits_mlp.yaml")

CASES = {
    "an unknown key": (["--model.network.hiden=[3]"], r"model\.network\.hiden is no option of .*MLP.*mean hidden\?"),
    "an unknown option": (
        ["--trainer.max_epoch=3"],
        r"no option --trainer\.max_epoch; did you mean --trainer.max_epochs",
    ),
    "an unknown key of the data": (
        ["--data.batch_sizes=3"],
        r"data\.batch_sizes is no option.*did you mean batch_size",
    ),
    "an unknown key of a callback": (["--early_stopping.patiense=3"], r"did you mean --early_stopping\.patience"),
    "an unknown key of the optimiser": (
        ["--model.optimizer.lrr=3"],
        r"lrr is no option of torch\.optim\.AdamW.*mean lr\?",
    ),
    "what the task gives the optimiser": (
        ["--model.optimizer.params=3"],
        r"params is no option of torch\.optim\.AdamW, which takes lr, [a-z_, ]+$",
    ),
    "the last part of an option": (["--patience=3"], r"no option --patience; did you mean --early_stopping\.patience"),
    "the last part of an option of a part": (["--lr=1"], r"no option --lr; did you mean --model\.optimizer\.lr\?$"),
    "what is like a last part": (["--epochs=3"], r"no option --epochs; did you mean --trainer\.max_epochs\?$"),
    "what is like nothing": (["--output=x.csv"], r"there is no option --output$"),
    "a word within another": (["--file=x"], r"there is no option --file$"),
    "a part of a part": (["--optimizer=SGD"], r"no option --optimizer; did you mean --model\.optimizer\?$"),
    "a name in capitals": (["--Patience=3"], r"no option --Patience; did you mean --early_stopping\.patience\?$"),
    "a file in the home folder": (["--config=~/nope.yaml", "--patience=3"], r"there is no file \S+/nope\.yaml"),
    "a configuration that is no file": (
        ["--config={trainer: {max_epochs: 1}}", "--patience=3"],
        r"no option --patience; did you mean --early_stopping\.patience\?$",
    ),
    "the beginning of an option": (["--seed=3"], r"there is no option --seed; did you mean --seed_everything\?"),
    "a file of data in the place of a class": (
        [f"--data={Path(CONFIG).parent / 'data' / 'wine.csv'}"],
        r"data: alcohol,malic_acid\S+ names no class; did you mean --data\.path\?$",
    ),
    "a GPU where there is none": (["--trainer.accelerator=gpu", "--trainer.devices=999"], r"^\S+ trainer: .*gpu"),
    "a wrong type": (["--trainer.max_epochs=abc"], r"trainer\.max_epochs: expected int, got abc"),
    "a wrong type in a list": (["--model.network.hidden=[x]"], r"model\.network\.hidden: expected int, got x"),
    "a wrong type of the optimiser": (["--model.optimizer.lr=x"], r"model\.optimizer\.lr: expected float, got x$"),
    "null for a part of a part": (["--model.network.norm=null"], r"norm: expected .*; null can be said in a YAML file"),
    "a wrong choice": (["--model.network.norm=bach"], r"norm: expected one of \['batch', 'layer'\], got bach"),
    "a class that is not there": (
        ["--model.network=firstlight.networks.MPL"],
        r"model\.network: .*no MPL; did you mean MLP",
    ),
    "an activation that is not there": (["--model.network.activation=torch.nn.Relu"], r"no Relu; did you mean ReLU"),
    "a module that is not there": (
        ["--model.network=nix.Net"],
        r"model\.network: there is no module nix; run it from the folder that holds nix\.py$",
    ),
    "a part of ours that is not there": (
        ["--model.network=firstlight.network.MLP"],
        r"firstlight has no network; did you mean networks\?",
    ),
    "an optimiser that is not there": (
        ["--model.optimizer=AdamX"],
        r"model\.optimizer: there is no class AdamX; did you mean torch\.optim\.Adam",
    ),
    "a network that is not there by its short name": (
        ["--model.network=MPL"],
        r"model\.network: there is no class MPL; did you mean firstlight\.networks\.MLP\?",
    ),
    "a file without --config": (["configs/x.yaml"], r"there is no option configs/x\.yaml: is it a --config\?"),
    "no training batches": (["--trainer.limit_train_batches=0"], r"trainer\.limit_train_batches=0 trains nothing"),
    "a sum for a loss": (
        ["--model.loss.init_args.reduction=sum"],
        r"CrossEntropyLoss gives \S+ for some samples and \S+ for them twice: it is no mean",
    ),
    "a folder as a file": (["--config=."], r"config: \S+ is no file$"),
    "a negative learning rate": (["--model.optimizer.lr=-1"], r"optimizer: Invalid learning rate: -1\.0"),
    "a loss for other targets": (
        ["--model.loss=torch.nn.MSELoss"],
        r"MSELoss cannot compare outputs \(3, 10\) float32",
    ),
    "a loss that is no number": (
        ["--model.loss.init_args.reduction=none"],
        r"CrossEntropyLoss gives \(3,\) float32: a loss is one number",
    ),
    "no epochs": (["--trainer.max_epochs=0"], r"trainer\.max_epochs=0 trains nothing"),
    "no steps": (["--trainer.max_steps=0"], r"trainer\.max_steps=0 trains nothing"),
    "logging each -5 steps": (["--trainer.log_every_n_steps=-5"], r"log_every_n_steps=-5: it is at least 0"),
    "a typo on the way to an option": (
        ["--model.optimzer.lr=0.1"],
        r"model\.optimzer\.lr is no option of firstlight\.tasks\.Classification, .*; did you mean optimizer\?$",
    ),
    "no accumulation": (["--trainer.accumulate_grad_batches=0"], r"accumulate_grad_batches=0 trains nothing"),
    "more processes than processors": (
        ["--trainer.accelerator=cpu", "--trainer.devices=999"],
        r"trainer\.devices=999: on the CPU each is a process, and \d+ are the most here",
    ),
    "no validation batches": (["--trainer.limit_val_batches=0"], r"nothing is ever validated \(limit_val_batches is 0"),
    "no validation in time": (
        ["--trainer.check_val_every_n_epoch=100"],
        r"nothing is ever validated \(check_val_every_n_epoch=100, but the run has 60 epochs",
    ),
    "a class of another kind": (["--model.network=torch.optim.Adam"], r"torch\.optim\.Adam.*not.*subclass of Module"),
    "a file that is not there": (["--config=digits_mpl.yaml"], r"there is no file .*digits_mpl\.yaml"),
    "a monitor that no metric has": (["--model.monitor=val/acc"], r"monitor=val/acc is no metric.*mean val/accuracy"),
    "labels outside the classes": (["--model.classes=5"], r"classes=5, so labels are 0 to 4, but 628 of 1257 are not"),
    "a network with too few logits": (["--model.network.out_features=9"], r"classes=10, but MLP gives .*\(3, 9\)"),
    "a network for other inputs": (
        ["--model.network=firstlight.networks.SimpleNet"],
        r"SimpleNet cannot take .*\(1, 8, 8\)",
    ),
    "an output folder that cannot be": (["--runs=file"], r"cannot make the folder file/.*: Not a directory"),
    "a batch size of 0": (["--data.batch_size=0"], "batch_size=0: it must be at least 1"),
    "two lengths of the warm-up": (
        ["--model.schedule.warmup=0.1", "--model.schedule.warmup_steps=3"],
        r"warmup=0\.1 and warmup_steps=3: give one",
    ),
    "a warm-up longer than the run": (
        ["--model.schedule.warmup_steps=9999"],
        r"warmup_steps=9999, but the whole run is",
    ),
    "no end for a schedule that needs one": (["--trainer.max_epochs=-1"], r"WarmupCosine must know how many"),
    "a strategy that is not there": (["--trainer.strategy=dpp"], r"trainer: .*strategy='dpp'"),
    "a default callback that is not there": (["--disable=[bests]"], r"no default callback bests: .*did you mean best"),
    "a second early stopping": (
        ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        r"default callback early_stopping does already",
    ),
    "a second progress bar": (
        ["--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"],
        r"default callback progress does already",
    ),
    "a second file last.ckpt": (
        ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_last=true"],
        r"default callback last does already",
    ),
    "a last checkpoint of no epoch": (["--last.every_n_epochs=0"], r"every_n_epochs=0: it is at least 1"),
    "an abbreviated option": (["--trainer.max_e=3"], r"there is no option --trainer\.max_e"),
    "a checkpoint to fit from": (["--ckpt=best"], r"fit goes on from the last checkpoint of --run DIR"),
    "a file whose name is like no other": (
        [f"--config={CONFIG.replace('digits_mlp', 'nope')}"],
        r"there is no file \S+/configs/nope\.yaml$",
    ),
    "a file of nearly that name": (
        [f"--config={CONFIG.replace('mlp', 'mpl')}"],
        r"there is no file \S+/digits_mpl\.yaml; did you mean digits_mlp\.yaml\?$",
    ),
    "a run that is not there": (["--run=runs/nope"], r"there is no run runs/nope: runs does not exist"),
}

FILES = {
    "a broken file": ("model: {a: [1\nb: 3", r"given\.yaml, line 2, column 2: expected ',' or '\]'"),
    "an unknown key in a file": ("modle: {a: 1}", r"there is no option modle\.a; did you mean model"),
    "a wrong type deep in a file": (
        Path(CONFIG).read_text().replace("lr: ", "lr: x"),
        r"model\.optimizer\.lr: expected float, got x\S+$",
    ),
    "a list for a file": ("- a\n- b\n", r"given\.yaml holds no options by name$"),
    "an empty file": ("# nothing\n", r"given\.yaml holds no options by name$"),
}

VERBS = {
    "a verb that is not there": (["tset"], r"there is no verb tset: .*did you mean test"),
    "nothing at all to fit": (["fit"], r"nothing says what data and model are"),
    "a test of random weights": (["test", "--config", CONFIG], r"random weights are never scored"),
    "a validation of random weights": (["validate", "--config", CONFIG], r"random weights are never scored"),
    "predictions of random weights": (["predict", "--config", CONFIG], r"random weights are never scored"),
    "the best of no run": (["test", "--config", CONFIG, "--ckpt", "best"], r"say which with --run DIR"),
    "a checkpoint that is not there": (["test", "--config", CONFIG, "--ckpt", "x.ckpt"], r"no checkpoint x\.ckpt"),
    "run without a best checkpoint": (
        ["run", "--config", CONFIG, "--disable=[best]"],
        r"run tests the best checkpoint",
    ),
    "an option without its value": (["fit", "--run"], r"--run: expected one argument"),
}


NULLS = {
    "batch_size: 32": ("batch_size: null", r"data\.batch_size: expected int, got None$"),
    "dropout: 0.3": ("dropout: null", r"model\.network\.dropout: expected float, got None$"),
    "class_path: firstlight.data.Digits": (
        "class_path:",
        r"data: class_path is null: give it a value, or leave it out$",
    ),
    "trainer:": ("trainer:\nbest:", r"trainer: null is no set of options"),
}


def assert_one_line(capsys, pattern):
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    assert re.search(pattern, printed.strip()), printed


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()


@pytest.mark.parametrize(("args", "pattern"), CASES.values(), ids=CASES)
def test_wrong_options_end_with_one_line_and_code_2(args, pattern, capsys):
    assert main(["fit", "--config", CONFIG, *args]) == 2
    assert_one_line(capsys, pattern)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("text", "pattern"), FILES.values(), ids=FILES)
def test_wrong_files_end_with_one_line_and_code_2(text, pattern, capsys):
    Path("given.yaml").write_text(text)
    assert main(["fit", "--config", CONFIG, "--config", "given.yaml"]) == 2
    assert_one_line(capsys, pattern)


@pytest.mark.parametrize(("was", "null", "pattern"), [(was, *rest) for was, rest in NULLS.items()], ids=NULLS)
def test_a_null_where_there_is_none_ends_with_one_line_and_code_2(was, null, pattern, capsys):
    text = Path(CONFIG).read_text()
    assert text.count(was) == 1
    if was == "trainer:":
        text = text[: text.index(was)] + was
    Path("given.yaml").write_text(text.replace(was, null))
    assert main(["fit", "--config", "given.yaml"]) == 2
    assert_one_line(capsys, pattern)


@pytest.mark.parametrize(("args", "pattern"), VERBS.values(), ids=VERBS)
def test_wrong_verbs_end_with_one_line_and_code_2(args, pattern, capsys):
    assert main(args) == 2
    assert_one_line(capsys, pattern)


def test_a_module_of_an_extra_that_is_not_installed_is_told_with_the_extra():
    message = 'Parser key "data":\n  Parser key "augment":\n    No module named \'kornia\''
    told = "data.augment: there is no module kornia, which firstlight's extra vision brings: pip install -e '.[vision]'"
    assert explain(message, [], []) == told


def test_ctrl_c_before_a_run_begins_is_no_bug(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("firstlight.cli.parser.fit", interrupted)
    assert main(["fit", "--config", CONFIG]) == 130
    assert_one_line(capsys, "interrupted")


@pytest.mark.parametrize("args", [["--help"], ["fit", "--data.help", "Table"], ["fit", "--help"]])
def test_who_reads_no_more_is_no_bug(args):
    command = [sys.executable, "-m", "firstlight", *args]
    shown = subprocess.run(f"{shlex.join(command)} | true", shell=True, capture_output=True, text=True)
    assert not shown.stderr


def test_wrong_use_shows_its_traceback_when_asked(capsys, monkeypatch):
    monkeypatch.setenv("FIRSTLIGHT_TRACEBACK", "1")
    assert main(["fit", "--config", CONFIG, "--data.batch_size=0"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_network_of_the_users_own_that_does_not_fit_is_told_with_its_line(monkeypatch, capsys):
    Path("own_part.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(64, 10)\n"
        "    def forward(self, inputs):\n        return super().forward(inputs[:, :, :7].flatten(1))\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert main(["fit", "--config", CONFIG, "--model.network=own_part.Net"]) == 2
    told = (
        r"Net cannot take samples of shape \(1, 8, 8\) \(own_part\.py, line 6\): a layer for 64 features was given 56$"
    )
    assert_one_line(capsys, told)


def test_a_bug_in_a_part_of_the_users_keeps_its_own_exception(monkeypatch):
    Path("buggy_part.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        raise KeyError('a bug')\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    with pytest.raises(KeyError, match="a bug"):
        main(["fit", "--config", CONFIG, "--model.network=buggy_part.Net"])
