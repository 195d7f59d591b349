import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from firstlight.errors import UsageError
from firstlight.networks import ConvBlock, ConvNet


def inputs_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def by_hand(block, inputs):
    """Compute a ConvBlock in training mode: its scale starts as 1 and its shift as 0."""
    outputs = conv2d(inputs, block.convolution.weight, padding=1)
    mean = outputs.mean((0, 2, 3), keepdim=True)
    variance = (outputs - mean).square().mean((0, 2, 3), keepdim=True)
    return ((outputs - mean) / (variance + 1e-5).sqrt()).clamp(min=0)


def test_conv_block_convolves_with_zero_padding():
    block, inputs = ConvBlock(2, 3), inputs_of((1, 2, 5, 4))
    padded = torch.zeros(2, 7, 6)
    padded[:, 1:-1, 1:-1] = inputs[0]
    expected = torch.stack(
        [
            torch.stack([(padded[:, y : y + 3, x : x + 3] * kernel).sum() for y in range(5) for x in range(4)])
            for kernel in block.convolution.weight
        ]
    )
    torch.testing.assert_close(block.convolution(inputs), expected.view(1, 3, 5, 4))


def test_conv_block_applies_batch_normalisation_then_relu():
    block, inputs = ConvBlock(2, 3).train(), inputs_of((4, 2, 5, 5))
    torch.testing.assert_close(block(inputs), by_hand(block, inputs))


def test_conv_block_uses_running_statistics_in_evaluation_mode():
    block, inputs = ConvBlock(2, 3).eval(), inputs_of((4, 2, 5, 5))
    block.norm.running_mean[:], block.norm.running_var[:] = 0.5, 4.0
    block.norm.weight.data[:], block.norm.bias.data[:] = 3.0, 0.25
    expected = 3 * (conv2d(inputs, block.convolution.weight, padding=1) - 0.5) / 4.00001**0.5 + 0.25
    torch.testing.assert_close(block(inputs), expected.clamp(min=0))


def test_convolution_before_batch_normalisation_has_no_bias():
    assert {name: tuple(value.shape) for name, value in ConvBlock(2, 3).named_parameters()} == {
        "convolution.weight": (3, 2, 3, 3),
        "norm.weight": (3,),
        "norm.bias": (3,),
    }


def test_conv_net_equals_its_formula():
    network, inputs = ConvNet(1, [4, 6], 3, blocks=2).train(), inputs_of((5, 1, 8, 6))
    hidden = by_hand(network.stage0[1], by_hand(network.stage0[0], inputs))
    hidden = hidden.view(5, 4, 4, 2, 3, 2).amax((3, 5))
    hidden = by_hand(network.stage1[1], by_hand(network.stage1[0], hidden))
    expected = hidden.mean((2, 3)) @ network.output.weight.T + network.output.bias
    torch.testing.assert_close(network(inputs), expected)


def test_conv_net_has_the_number_of_parameters_its_widths_imply():
    blocks = [(1, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    expected = sum(9 * inputs * outputs + 2 * outputs for inputs, outputs in blocks) + 64 * 10 + 10
    network = ConvNet(1, [16, 32, 64], 10, blocks=2)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_conv_net_accepts_images_down_to_its_smallest_size():
    network = ConvNet(1, [2, 2, 2], 3).eval()
    for size in (4, 5, 28, 33):
        assert network(inputs_of((2, 1, size, size))).shape == (2, 3)
    with pytest.raises(RuntimeError):
        network(inputs_of((2, 1, 3, 3)))


def test_conv_net_applies_dropout_only_in_training_mode():
    torch.manual_seed(0)
    network = ConvNet(1, [400], 3, dropout=0.3)
    kept = {}
    network.output.register_forward_hook(lambda module, inputs, outputs: kept.update(features=inputs[0]))
    network.train()(inputs_of((20, 1, 4, 4)))
    assert (kept["features"] == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    network.eval()(inputs_of((20, 1, 4, 4)))
    assert (kept["features"] == 0).float().mean().item() < 0.01


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ConvBlock, {"in_channels": 0, "out_channels": 3}, "ConvBlock was given in_channels=0: it must be at least 1"),
        (
            ConvBlock,
            {"in_channels": 3, "out_channels": -1},
            "ConvBlock was given out_channels=-1: it must be at least 1",
        ),
        (
            ConvBlock,
            {"in_channels": 3, "out_channels": 3, "stride": 0},
            "ConvBlock was given stride=0: it must be at least 1",
        ),
        (ConvNet, {"widths": [4, 0]}, "ConvNet was given widths=[4, 0]: each must be at least 1"),
        (ConvNet, {"widths": []}, "ConvNet was given widths=[]: it must have at least one stage"),
        (ConvNet, {"widths": [4], "blocks": 0}, "ConvNet was given blocks=0: it must be at least 1"),
        (ConvNet, {"widths": [4], "dropout": 1.0}, "ConvNet was given dropout=1.0: it must be in [0, 1)"),
    ],
)
def test_invalid_arguments_are_refused(kind, options, message):
    given = {"in_channels": 1, "out_features": 10} | options if kind is ConvNet else options
    with pytest.raises(UsageError) as error:
        kind(**given)
    assert str(error.value) == message


def test_conv_block_accepts_another_activation():
    block, inputs = ConvBlock(2, 3, activation=nn.Tanh).eval(), inputs_of((4, 2, 5, 5))
    torch.testing.assert_close(block(inputs), torch.tanh(block.norm(block.convolution(inputs))))


@pytest.mark.parametrize("channels", [1, 3])
def test_all_outputs_keep_the_channels_last_format(channels):
    network, strides = ConvNet(channels, [4, 8], 10), []
    for layer in network.modules():
        layer.register_forward_hook(lambda layer, given, output: strides.append(output.stride()))
    network(torch.randn(2, channels, 8, 8))
    assert all(each[1] == 1 for each in strides if len(each) == 4) and len(strides) > 10
