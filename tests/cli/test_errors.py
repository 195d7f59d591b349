import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from firstlight.__main__ import main
from firstlight.cli.parser_errors import explain
from tests.helpers import newest, results

CONFIG = str(Path(__file__).parents[2] / "configs" / "digits_mlp.yaml")

CASES = {
    "an unknown option of the network": (
        ["--model.network.hiden=[3]"],
        r"model\.network\.hiden is not an option of .*MLP.*mean hidden\?",
    ),
    "an unknown option": (
        ["--trainer.max_epoch=3"],
        r"unknown option --trainer\.max_epoch; did you mean --trainer.max_epochs",
    ),
    "an unknown option of the data": (
        ["--data.batch_sizes=3"],
        r"data\.batch_sizes is not an option.*did you mean batch_size",
    ),
    "an unknown option of a callback": (["--early_stopping.patiense=3"], r"did you mean --early_stopping\.patience"),
    "an unknown option of the optimiser": (
        ["--model.optimizer.lrr=3"],
        r"lrr is not an option of torch\.optim\.AdamW.*mean lr\?",
    ),
    "the parameters of the optimiser": (
        ["--model.optimizer.params=3"],
        r"params is not an option of torch\.optim\.AdamW, which takes lr, [a-z_, ]+$",
    ),
    "the last part of an option": (
        ["--patience=3"],
        r"unknown option --patience; did you mean --early_stopping\.patience",
    ),
    "the last part of an option of a part": (
        ["--lr=1"],
        r"unknown option --lr; did you mean --model\.optimizer\.lr\?$",
    ),
    "a word of the last part of an option": (
        ["--epochs=3"],
        r"unknown option --epochs; did you mean --trainer\.max_epochs\?$",
    ),
    "an option without a similar one": (["--zebra=x"], r"unknown option --zebra$"),
    "a part of a word": (["--file=x"], r"unknown option --file$"),
    "the last key of an option with a class": (
        ["--optimizer=SGD"],
        r"unknown option --optimizer; did you mean --model\.optimizer\?$",
    ),
    "a name in capitals": (["--Patience=3"], r"unknown option --Patience; did you mean --early_stopping\.patience\?$"),
    "a folder with a long name": ([f"--runs={'x' * 300}"], r"File name too long: x{80}\.\.\.$"),
    "a run with a long name": ([f"--run={'x/' * 3000}"], r"File name too long: (x/){40}\.\.\.$"),
    "a configuration with a long name": ([f"--config={'x/' * 3000}"], r"File name too long: .*\.\.\.$"),
    "a configuration without an end": (["--config=/dev/zero"], r"/dev/zero has more than [\d,]+ characters"),
    "a folder whose name is not UTF-8": (
        ["--runs=a\udcff"],
        r"cannot use the folder a\\udcff/digits_mlp: its name is not UTF-8; choose another with --runs$",
    ),
    "a file in the home folder": (["--config=~/nope.yaml", "--patience=3"], r"there is no file \S+/nope\.yaml"),
    "a configuration that is YAML itself": (
        ["--config={trainer: {max_epochs: 1}}", "--patience=3"],
        r"unknown option --patience; did you mean --early_stopping\.patience\?$",
    ),
    "the beginning of an option": (["--seed=3"], r"unknown option --seed; did you mean --seed_everything\?"),
    "a data file instead of a class": (
        [f"--data={Path(CONFIG).parent / 'data' / 'wine.csv'}"],
        r"data: alcohol,malic_acid\S+ is not a class; did you mean --data\.path\?$",
    ),
    "a GPU on a machine without one": (["--trainer.accelerator=gpu", "--trainer.devices=999"], r"^\S+ trainer: .*gpu"),
    "a wrong type": (["--trainer.max_epochs=abc"], r"trainer\.max_epochs: expected int, got abc"),
    "a wrong type in a list": (["--model.network.hidden=[x]"], r"model\.network\.hidden: expected int, got x"),
    "a wrong type of the optimiser": (["--model.optimizer.lr=x"], r"model\.optimizer\.lr: expected float, got x$"),
    "null for an option of the network": (
        ["--model.network.norm=null"],
        r"norm: expected .*; to set it to null, use a YAML file",
    ),
    "a wrong choice": (["--model.network.norm=bach"], r"norm: expected one of \['batch', 'layer'\], got bach"),
    "an unknown class": (
        ["--model.network=firstlight.networks.MPL"],
        r"model\.network: .*no MPL; did you mean MLP",
    ),
    "an unknown activation": (["--model.network.activation=torch.nn.Relu"], r"no Relu; did you mean ReLU"),
    "an unknown module": (
        ["--model.network=nix.Net"],
        r"model\.network: no module named nix; run firstlight in the folder that holds nix\.py$",
    ),
    "an unknown module of firstlight": (
        ["--model.network=firstlight.network.MLP"],
        r"firstlight has no network; did you mean networks\?",
    ),
    "an unknown optimiser": (
        ["--model.optimizer=AdamX"],
        r"model\.optimizer: unknown class AdamX; did you mean torch\.optim\.Adam",
    ),
    "an unknown network by its short name": (
        ["--model.network=MPL"],
        r"model\.network: unknown class MPL; did you mean firstlight\.networks\.MLP\?",
    ),
    "a file without --config": (["configs/x.yaml"], r"unknown option configs/x\.yaml: is it a --config\?"),
    "a loss that is a sum": (
        ["--model.loss.init_args.reduction=sum"],
        r"CrossEntropyLoss returns the loss \S+ for some samples and \S+ for the same samples twice: it must be a mean",
    ),
    "a folder instead of a file": (["--config=."], r"config: \S+ is not a file$"),
    "a negative learning rate": (["--model.optimizer.lr=-1"], r"optimizer: Invalid learning rate: -1\.0"),
    "a loss for other targets": (
        ["--model.loss=torch.nn.MSELoss"],
        "Classification cannot take MSELoss: use torch.nn.CrossEntropyLoss",
    ),
    "a loss that is not a scalar": (
        ["--model.loss.init_args.reduction=none"],
        r"CrossEntropyLoss returns \(3,\) float32: it must return the mean loss",
    ),
    "no epochs": (["--trainer.max_epochs=0"], r"trainer\.max_epochs=0 trains nothing"),
    "a typing error within an option": (
        ["--model.optimzer.lr=0.1"],
        r"model\.optimzer\.lr is not an option of firstlight\.tasks\.Classification, .*; did you mean optimizer\?$",
    ),
    "more processes than processors": (
        ["--trainer.accelerator=cpu", "--trainer.devices=999"],
        r"trainer\.devices=999 starts 999 processes on the CPU; at most \d+ fit here",
    ),
    "no validation batches": (["--trainer.limit_val_batches=0"], r"the run never validates \(limit_val_batches is 0"),
    "no validation within the run": (
        ["--trainer.check_val_every_n_epoch=100"],
        r"the run never validates \(check_val_every_n_epoch=100, but the run has 60 epochs",
    ),
    "a class of another kind": (["--model.network=torch.optim.Adam"], r"torch\.optim\.Adam.*not.*subclass of Module"),
    "a missing file": (["--config=digits_mpl.yaml"], r"there is no file .*digits_mpl\.yaml"),
    "an unknown monitor": (["--model.monitor=val/acc"], r"unknown monitor=val/acc; .*mean val/accuracy"),
    "labels outside the classes": (
        ["--model.classes=5"],
        r"classes=5, so labels must be 0 to 4, but 628 of 1257 are not",
    ),
    "a network with too few logits": (
        ["--model.network.out_features=9"],
        "classes=10, but MLP returns 9 outputs per sample: set out_features=10$",
    ),
    "a network for other inputs": (
        ["--model.network=firstlight.networks.SimpleNet"],
        r"SimpleNet cannot take .*\(1, 8, 8\)",
    ),
    "an output folder that cannot be created": (["--runs=file"], r"cannot create the folder file/.*: Not a directory"),
    "a batch size of 0": (["--data.batch_size=0"], "batch_size=0: it must be at least 1"),
    "two lengths of the warm-up": (
        ["--model.schedule.warmup=0.1", "--model.schedule.warmup_steps=3"],
        r"warmup=0\.1 and warmup_steps=3: give one",
    ),
    "a warm-up longer than the run": (
        ["--model.schedule.warmup_steps=9999"],
        r"warmup_steps=9999, but the whole run is",
    ),
    "no end for a schedule that needs the total steps": (
        ["--trainer.max_epochs=-1"],
        r"WarmupCosine must know how many",
    ),
    "an unknown strategy": (["--trainer.strategy=dpp"], r"trainer: .*strategy='dpp'"),
    "an unknown default callback": (["--disable=[bests]"], r"unknown default callback bests; .*did you mean best"),
    "a second early stopping": (
        ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        r"duplicates the default callback early_stopping",
    ),
    "a second progress bar": (
        ["--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"],
        r"duplicates the default callback progress",
    ),
    "a second file last.ckpt": (
        ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_last=true"],
        r"duplicates the default callback last",
    ),
    "a last checkpoint every 0 epochs": (["--last.every_n_epochs=0"], r"every_n_epochs=0: it must be at least 1"),
    "an abbreviated option": (["--trainer.max_e=3"], r"unknown option --trainer\.max_e"),
    "a checkpoint for fit": (["--ckpt=best"], r"fit resumes the last checkpoint of --run DIR"),
    "a missing file without a similar name": (
        [f"--config={CONFIG.replace('digits_mlp', 'nope')}"],
        r"there is no file \S+/configs/nope\.yaml$",
    ),
    "a missing file with a similar name": (
        [f"--config={CONFIG.replace('mlp', 'mpl')}"],
        r"there is no file \S+/digits_mpl\.yaml; did you mean digits_mlp\.yaml\?$",
    ),
    "a missing run": (["--run=runs/nope"], r"there is no run runs/nope: runs does not exist"),
}

