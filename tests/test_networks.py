import copy
import inspect

import pytest
import torch
from torch import nn

import firstlight.networks
from firstlight.errors import UsageError
from firstlight.networks import MLP, RegularizedNet, SimpleNet

# By class: constructor examples, each with the shape of its inputs and that of its outputs.
EXAMPLES = {
    "MLP": [
        ({"in_features": 12, "hidden": [8, 6], "out_features": 3}, (5, 12), (5, 3)),
        ({"in_features": 12, "hidden": [], "out_features": 3}, (5, 3, 2, 2), (5, 3)),
        ({"in_features": 12, "hidden": [8], "out_features": 1, "norm": "batch"}, (5, 3, 4), (5, 1)),
        ({"in_features": 12, "hidden": [8], "out_features": 3, "norm": "layer", "dropout": 0.5}, (5, 12), (5, 3)),
        ({"in_features": 12, "hidden": [8, 8], "out_features": 3, "activation": nn.GELU}, (5, 12), (5, 3)),
    ],
    "SimpleNet": [({}, (5, 1, 28, 28), (5, 10))],
    "RegularizedNet": [({}, (5, 1, 28, 28), (5, 10))],
    "TransformerClassifier": [
        ({"out_features": 3, "width": 16, "layers": 2, "heads": 2}, (5, 7), (5, 3)),
        ({"out_features": 3, "width": 16, "layers": 2, "norm": "post", "dropout": 0.1}, (5, 7), (5, 3)),
    ],
    "TransformerLM": [
        ({"vocabulary": 11, "width": 16, "layers": 2, "heads": 2}, (5, 7), (5, 7, 11)),
        ({"vocabulary": 11, "width": 16, "layers": 2, "norm": "post", "tied": False}, (5, 7), (5, 7, 11)),
    ],
}
TAKE_TOKENS = {"TransformerClassifier", "TransformerLM"}
NETWORKS = [
    name
    for name in firstlight.networks.__all__
    if inspect.isclass(getattr(firstlight.networks, name)) and issubclass(getattr(firstlight.networks, name), nn.Module)
]
CASES = [(name, *example) for name in NETWORKS for example in EXAMPLES.get(name, [])]

every_network = pytest.mark.parametrize(
    ("name", "options", "shape", "out_shape"), CASES, ids=[f"{case[0]}{number}" for number, case in enumerate(CASES)]
)


def build(name, options, seed=0):
    torch.manual_seed(seed)
    return getattr(firstlight.networks, name)(**options)


def inputs_of(shape, name=""):
    generator = torch.Generator().manual_seed(1)
    if name in TAKE_TOKENS:
        return torch.randint(0, 11, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_an_example_here(name):
    assert EXAMPLES.get(name), f"firstlight.networks.{name} has no row in EXAMPLES of {__file__}: add one"


@every_network
def test_outputs_have_their_documented_shape_and_are_finite(name, options, shape, out_shape):
    outputs = build(name, options)(inputs_of(shape, name))
    assert outputs.shape == out_shape
    assert outputs.isfinite().all()


@every_network
def test_every_parameter_gets_a_gradient(name, options, shape, out_shape):
    network = build(name, options).train()
    outputs = network(inputs_of(shape, name))
    nn.functional.mse_loss(outputs, torch.arange(outputs.numel()).view_as(outputs).float()).backward()
    without = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without


@every_network
def test_a_state_dict_gives_another_instance_the_same_outputs(name, options, shape, out_shape):
    network, other = build(name, options, seed=0), build(name, options, seed=1).eval()
    network(inputs_of(shape, name))  # Moves the statistics of batch normalisation too.
    network.eval()
    assert not torch.equal(network(inputs_of(shape, name)), other(inputs_of(shape, name)))
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    assert torch.equal(network(inputs_of(shape, name)), other(inputs_of(shape, name)))


@every_network
def test_evaluation_is_deterministic_and_treats_each_sample_alone(name, options, shape, out_shape):
    network, inputs = build(name, options).eval(), inputs_of(shape, name)
    outputs = network(inputs)
    assert torch.equal(outputs, network(inputs))
    torch.testing.assert_close(torch.cat([network(sample[None]) for sample in inputs]), outputs)


@every_network
def test_the_compiled_network_equals_the_eager_one(name, options, shape, out_shape):
    network = build(name, options).eval()
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs_of(shape, name)), network(inputs_of(shape, name)))


