import math
from statistics import NormalDist

import pytest
import torch

from firstlight.errors import UsageError
from firstlight.networks import TabM
from firstlight.networks.tabm import PiecewiseLinearEmbedding

SIZES = {"in_features": 7, "out_features": 3, "hidden": [6, 5], "numeric_features": 4, "members": 3, "embedding": 2}


def build(**options):
    """A network in which no parameter is 0 or 1, as after some training."""
    torch.manual_seed(0)
    network = TabM(**{**SIZES, **options}).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network


def encoding_by_hand(x, bins):
    """Equation 1 of "On Embeddings for Numerical Features", with the first and the last bin open."""
    edges = [NormalDist().inv_cdf((index + 0.5) / (bins + 1)) for index in range(bins + 1)]
    encoding = []
    for index in range(bins):
        left, right = edges[index], edges[index + 1]
        if x < left and index > 0:
            encoding.append(0.0)
        elif x >= right and index < bins - 1:
            encoding.append(1.0)
        else:
            encoding.append((x - left) / (right - left))
    return encoding


def outputs_by_hand(network, inputs, bins):
    """The outputs of each member, with one loop over samples, members, units and inputs each."""
    values = {name: value.tolist() for name, value in network.state_dict().items()}
    numbers, result = network.numeric_features, []
    for sample in inputs.tolist():
        of_members = []
        for k in range(network.members):
            scale = values["input.scale"][k]
            units = [0.0] * len(values["input.bias"][k][0])
            for j, x in enumerate(sample):
                if j >= numbers:
                    for h in range(len(units)):
                        units[h] += values["input.other_weight"][h][j - numbers] * scale[j] * x
                    continue
                code = encoding_by_hand(x, bins)
                for e in range(len(values["embed.slope"][j][0])):
                    embedded = values["embed.bias"][j][0][e] + values["embed.slope"][j][0][e] * x
                    embedded += sum(code[t] * values["embed.pieces"][j][t][e] for t in range(bins))
                    for h in range(len(units)):
                        units[h] += values["input.number_weight"][j][e][h] * scale[j] * embedded
            layers = [("input", units)] + [(f"hidden.{index}", None) for index in range(len(network.hidden))]
            for name, product in layers:
                if product is None:
                    scaled = [r * unit for r, unit in zip(values[f"{name}.scale"][k][0], units, strict=True)]
                    product = [sum(w * x for w, x in zip(row, scaled, strict=True)) for row in values[f"{name}.weight"]]
                out_scale, bias = values[f"{name}.out_scale"][k][0], values[f"{name}.bias"][k][0]
                units = [max(0.0, s * u + b) for s, u, b in zip(out_scale, product, bias, strict=True)]
            weight, bias = values["output_weight"][k], values["output_bias"][k][0]
            of_members.append([bias[o] + sum(u * weight[h][o] for h, u in enumerate(units)) for o in range(len(bias))])
        result.append(of_members)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"numeric_features": 0}, {"numeric_features": 7, "bins": 1}, {"hidden": [4]}, {"members": 1}]
)
def test_each_member_computes_the_equations_of_the_paper(options):
    network = build(dropout=0.0, **options)
    inputs = 2 * torch.randn(5, 7, dtype=torch.float64)
    expected = outputs_by_hand(network, inputs, options.get("bins", 16))
    torch.testing.assert_close(network.train()(inputs), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(network.eval()(inputs), expected.mean(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bins", [1, 2, 5])
def test_encoding_of_a_number_equals_the_equation(bins):
    embedding = PiecewiseLinearEmbedding(2, bins, 3)
    numbers = torch.tensor([-4.0, -0.3, 0.0, 0.9, 5.0]).repeat(2, 1)
    expected = [encoding_by_hand(x, bins) for x in numbers[0].tolist()]
    torch.testing.assert_close(embedding.encode(numbers)[1], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_bins_hold_equal_shares_of_a_standard_normal():
    edges = PiecewiseLinearEmbedding(1, 9, 2).edges.tolist()
    shares = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges]
    assert shares == pytest.approx([(index + 0.5) / 10 for index in range(10)])


def test_members_share_the_matrices_and_start_with_equal_biases_and_scales():
    network = TabM(**SIZES)
    state = network.state_dict()
    with_members = {name for name, value in state.items() if len(value) == 3 and name != "embed.edges"}
    assert with_members == {
        "input.scale", "input.out_scale", "input.bias", "hidden.0.scale", "hidden.0.out_scale", "hidden.0.bias",
        "output_weight", "output_bias",
    }  # fmt: skip
    for name in with_members - {"input.scale", "output_weight", "output_bias"}:
        torch.testing.assert_close(state[name], state[name][:1].expand_as(state[name]))
    assert state["input.scale"].unique().numel() == state["input.scale"].numel()


def test_first_members_outputs_do_not_depend_on_the_others():
    network = build(dropout=0.0)
    inputs = torch.randn(5, 7, dtype=torch.float64)
    network.train()(inputs)[:, 0].sum().backward()
    for name in ("input.scale", "hidden.0.scale", "output_weight", "output_bias"):
        gradient = network.get_parameter(name).grad
        assert gradient[0].any() and not gradient[1:].any()


def test_dropout_is_the_same_for_all_members_and_another_for_each_sample():
    network = build(dropout=0.5, hidden=[200]).train()
    with torch.no_grad():
        for name in ("input.scale", "input.out_scale", "input.bias", "output_weight", "output_bias"):
            parameter = network.get_parameter(name)
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    inputs = torch.randn(1, 7, dtype=torch.float64).expand(2000, 7)
    outputs = network(inputs)
    torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs))
    assert outputs[:, 0, 0].unique().numel() > 1000
    torch.testing.assert_close(outputs.mean((0, 1)), network.eval()(inputs)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"members": 0}, "members"),
        ({"numeric_features": 8}, r"numeric_features.*\[0, 7\]"),
        ({"numeric_features": -1}, "numeric_features"),
        ({"hidden": []}, "at least one hidden layer"),
        ({"hidden": [4, 0]}, "hidden"),
        ({"dropout": 1.0}, "dropout"),
        ({"bins": 0}, "bins"),
        ({"embedding": 0}, "embedding"),
    ],
)
def test_wrong_arguments_are_refused(options, expected):
    with pytest.raises(UsageError, match=expected):
        TabM(**{**SIZES, **options})