FILES = {
    "a NUL character": ('runs: "a\\0b"', r"the option 'a\?b' holds a NUL character, which no path has$"),
    "a broken file": ("model: {a: [1\nb: 3", r"given\.yaml, line 2, column 2: expected ',' or '\]'"),
    "an unknown option in a file": ("modle: {a: 1}", r"unknown option modle\.a; did you mean model"),
    "a wrong type deep in a file": (
        Path(CONFIG).read_text().replace("lr: ", "lr: x"),
        r"model\.optimizer\.lr: expected float, got x\S+$",
    ),
    "a file that holds a list": ("- a\n- b\n", r"given\.yaml holds no named options$"),
    "an empty file": ("# nothing\n", r"given\.yaml holds no named options$"),
}

VERBS = {
    "an unknown verb": (["tset"], r"unknown verb tset; .*did you mean test"),
    "no task and no data": (["fit"], r"data and model must be given: use --config FILE, or --run DIR"),
    "a test of random weights": (["test", "--config", CONFIG], r"random weights are not evaluated"),
    "a validation of random weights": (["validate", "--config", CONFIG], r"random weights are not evaluated"),
    "predictions of random weights": (["predict", "--config", CONFIG], r"random weights are not evaluated"),
    "the best checkpoint without a run": (["test", "--config", CONFIG, "--ckpt", "best"], r"add --run DIR"),
    "a missing checkpoint": (["test", "--config", CONFIG, "--ckpt", "x.ckpt"], r"no checkpoint x\.ckpt"),
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
    "trainer:": ("trainer:\nbest:", r"trainer: null is not a set of options"),
    "trainer:\n  max_epochs: 60\n  log_every_n_steps: 10": ("trainer: []", r"trainer: \[\] is not a set of options"),
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
def test_wrong_options_exit_with_one_line_and_code_2(args, pattern, capsys):
    assert main(["fit", "--config", CONFIG, *args]) == 2
    assert_one_line(capsys, pattern)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("text", "pattern"), FILES.values(), ids=FILES)
