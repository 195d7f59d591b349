"""Whether a network returns what its loss expects, judged by its last operation and by a few outputs.

Shapes: `B` the few samples; `...` one output.
"""

import re

from torch import Tensor

from firstlight.errors import UsageError
from firstlight.tasks import Task

_EXPECTED = {
    "logits": "logits",
    "log_probabilities": "log-probabilities",
    "probabilities": "probabilities",
    "standardised": "standardised numbers, below and above 0",
    "log_rates": "logarithms of rates",
    "rates": "rates",
}
_ENDINGS = {
    "Sigmoid": "a sigmoid",
    "Softmax": "a softmax",
    "LogSoftmax": "a log-softmax",
    "Relu": "a ReLU",
    "Softplus": "a softplus",
    "Tanh": "a tanh",
    "Exp": "an exponential",
}
_POSITIVE = {"Sigmoid", "Softmax", "Relu", "Softplus", "Exp"}
_WRONG = {
    "logits": {"Sigmoid", "Softmax"},
    "standardised": {*_POSITIVE, "LogSoftmax", "Tanh"},
    "log_rates": _POSITIVE,
}
_KEEP_VALUES = {"View", "UnsafeView", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "T", "Permute", "Clone", "ToCopy"}


def check_output_kind(task: Task, outputs: Tensor) -> None:
    """Raise a UsageError if outputs `(B, ...)`, with their gradient function, cannot be what the loss expects."""
    kind = task.outputs_are
    if kind is None or task.is_overridden("compute_loss"):
        return
    network, loss = type(task.network).__name__, type(task.loss).__name__
    ending = last_operation(outputs)
    if ending in _WRONG.get(kind, ()):
        instead = ""
        if kind == "logits" and ending == "Sigmoid" and loss != "CrossEntropyLoss":
            instead = ", or use torch.nn.BCELoss"
        elif kind == "log_rates" and ending in ("Exp", "Softplus"):
            instead = ", or set log_input=False"
        raise UsageError(
            f"{loss} expects {_EXPECTED[kind]}, but {network} ends in {_ENDINGS[ending]}: leave it out{instead}"
        )
    fault = _wrong_values(kind, outputs.detach().double())
    if fault:
        raise UsageError(f"{loss} expects {_EXPECTED[kind]}, but {network} returns other numbers: {fault}")


def _wrong_values(kind: str, values: Tensor) -> str:
    """Return what would mend outputs that are out of range, or `""`."""
    if kind == "probabilities" and not ((values >= 0) & (values <= 1)).all():
        return "end it in a sigmoid, or use torch.nn.BCEWithLogitsLoss"
    if kind == "rates" and not (values >= 0).all():
        return "end it in a softplus, or set log_input=True"
    if kind == "log_probabilities" and not (values.logsumexp(-1).abs() < 1e-2).all():
        return "end it in torch.nn.LogSoftmax, or use torch.nn.CrossEntropyLoss"
    return ""


def last_operation(outputs: Tensor) -> str:
    """Return the name of the last operation that changed values, as autograd names it, or `""` if it is unknown.

    >>> import torch
    >>> last_operation(torch.ones(2, requires_grad=True).sigmoid().view(2, 1))
    'Sigmoid'
    """
    node = outputs.grad_fn
    while node is not None:
        name = re.sub(r"Backward\d*$", "", node.name())
        if name not in _KEEP_VALUES:
            return name
        node = node.next_functions[0][0]
    return ""
