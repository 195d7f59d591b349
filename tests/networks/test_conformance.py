import copy
import inspect
from functools import partial

import pytest
import torch
from torch import nn

import firstlight.networks
from firstlight.networks import MLP, ConvNet

# For each class: arguments of the constructor, shape of the inputs, shape of the outputs.
EXAMPLES = {
    "MLP": [
        ({"in_features": 12, "hidden": [8, 6], "out_features": 3}, (5, 12), (5, 3)),
        ({"in_features": 12, "hidden": [], "out_features": 3}, (5, 3, 2, 2), (5, 3)),
        ({"in_features": 12, "hidden": [8], "out_features": 1, "norm": "batch"}, (5, 3, 4), (5, 1)),
        ({"in_features": 12, "hidden": [8], "out_features": 3, "norm": "layer", "dropout": 0.5}, (5, 12), (5, 3)),
        ({"in_features": 12, "hidden": [8, 8], "out_features": 3, "activation": nn.GELU}, (5, 12), (5, 3)),
        ({"in_features": 8, "hidden": [8, 6], "out_features": 3, "residual": True, "init": "xavier"}, (5, 8), (5, 3)),
    ],
    "SimpleNet": [({}, (5, 1, 28, 28), (5, 10))],
    "RegularizedNet": [({}, (5, 1, 28, 28), (5, 10))],
    "ConvBlock": [
        ({"in_channels": 3, "out_channels": 4}, (5, 3, 7, 6), (5, 4, 7, 6)),
        ({"in_channels": 3, "out_channels": 4, "stride": 2, "activation": nn.GELU}, (5, 3, 7, 6), (5, 4, 4, 3)),
    ],
    "ConvNet": [
        ({"in_channels": 1, "widths": [4, 6, 8], "out_features": 10}, (5, 1, 8, 8), (5, 10)),
        ({"in_channels": 1, "widths": [4, 6, 8], "out_features": 10}, (5, 1, 28, 28), (5, 10)),
        ({"in_channels": 3, "widths": [4], "out_features": 2, "blocks": 2, "dropout": 0.5}, (5, 3, 5, 7), (5, 2)),
    ],
    "ResNet": [
        ({"in_channels": 3, "out_features": 10, "width": 4}, (5, 3, 32, 32), (5, 10)),
        ({"in_channels": 1, "out_features": 2, "depth": 8, "width": 4}, (5, 1, 7, 9), (5, 2)),
    ],
    "ImageNetResNet": [({"in_channels": 3, "out_features": 10}, (5, 3, 33, 47), (5, 10))],
    # A nested module is built for each network, as from a YAML file.
    "EmbeddingNet": [
        ({"backbone": partial(MLP, 12, [8], 6), "features": 6, "dimensions": 3}, (5, 12), (5, 3)),
        ({"backbone": partial(ConvNet, 1, [4, 8], 6), "features": 6, "dimensions": 2}, (5, 1, 8, 8), (5, 2)),
    ],
    "TabM": [
        ({"in_features": 7, "out_features": 3, "hidden": [8, 6], "numeric_features": 4, "members": 3}, (5, 7), (5, 3)),
        ({"in_features": 12, "out_features": 2, "hidden": [8], "members": 2}, (5, 3, 4), (5, 2)),
        ({"in_features": 4, "out_features": 1, "numeric_features": 4, "members": 1, "bins": 1}, (5, 4), (5, 1)),
    ],
    "NgramClassifier": [
        ({"out_features": 3}, (5, 7), (5, 3)),
        ({"out_features": 2, "lengths": [2, 9], "buckets": 11, "width": 4, "dropout": 0.5}, (5, 7), (5, 2)),
    ],
    "TransformerClassifier": [
        ({"out_features": 3, "width": 16, "layers": 2, "heads": 2}, (5, 7), (5, 3)),
        ({"out_features": 3, "width": 16, "layers": 2, "norm": "post", "dropout": 0.1}, (5, 7), (5, 3)),
    ],
    "TransformerLM": [
        ({"vocabulary": 11, "width": 16, "layers": 2, "heads": 2}, (5, 7), (5, 7, 11)),
        ({"vocabulary": 11, "width": 16, "layers": 2, "norm": "post", "tied": False}, (5, 7), (5, 7, 11)),
    ],
}
TAKE_TOKENS = {"NgramClassifier", "TransformerClassifier", "TransformerLM"}
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
    made = {key: value() if isinstance(value, partial) else value for key, value in options.items()}
    return getattr(firstlight.networks, name)(**made)


def inputs_of(shape, name):
    generator = torch.Generator().manual_seed(1)
    if name in TAKE_TOKENS:
        return torch.randint(0, 11, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_an_example(name):
    assert EXAMPLES.get(name), f"firstlight.networks.{name} has no row in EXAMPLES of {__file__}: add one"


@every_network
def test_outputs_have_the_documented_shape_and_are_finite(name, options, shape, out_shape):
    outputs = build(name, options).eval()(inputs_of(shape, name))
    assert outputs.shape == out_shape
    assert outputs.isfinite().all()


@every_network
def test_every_parameter_gets_a_gradient(name, options, shape, out_shape):
    network = build(name, options).train()
    outputs = network(inputs_of(shape, name))
    nn.functional.mse_loss(outputs, torch.arange(outputs.numel()).view_as(outputs).float()).backward()
    missing_gradient = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert not missing_gradient


@every_network
def test_state_dict_restores_the_same_outputs(name, options, shape, out_shape):
    network, other = build(name, options, seed=0), build(name, options, seed=1).eval()
    network(inputs_of(shape, name))  # Updates the running statistics of batch normalisation.
    network.eval()
    assert not torch.equal(network(inputs_of(shape, name)), other(inputs_of(shape, name)))
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    assert torch.equal(network(inputs_of(shape, name)), other(inputs_of(shape, name)))


@every_network
def test_evaluation_is_deterministic_and_independent_of_the_batch(name, options, shape, out_shape):
    network, inputs = build(name, options).eval(), inputs_of(shape, name)
    outputs = network(inputs)
    assert torch.equal(outputs, network(inputs))
    rounding = 1e-5 * max(1, outputs.abs().max().item())
    torch.testing.assert_close(torch.cat([network(sample[None]) for sample in inputs]), outputs, atol=rounding, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "shape", "out_shape"),
    [
        pytest.param(name, *example, id=f"{name}{number}", marks=[pytest.mark.slow] if number else [])
        for name in NETWORKS
        for number, example in enumerate(EXAMPLES.get(name, []))
    ],
)
def test_compiled_network_equals_the_eager_one(name, options, shape, out_shape):
    network = build(name, options).eval()
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs_of(shape, name)), network(inputs_of(shape, name)))


@pytest.mark.parametrize("name", ["MLP", "ConvNet", "ResNet", "ImageNetResNet"])
def test_all_but_the_last_layer_is_a_network(name):
    options, shape, _ = EXAMPLES[name][0]
    network = build(name, options).eval()
    features = network[:-1](inputs_of(shape, name))
    torch.testing.assert_close(network[-1](features), network(inputs_of(shape, name)))