def test_wrong_files_exit_with_one_line_and_code_2(text, pattern, capsys):
    Path("given.yaml").write_text(text)
    assert main(["fit", "--config", CONFIG, "--config", "given.yaml"]) == 2
    assert_one_line(capsys, pattern)


@pytest.mark.parametrize(("was", "null", "pattern"), [(was, *rest) for was, rest in NULLS.items()], ids=NULLS)
def test_null_for_an_option_that_takes_none_exits_with_one_line_and_code_2(was, null, pattern, capsys):
    text = Path(CONFIG).read_text()
    assert text.count(was) == 1
    if was == "trainer:":
        text = text[: text.index(was)] + was
    Path("given.yaml").write_text(text.replace(was, null))
    assert main(["fit", "--config", "given.yaml"]) == 2
    assert_one_line(capsys, pattern)


@pytest.mark.parametrize(("args", "pattern"), VERBS.values(), ids=VERBS)
def test_wrong_verbs_exit_with_one_line_and_code_2(args, pattern, capsys):
    assert main(args) == 2
    assert_one_line(capsys, pattern)


def test_error_names_the_extra_of_a_missing_module():
    message = 'Parser key "data":\n  Parser key "augment":\n    No module named \'kornia\''
    told = explain(message, [], [])
    assert told.startswith("data.augment: no module named kornia, which is in firstlight's extra vision: ")
    assert told.endswith("pip install 'firstlight[vision]'")


