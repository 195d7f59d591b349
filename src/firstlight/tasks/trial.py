"""What a network makes of samples, tried before a run starts."""

import torch
from torch import Tensor, nn

from firstlight.errors import UsageError

__all__ = ["trial"]


def trial(network: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of a network for a few samples `(N, ...)`, without a trace on the network.

    Raises:
        UsageError: When the network cannot take samples of this shape.
    """
    training = network.training
    try:
        with torch.no_grad():
            outputs: Tensor = network.eval()(inputs)
    except (RuntimeError, IndexError) as error:
        raise UsageError(
            f"{type(network).__name__} cannot take samples of shape {tuple(inputs.shape[1:])}: {error}"
        ) from error
    finally:
        network.train(training)
    return outputs
