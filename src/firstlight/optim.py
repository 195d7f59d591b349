"""Parameter groups for `torch.optim`, and an optimiser that needs them."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Muon, Optimizer, SparseAdam

from firstlight.errors import UsageError

__all__ = ["MuonAdamW", "build", "parameter_groups", "weights"]


def weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters with at least two axes, to which penalties and weight decay apply.

    Biases and the scales and shifts of normalisation layers have fewer axes. Shrinking them does not regularise (Goyal
    et al., "Accurate, Large Minibatch SGD", 2017, section 5.3). A shared parameter is listed once.

    >>> [tuple(weight.shape) for weight in weights(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))]
    [(3, 4)]
    """
    return [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim >= 2]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser: the `weights`, and the other trainable parameters without decay.

    Empty groups are left out.

    >>> [len(group["params"]) for group in parameter_groups(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))]
    [1, 3]
    """
    others = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": weights(module)}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build(make: Callable[[Any], Optimizer], module: nn.Module) -> Optimizer:
    """Return an optimiser of the trainable parameters; with weight decay, it has the `parameter_groups`.

    Without weight decay it has one group, which is faster, and which every optimiser takes.

    Args:
        make: Builds an optimiser from a list of parameters or of parameter groups.
        module: Its parameters.

    Raises:
        UsageError: When the optimiser refuses an option or a parameter.
    """
    groups = parameter_groups(module)
    try:
        optimizer = make([parameter for group in groups for parameter in group["params"]])
        if len(groups) > 1 and any(group.get("weight_decay") for group in optimizer.param_groups):
            optimizer = make(groups)
    except ValueError as error:  # torch raises it for a value outside its range.
        way_out = "; firstlight.optim.MuonAdamW gives the others to AdamW" if str(error).startswith("Muon only") else ""
        raise UsageError(f"optimizer: {error}{way_out}") from error
    _check_sparse(optimizer, module)
    return optimizer


def _check_sparse(optimizer: Optimizer, module: nn.Module) -> None:
    """Refuse an optimiser of torch that cannot take the sparse or the dense gradients of a module."""
    tables = [each for each in module.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse]
    sparse = {id(each.weight) for each in tables if each.weight.requires_grad}
    name = type(optimizer).__name__
    if isinstance(optimizer, SparseAdam):
        for path, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in sparse:
                raise UsageError(
                    f"optimizer: SparseAdam takes only weights of embeddings with sparse=True, not {path}: use "
                    "torch.optim.AdamW, and embeddings with sparse=False"
                )
    elif sparse and name in vars(torch.optim) and not isinstance(optimizer, SGD | Adagrad):
        raise UsageError(
            f"optimizer: {name} takes no sparse gradients, but an embedding has sparse=True: set sparse=False, or use "
            "torch.optim.SGD"
        )


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` for parameters with two axes, and `torch.optim.AdamW` for all others.

    Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) takes matrices only. One
    learning rate and one weight decay serve both, because Muon's update is scaled to the size of AdamW's (Liu et al.,
    "Muon is Scalable for LLM Training", 2025).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        weight_decay: Weight decay.
        momentum: Momentum of Muon.
        betas: Decay rates of AdamW's means of the gradient and its square.

    >>> layer = nn.Linear(4, 3)
    >>> [group["optimizer"] for group in MuonAdamW(layer.parameters()).param_groups]
    ['Muon', 'AdamW']
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        place = [nn.Parameter(torch.empty(1, 1))]  # `step` gives the parts their groups.
        self._parts = {
            "Muon": Muon(place, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"),
            "AdamW": AdamW(place, lr, betas, weight_decay=weight_decay),
        }
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the matrices of a group as a group of Muon, and its other parameters as a group of AdamW."""
        params = param_group["params"]
        every = [params] if isinstance(params, torch.Tensor) else list(params)
        for name, part in self._parts.items():
            if chosen := [parameter for parameter in every if (parameter.ndim == 2) is (name == "Muon")]:
                super().add_param_group({**part.defaults, **param_group, "params": chosen, "optimizer": name})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; return the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # A checkpoint that was loaded has replaced them.
            part.state, part.param_groups = self.state, [g for g in self.param_groups if g["optimizer"] == name]
            part.step()
        return loss


def skip_nvml_check() -> None:
    """Without a GPU, unset a variable of Lightning 2.6.6 that makes torch look for NVIDIA's library at each step.

    The search takes 40 µs of each optimiser step.
    """
    if not torch.cuda.is_available():
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
