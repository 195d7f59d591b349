import math

import pytest
import torch
from torch import nn

from firstlight.errors import UsageError
from firstlight.networks import MLP, RegularizedNet, SimpleNet

FORMULAS = {
    nn.ReLU: lambda z: z.clamp(min=0),
    nn.Sigmoid: lambda z: 1 / (1 + torch.exp(-z)),
    nn.Tanh: lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)),
    nn.GELU: lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    nn.SiLU: lambda z: z / (1 + torch.exp(-z)),
}


def inputs_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("widths", [(0, [4], 2), (3, [0], 2), (3, [4, -1], 2), (3, [], 0), (3, [4], -2)])
def test_width_below_one_is_refused(widths):
    with pytest.raises(UsageError, match="must be at least 1"):
        MLP(*widths)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(UsageError, match=rf"MLP was given dropout={dropout}: it must be in \[0, 1\)"):
        MLP(3, [4], 2, dropout=dropout)


@pytest.mark.parametrize("kind", [SimpleNet, RegularizedNet])
def test_fundamentals_networks_have_235146_parameters(kind):
    expected = (784 * 256 + 256) + (256 * 128 + 128) + (128 * 10 + 10)
    assert sum(parameter.numel() for parameter in kind().parameters()) == expected == 235_146


def test_mlp_without_hidden_layers_is_linear():
    network = MLP(6, [], 2)
    inputs = inputs_of((4, 2, 3))
    expected = inputs.reshape(4, 6) @ network.output.weight.T + network.output.bias
    torch.testing.assert_close(network(inputs), expected)


def test_regularized_net_applies_dropout_only_in_training_mode():
    network, simple, inputs = RegularizedNet(), SimpleNet(), inputs_of((2, 784))
    simple.load_state_dict(network.state_dict())
    network.train()
    assert not torch.equal(network(inputs), network(inputs))
    network.eval()
    assert torch.equal(network(inputs), simple(inputs))


def test_regularized_net_drops_30_percent_of_each_hidden_layer():
    torch.manual_seed(0)
    shares = []
    for layer in (RegularizedNet().train().hidden0, RegularizedNet().train().hidden1):
        layer[0].weight.data.zero_()
        layer[0].bias.data.fill_(1.0)
        outputs = layer(torch.zeros(400, layer[0].in_features))
        shares.append((outputs == 0).float().mean().item())
        torch.testing.assert_close(outputs.max().item(), 1 / 0.7)
    assert shares == pytest.approx([0.3, 0.3], abs=0.01)


def test_batch_norm_standardises_each_unit_over_the_batch_without_a_bias_before_it():
    layer = MLP(6, [5], 2, norm="batch", activation=nn.Identity).train().hidden0
    outputs = layer(inputs_of((64, 6)) * 10 + 3)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    assert layer[0].bias is None


def test_layer_norm_standardises_each_sample_over_its_units():
    layer = MLP(6, [50], 2, norm="layer", activation=nn.Identity).hidden0
    outputs = layer(inputs_of((4, 6)) * 10 + 3)
    torch.testing.assert_close(outputs.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.std(1, correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert layer[0].bias is not None


def test_mlp_has_no_norm_and_no_dropout_layer_by_default():
    kinds = {type(module) for module in MLP(6, [5, 4], 2).modules()}
    assert not kinds & {nn.BatchNorm1d, nn.LayerNorm, nn.Dropout}


@pytest.mark.parametrize("activation", FORMULAS)
def test_activation_follows_each_hidden_layer_but_not_the_output(activation):
    network, inputs = MLP(6, [5, 4], 2, activation=activation), inputs_of((3, 6))
    hidden = inputs
    for layer in (network.hidden0[0], network.hidden1[0]):
        hidden = FORMULAS[activation](hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(network(inputs), hidden @ network.output.weight.T + network.output.bias)


def test_residual_mlp_adds_the_input_only_where_widths_are_equal():
    network, inputs = MLP(6, [6, 5, 5], 2, residual=True), inputs_of((3, 6))
    hidden = inputs
    for layer, adds in ((network.hidden0[0], True), (network.hidden1[0], False), (network.hidden2[0], True)):
        hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0) + (hidden if adds else 0)
    torch.testing.assert_close(network(inputs), hidden @ network.output.weight.T + network.output.bias)


def test_residual_does_not_change_the_keys_of_the_state_dict():
    assert MLP(6, [6, 5], 2).state_dict().keys() == MLP(6, [6, 5], 2, residual=True).state_dict().keys()


def test_residual_without_two_equal_neighbouring_widths_is_refused():
    with pytest.raises(UsageError, match=r"residual=True and widths \[6, 5, 4\]: two adjacent widths must be equal"):
        MLP(6, [5, 4], 4, residual=True)


def test_xavier_is_uniform_with_the_variance_of_glorot_and_bengio():
    torch.manual_seed(0)
    weight = MLP(400, [200], 2, init="xavier").hidden0[0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (400 + 200)), rel=0.01)
    assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / (400 + 200)), rel=0.001)


def test_kaiming_is_normal_with_the_variance_of_he_et_al():
    torch.manual_seed(0)
    weight = MLP(400, [200], 2, init="kaiming").hidden0[0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.01)
    inside = (weight.abs() < weight.std()).float().mean().item()
    assert inside == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("activation", FORMULAS)
def test_kaiming_preserves_the_variance_for_every_activation(activation):
    torch.manual_seed(0)
    layer = MLP(1000, [1000], 2, activation=activation, init="kaiming").hidden0[0]
    assert layer(FORMULAS[activation](torch.randn(200, 1000))).square().mean().item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("init", ["kaiming", "xavier"])
def test_init_scheme_applies_to_every_layer_and_zeroes_the_biases(init):
    torch.manual_seed(0)
    network = MLP(300, [300, 300], 300, init=init)
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    deviation = {"kaiming": math.sqrt(2 / 300), "xavier": math.sqrt(2 / 600)}[init]
    assert [layer.weight.std().item() for layer in linear] == pytest.approx([deviation] * 3, rel=0.02)
    assert not any(layer.bias.any() for layer in linear)


def test_default_initialisation_is_that_of_torch():
    torch.manual_seed(0)
    expected = [nn.Linear(6, 5), nn.Linear(5, 2)]
    torch.manual_seed(0)
    network = MLP(6, [5], 2)
    for ours, theirs in zip((network.hidden0[0], network.output), expected, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init": "xaver"},
            "MLP was given init=xaver: it must be one of default, kaiming, xavier; did you mean xavier?",
        ),
        ({"norm": "group"}, "MLP was given norm=group: it must be one of batch, layer, None"),
    ],
)
def test_unknown_option_names_are_refused(options, message):
    with pytest.raises(UsageError) as error:
        MLP(6, [5], 2, **options)
    assert str(error.value) == message