def test_ctrl_c_before_a_run_starts_exits_with_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("firstlight.cli.verbs.fit", interrupted)
    assert main(["fit", "--config", CONFIG]) == 130
    assert_one_line(capsys, "interrupted")


@pytest.mark.parametrize("args", [["--help"], pytest.param(["fit", "--help"], marks=pytest.mark.slow)])
def test_closed_output_pipe_prints_no_error(args):
    command = [sys.executable, "-m", "firstlight", *args]
    shown = subprocess.run(f"{shlex.join(command)} | true", shell=True, capture_output=True, text=True)
    assert not shown.stderr


def test_environment_variable_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("FIRSTLIGHT_TRACEBACK", "1")
    assert main(["fit", "--config", CONFIG, "--data.batch_size=0"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_error_names_the_line_of_a_user_network_that_does_not_fit(monkeypatch, capsys):
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


def test_exception_in_a_user_class_passes_through(monkeypatch):
    Path("buggy_part.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        raise KeyError('a bug')\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    with pytest.raises(KeyError, match="a bug"):
        main(["fit", "--config", CONFIG, "--model.network=buggy_part.Net"])


@pytest.mark.parametrize(
    ("redirected", "code", "told"),
    [
        ("--version >&-", 0, ""),
        ("tset >&-", 2, r"firstlight: unknown verb tset.*\n"),
        ("tset 2>&-", 2, ""),
        ("--version >/dev/full", 1, "firstlight: cannot write to standard output: No space left on device\n"),
        ("--help >/dev/full", 1, "firstlight: cannot write to standard output: No space left on device\n"),
    ],
)
def test_a_closed_or_full_output_is_told_in_one_line(redirected, code, told):
    done = subprocess.run(f"{sys.executable} -m firstlight {redirected}", shell=True, capture_output=True, text=True)
    assert done.returncode == code
    assert re.fullmatch(told, done.stderr)


@pytest.mark.parametrize(
    ("redirected", "code", "told"),
    [
        (">/dev/full", 1, "firstlight: cannot write to standard output: No space left on device"),
        pytest.param("| head -1", 141, "", marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", 0, "", marks=pytest.mark.slow),
        pytest.param("2>/dev/full", 0, "", marks=pytest.mark.slow),
    ],
)
def test_results_are_kept_if_an_output_fails(redirected, code, told, tmp_path):
    command = f"{sys.executable} -m firstlight run --config {CONFIG} --trainer.max_epochs=1 {redirected}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert told in done.stderr and "Traceback" not in done.stderr
    assert results(newest(tmp_path))["metrics"]["test/accuracy"] > 0.5


def test_name_that_the_terminal_cannot_show_is_printed_with_escapes(tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["fit", "--config", CONFIG, "--trainer.max_epochs=1", "--experiment=été"]) == 0
    assert b"runs/\\xe9t\\xe9/" in output.buffer.getvalue()
    assert (tmp_path / "runs" / "été" / "latest").is_file()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "fsdp"])
def test_strategies_whose_results_would_be_lost_or_wrong_are_refused(strategy, capsys):
    assert main(["fit", "--config", CONFIG, f"--trainer.strategy={strategy}"]) == 2
    assert_one_line(capsys, f"trainer.strategy={strategy} ")
