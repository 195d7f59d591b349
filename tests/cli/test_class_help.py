import pytest
import yaml
from torch import nn

from firstlight.__main__ import main
from firstlight.cli import VERBS
from firstlight.cli.parser import CLI
from tests.helpers import CONFIG


class MLP(nn.Module):
    """A class with the name of a firstlight class, like one in torchvision."""


def shown(capsys, *args, verb="fit"):
    with pytest.raises(SystemExit):
        main([verb, *args])
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


OPTIONS = {
    "model": ["firstlight.tasks.Classification", "Logits `(B, classes)` against class indices"],
    "model.network": ["firstlight.networks.MLP", "Linear layers with an activation after each but the last."],
    "model.loss": ["torch.nn.HuberLoss", "firstlight.losses.ContrastiveLoss"],
    "model.optimizer": ["torch.optim.SGD", "torch.optim.AdamW"],
    "model.schedule": ["firstlight.schedules.WarmupCosine", "firstlight.schedules.Cosine"],
    "data": ["firstlight.data.Table", "firstlight.data.Digits"],
}


@pytest.mark.parametrize(("option", "expected"), OPTIONS.items(), ids=OPTIONS)
def test_help_without_a_class_lists_the_public_classes_briefly(option, expected, capsys):
    text = shown(capsys, f"--{option}.help")
    assert [each for each in expected if each not in text] == []
    assert f"--{option}.help CLASS shows its options." in text
    assert len(text.splitlines()) <= 30
    assert max(map(len, text.splitlines())) <= 120


def test_help_with_a_class_lists_its_options_without_subclasses(capsys):
    for args in (["--model.network.help", "MLP"], ["--model.network.help=firstlight.networks.MLP"]):
        text = shown(capsys, "--config", CONFIG, *args)
        assert "firstlight.networks.MLP: Linear layers" in text
        assert "--model.network.dropout DROPOUT" in text
        assert len(text.splitlines()) < 40


def test_help_of_a_class_includes_inherited_options_and_no_parameters(capsys):
    assert "--data.batch_size BATCH_SIZE" in shown(capsys, "--data.help", "Table")
    text = shown(capsys, "--model.optimizer.help", "SGD")
    assert "--model.optimizer.momentum MOMENTUM" in text
    assert "params" not in text.split("options:")[1].split("--model.optimizer.maximize")[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_its_own_forms_and_null_and_no_subclasses(verb, capsys):
    text = shown(capsys, "--help", verb=verb)
    usage, _, options = text.partition("\n\n")
    assert all(f" firstlight {verb} --" in line for line in usage.splitlines())
    assert ("--ckpt PATH" in usage) is (verb in ("validate", "test", "predict", "export"))
    assert ("resume a run" in usage) is (verb in ("run", "fit"))
    assert max(map(len, usage.splitlines())) <= 120
    assert "known subclasses" not in " ".join(text.split())
    assert "None" not in options and "default: null" in options


def test_short_name_is_the_public_class_even_if_another_class_has_that_name(capsys):
    for args in (["--model.network", "MLP"], ["--model.network=MLP"]):
        config = yaml.safe_load(shown(capsys, "--config", CONFIG, *args, "--print_config"))
        network = config["model"]["init_args"]["network"]
        assert network["class_path"] == "firstlight.networks.MLP"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("MPL", "unknown class MPL; did you mean firstlight.networks.MLP?"),
        ("firstlight.networks.MPL", "unknown class firstlight.networks.MPL; did you mean firstlight.networks.MLP?"),
        ("Foo", "unknown class Foo; --model.network.help lists the available classes"),
        ("nix.Net", "cannot import nix: No module named 'nix'"),
    ],
)
def test_help_of_an_unknown_class_suggests_a_known_one(given, message, capsys):
    assert main(["fit", "--model.network.help", given]) == 2
    assert capsys.readouterr().err == f"firstlight: model.network: {message}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["--disable=best,last"],
        ["--disable", "best, last"],
        ["--disable=[best,last]"],
        ['--disable=["best", "last"]'],
        ["--disable=best", "--disable", "last"],
        ["--disable=[best]", "--disable=last"],
    ],
)
def test_disable_can_be_repeated_or_be_a_list(args):
    assert CLI("fit", ["--config", CONFIG, *args]).experiment.disable == {"best", "last"}
