import math

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d

from firstlight.errors import UsageError
from firstlight.networks import ImageNetResNet, ResNet


def inputs_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnet_has_the_number_of_parameters_of_the_paper(depth, millions):
    parameters = sum(parameter.numel() for parameter in ResNet(3, 10, depth).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)


@pytest.mark.parametrize("depth", [8, 20])
def test_depth_is_the_number_of_layers_with_weights_and_20_by_default(depth):
    network = ResNet(3, 10) if depth == 20 else ResNet(3, 10, depth)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules()) == depth


def test_each_stage_doubles_the_channels_and_halves_height_and_width():
    network, hidden = ResNet(3, 10, width=4), inputs_of((2, 3, 32, 32))
    shapes = []
    for layer in (network.stem, network.stage0, network.stage1, network.stage2):
        hidden = layer(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(4, 32, 32), (4, 32, 32), (8, 16, 16), (16, 8, 8)]


@pytest.mark.parametrize(("stage", "shape"), [(0, (3, 4, 6, 6)), (1, (3, 4, 6, 6))])
def test_residual_block_equals_its_formula(stage, shape):
    block, inputs = ResNet(1, 2, depth=8, width=4).train().get_submodule(f"stage{stage}.0"), inputs_of(shape)
    stride = 1 + stage
    first, second = block.first.convolution.weight, block.second.convolution.weight
    hidden = batch_norm(conv2d(inputs, first, padding=1, stride=stride), None, None, training=True).relu()
    hidden = batch_norm(conv2d(hidden, second, padding=1), None, None, training=True)
    # Option A: identity on every other pixel, zeros in the new channels.
    hidden[:, :4] += inputs if stage == 0 else inputs[:, :, ::2, ::2]
    torch.testing.assert_close(block(inputs), hidden.relu())


def test_resnet_ends_with_global_average_pooling_and_a_linear_layer():
    network, inputs = ResNet(1, 3, depth=8, width=4).eval(), inputs_of((2, 1, 9, 7))
    hidden = network.stage2(network.stage1(network.stage0(network.stem(inputs))))
    torch.testing.assert_close(network(inputs), hidden.mean((2, 3)) @ network.output.weight.T + network.output.bias)


def test_initial_weights_have_the_variance_of_he_et_al():
    torch.manual_seed(0)
    network = ResNet(3, 10, width=32)
    weight = network.stage2[1].first.convolution.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.01)
    assert not network.output.bias.any()


@pytest.mark.parametrize("depth", [-4, 2, 7, 18, 21])
def test_depth_other_than_6n_plus_2_is_refused(depth):
    with pytest.raises(UsageError, match=f"depth={depth}: it must be 6"):
        ResNet(3, 10, depth)


@pytest.mark.parametrize("size", ["in_channels", "out_features", "width"])
def test_size_below_one_is_refused(size):
    with pytest.raises(UsageError, match=f"ResNet was given {size}=0: it must be at least 1"):
        ResNet(**{"in_channels": 3, "out_features": 10, size: 0})


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (34, 21_797_672)])
def test_imagenet_form_has_the_number_of_parameters_of_torchvision(depth, count):
    network = ImageNetResNet(3, 1000, depth)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    weights = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum(module.weight.shape[-1] != 1 for module in weights) == depth  # Those of shortcuts are not counted.


def test_imagenet_form_has_the_layer_shapes_of_the_paper():
    network, hidden, shapes = ImageNetResNet(3, 1000), inputs_of((1, 3, 224, 224)), {}
    for name, layer in network.named_children():
        hidden = layer(hidden)
        shapes[name] = tuple(hidden.shape[1:])
    assert shapes == {
        **dict.fromkeys(("conv1", "bn1", "relu"), (64, 112, 112)),
        **dict.fromkeys(("maxpool", "layer1"), (64, 56, 56)),
        "layer2": (128, 28, 28),
        "layer3": (256, 14, 14),
        "layer4": (512, 7, 7),
        "avgpool": (512, 1, 1),
        "flatten": (512,),
        "fc": (1000,),
    }


def test_imagenet_form_has_the_parameter_names_of_torchvision():
    names = set(ImageNetResNet(3, 1000).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", *(f"bn1.{each}" for each in norm), "fc.weight", "fc.bias"}
    for layer in range(1, 5):
        for block in range(2):
            at = f"layer{layer}.{block}"
            expected |= {f"{at}.conv{index}.weight" for index in (1, 2)}
            expected |= {f"{at}.bn{index}.{each}" for index in (1, 2) for each in norm}
            if layer > 1 and block == 0:
                expected |= {f"{at}.downsample.0.weight", *(f"{at}.downsample.1.{each}" for each in norm)}
    assert names == expected
    assert len(names) == 122


def test_imagenet_form_equals_torchvisions_with_the_same_weights():
    torchvision = pytest.importorskip("torchvision", reason="torchvision, from the extra `download`, is not installed")
    network, theirs = ImageNetResNet(3, 10).eval(), torchvision.models.resnet18(num_classes=10).eval()
    theirs.load_state_dict(network.state_dict())
    inputs = inputs_of((2, 3, 96, 64))
    torch.testing.assert_close(network(inputs), theirs(inputs))


@pytest.mark.parametrize(("layer", "stride"), [("layer1", 1), ("layer3", 2)])
def test_block_of_the_imagenet_form_equals_its_formula(layer, stride):
    block = ImageNetResNet(3, 10).train().get_submodule(f"{layer}.0")
    inputs = inputs_of((2, block.conv1.in_channels, 6, 6))
    hidden = conv2d(inputs, block.conv1.weight, padding=1, stride=stride)
    hidden = conv2d(batch_norm(hidden, None, None, training=True).relu(), block.conv2.weight, padding=1)
    hidden = batch_norm(hidden, None, None, training=True)
    shortcut = inputs
    if stride == 2:
        shortcut = batch_norm(conv2d(inputs, block.downsample[0].weight, stride=2), None, None, training=True)
    torch.testing.assert_close(block(inputs), (hidden + shortcut).relu())


def test_imagenet_form_has_the_depths_18_and_34_only():
    with pytest.raises(UsageError, match="ImageNetResNet was given depth=50: it must be one of 18, 34"):
        ImageNetResNet(3, 10, 50)
