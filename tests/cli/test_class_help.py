import pytest
import yaml
from torch import nn

from firstlight.__main__ import main
from firstlight.cli.parser import CLI
from tests.helpers import CONFIG


class MLP(nn.Module):
    """Another class of the name of one of ours, as torchvision has one."""


def shown(capsys, *args):
    with pytest.raises(SystemExit):
        main(["fit", *args])
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


@pytest.mark.parametrize(("option", "told"), OPTIONS.items(), ids=OPTIONS)
def test_help_without_a_class_lists_the_public_ones_in_a_few_lines(option, told, capsys):
    text = shown(capsys, f"--{option}.help")
    assert [each for each in told if each not in text] == []
    assert f"--{option}.help CLASS shows its options." in text
    assert len(text.splitlines()) <= 30
    assert max(map(len, text.splitlines())) <= 120


def test_help_with_a_class_lists_its_options_and_no_subclasses(capsys):
    for args in (["--model.network.help", "MLP"], ["--model.network.help=firstlight.networks.MLP"]):
        text = shown(capsys, "--config", CONFIG, *args)
        assert "firstlight.networks.MLP: Linear layers" in text
        assert "--model.network.dropout DROPOUT" in text
        assert len(text.splitlines()) < 40


def test_help_of_data_and_optimisers_has_the_options_that_they_inherit_or_leave_open(capsys):
    assert "--data.batch_size BATCH_SIZE" in shown(capsys, "--data.help", "Table")
    text = shown(capsys, "--model.optimizer.help", "SGD")
    assert "--model.optimizer.momentum MOMENTUM" in text
    assert "params" not in text.split("options:")[1].split("--model.optimizer.maximize")[0]


def test_help_of_a_verb_lists_no_subclasses(capsys):
    assert "known subclasses" not in " ".join(shown(capsys, "--help").split())


def test_a_short_name_is_the_public_class_also_beside_another_of_its_name(capsys):
    for args in (["--model.network", "MLP"], ["--model.network=MLP"]):
        config = yaml.safe_load(shown(capsys, "--config", CONFIG, *args, "--print_config"))
        network = config["model"]["init_args"]["network"]
        assert network["class_path"] == "firstlight.networks.MLP"
    assert MLP.__name__ == "MLP"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("MPL", "there is no class MPL; did you mean firstlight.networks.MLP?"),
        ("firstlight.networks.MPL", "there is no class firstlight.networks.MPL; did you mean firstlight.networks.MLP?"),
        ("Foo", "there is no class Foo; --model.network.help lists what there is"),
        ("nix.Net", "cannot import nix: No module named 'nix'"),
    ],
)
def test_help_of_a_class_that_is_not_there_says_what_would_be_right(given, told, capsys):
    assert main(["fit", "--model.network.help", given]) == 2
    assert capsys.readouterr().err == f"firstlight: model.network: {told}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["--disable=best,last"],
        ["--disable", "best, last"],
        ["--disable=[best,last]"],
        ["--disable=best", "--disable", "last"],
        ["--disable=[best]", "--disable=last"],
    ],
)
def test_what_is_left_out_can_be_spelled_in_three_ways(args):
    assert CLI("fit", ["--config", CONFIG, *args]).experiment.disable == {"best", "last"}
