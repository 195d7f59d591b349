from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from firstlight.errors import UsageError
from firstlight.optim import MuonAdamW, build, parameter_groups


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.batch_norm = nn.BatchNorm2d(2)
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.layer_norm = nn.LayerNorm(3)
        self.scale = nn.Parameter(torch.tensor(1.0))


def names(module):
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[known[id(parameter)] for parameter in group["params"]] for group in parameter_groups(module)]


def test_only_weights_with_two_axes_or_more_are_decayed():
    decayed, spared = names(Everything())
    assert decayed == ["conv.weight", "embedding.weight", "linear.weight"]
    assert set(spared) == {
        "scale",
        "conv.bias",
        "linear.bias",
        "batch_norm.weight",
        "batch_norm.bias",
        "layer_norm.weight",
        "layer_norm.bias",
    }


def test_every_trainable_parameter_is_listed_once():
    module = Everything()
    listed = sorted(name for group in names(module) for name in group)
    assert listed == sorted(name for name, _ in module.named_parameters())


def test_the_first_group_has_the_decay_of_the_optimiser_and_the_second_has_none():
    optimizer = torch.optim.AdamW(parameter_groups(Everything()), lr=0.1, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_a_step_without_gradients_shrinks_weights_and_leaves_biases_alone():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(parameter_groups(layer), lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias.detach(), bias)


def test_frozen_parameters_are_left_out():
    module = Everything()
    module.linear.requires_grad_(False)
    listed = [name for group in names(module) for name in group]
    assert "conv.weight" in listed
    assert not [name for name in listed if name.startswith("linear")]


def test_shared_parameters_are_listed_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    decayed, spared = parameter_groups(nn.Sequential(first, second))
    assert [id(parameter) for parameter in decayed["params"]] == [id(first.weight)]
    assert len(spared["params"]) == 2


@pytest.mark.parametrize(
    ("module", "expected"),
    [(nn.Linear(2, 2, bias=False), [{"params"}]), (nn.LayerNorm(2), [{"params", "weight_decay"}]), (nn.ReLU(), [])],
)
def test_a_group_without_parameters_is_left_out(module, expected):
    assert [set(group) for group in parameter_groups(module)] == expected


def stepped(optimizer, module, steps=3):
    torch.manual_seed(1)
    inputs = torch.randn(8, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        optimizer.step()


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def test_matrices_step_as_with_muon_and_the_others_as_with_adamw():
    module, expected = two_layers(), two_layers()
    matrices = [parameter for parameter in expected.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in expected.parameters() if parameter.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.02, weight_decay=0.0)
    optimizer = build(partial(MuonAdamW, lr=0.02, weight_decay=0.3), module)
    stepped(optimizer, module)
    torch.manual_seed(1)
    inputs = torch.randn(8, 4)
    for _ in range(3):
        muon.zero_grad()
        adamw.zero_grad()
        expected(inputs).square().mean().backward()
        muon.step()
        adamw.step()
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_restored_state_continues_with_the_same_bits():
    module, other = two_layers(), two_layers()
    optimizer = build(MuonAdamW, module)
    stepped(optimizer, module)
    other.load_state_dict(module.state_dict())
    restored = build(partial(MuonAdamW, lr=1.0), other)
    restored.load_state_dict(deepcopy(optimizer.state_dict()))  # torch does not copy tensors.
    stepped(optimizer, module)
    stepped(restored, other)
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in torch.optim.__all__ if name not in ("Optimizer", "lr_scheduler")])
def test_every_optimizer_of_torch_gets_groups_only_for_weight_decay(name):
    kind = getattr(torch.optim, name, None)
    if not isinstance(kind, type):
        pytest.skip(f"torch.optim.{name} is no class")
    if name == "Muon":
        with pytest.raises(UsageError, match=r"firstlight\.optim\.MuonAdamW gives the others to AdamW"):
            build(kind, two_layers())
        return
    if name == "SparseAdam":
        with pytest.raises(UsageError, match="takes only weights of embeddings with sparse=True"):
            build(kind, two_layers())
        return
    optimizer = build(kind, two_layers())
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    assert len(optimizer.param_groups) == (2 if decays else 1)
    if decays:
        assert optimizer.param_groups[1]["weight_decay"] == 0