@pytest.mark.parametrize(("widths"), [(0, [4], 2), (3, [0], 2), (3, [4, -1], 2), (3, [], 0), (3, [4], -2)])
def test_a_width_below_one_is_refused(widths):
    with pytest.raises(UsageError, match="at least 1"):
        MLP(*widths)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(UsageError, match=f"dropout={dropout}"):
        MLP(3, [4], 2, dropout=dropout)


@pytest.mark.parametrize("kind", [SimpleNet, RegularizedNet])
def test_the_net_of_the_fundamentals_has_as_many_parameters_as_its_widths_say(kind):
    expected = (784 * 256 + 256) + (256 * 128 + 128) + (128 * 10 + 10)
    assert sum(parameter.numel() for parameter in kind().parameters()) == expected == 235_146


def test_an_mlp_without_hidden_layers_is_linear():
    network = MLP(6, [], 2)
    inputs = inputs_of((4, 2, 3))
    expected = inputs.reshape(4, 6) @ network.output.weight.T + network.output.bias
    torch.testing.assert_close(network(inputs), expected)


def test_an_mlp_computes_what_its_formula_says():
    network = MLP(6, [5, 4], 2, activation=nn.Tanh)
    inputs = inputs_of((3, 6))
    first, second = network.hidden0[0], network.hidden1[0]
    hidden = torch.tanh(inputs @ first.weight.T + first.bias)
    hidden = torch.tanh(hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(network(inputs), hidden @ network.output.weight.T + network.output.bias)


def test_the_regularized_net_drops_only_while_it_trains():
    network, simple, inputs = RegularizedNet(), SimpleNet(), inputs_of((2, 784))
    simple.load_state_dict(network.state_dict())
    network.train()
    assert not torch.equal(network(inputs), network(inputs))
    network.eval()
    assert torch.equal(network(inputs), simple(inputs))


def test_the_regularized_net_drops_three_units_of_ten_in_each_hidden_layer():
    torch.manual_seed(0)
    shares = []
    for layer in (RegularizedNet().train().hidden0, RegularizedNet().train().hidden1):
        layer[0].weight.data.zero_()
        layer[0].bias.data.fill_(1.0)
        outputs = layer(torch.zeros(400, layer[0].in_features))
        shares.append((outputs == 0).float().mean().item())
        torch.testing.assert_close(outputs.max().item(), 1 / 0.7)
    assert shares == pytest.approx([0.3, 0.3], abs=0.01)


def test_batch_norm_centres_each_unit_over_the_batch_and_needs_no_bias_before_it():
    layer = MLP(6, [5], 2, norm="batch", activation=nn.Identity).train().hidden0
    outputs = layer(inputs_of((64, 6)) * 10 + 3)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    assert layer[0].bias is None


def test_layer_norm_centres_each_sample_over_its_units():
    layer = MLP(6, [50], 2, norm="layer", activation=nn.Identity).hidden0
    outputs = layer(inputs_of((4, 6)) * 10 + 3)
    torch.testing.assert_close(outputs.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.std(1, correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert layer[0].bias is not None


def test_an_mlp_without_norm_has_no_normalisation_layer_and_no_dropout_layer():
    kinds = {type(module) for module in MLP(6, [5, 4], 2).modules()}
    assert not kinds & {nn.BatchNorm1d, nn.LayerNorm, nn.Dropout}
