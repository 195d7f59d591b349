from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from firstlight.callbacks import Compile, NonFinite
from firstlight.errors import TrainingError, UsageError
from firstlight.networks import MLP
from firstlight.tasks import Classification
from tests.task_helpers import loader, parts, trainer


class Looks(Callback):
    """Sees what the network gives, copies the module, and spoils a weight before a step."""

    def __init__(self, spoilt_at=None):
        self.given, self.copies, self.spoilt_at = [], [], spoilt_at

    def on_fit_start(self, trainer, pl_module):
        forward = pl_module.forward

        def seen(inputs):
            self.given.append(forward(inputs))
            return self.given[-1]

        pl_module.forward = seen

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.copies.append(deepcopy(pl_module.network))
        if trainer.global_step == self.spoilt_at:
            next(pl_module.network.parameters()).data[0] = float("nan")


def fitted(tmp_path, *callbacks, batch_size=8, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs, targets = torch.randn(24, 4), torch.arange(24) % 3
    task = Classification(classes=3, **parts(MLP(4, [8], 3), nn.CrossEntropyLoss()))
    fit = trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[*callbacks], **options)
    fit.fit(task, loader(inputs, targets, batch_size), loader(inputs, targets))
    return task


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch 2.13's own
def test_a_compiled_network_learns_the_same_and_is_itself_again_after_the_fit(tmp_path, monkeypatch):
    mode = "reduce-overhead"
    calls, compiled = [], torch.compile

    def counted(function, **given):
        result = compiled(function, **given)
        return lambda *args: calls.append(given["mode"]) or result(*args)

    monkeypatch.setattr(torch, "compile", counted)
    plain, looks = fitted(tmp_path), Looks()
    task = fitted(tmp_path, Compile(mode), looks)
    assert calls == [mode] * 6 == [mode] * len(looks.given)
    for one, other in zip(task.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert task.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(2, 4)
    assert not torch.equal(looks.copies[0](inputs), looks.copies[5](inputs))  # Each copy has weights of its own.
    task.network(inputs)
    assert len(calls) == 6


def test_all_layers_are_compiled_as_one_graph_for_each_size_of_a_batch(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.op for node in graph.graph.nodes])
        return graph.forward

    fitted(tmp_path, Compile(backend=backend))
    assert len(graphs) == 1 and len(graphs[0]) > 5
    fitted(tmp_path, Compile(backend=backend), batch_size=10)
    assert len(graphs) == 3  # 10 and 4


def test_where_nothing_is_compiled_any_more_after_a_fault_its_layer_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"step 4 .*\nthe first layer whose output is not finite: network\.\S+ \(L"):
        fitted(tmp_path, Looks(spoilt_at=4), Compile(backend="aot_eager"), NonFinite())


def test_a_module_with_weights_of_its_own_is_compiled_as_a_whole(tmp_path):
    task, compiled = fitted(tmp_path), Compile()
    compiled.on_fit_start(trainer(tmp_path), task)
    assert task.network._compiled_call_impl and not task._compiled_call_impl
    compiled.teardown(trainer(tmp_path), task, "fit")
    assert not task.network._compiled_call_impl
    task.bias = nn.Parameter(torch.zeros(1))
    compiled.on_fit_start(trainer(tmp_path), task)
    assert task._compiled_call_impl and not task.network._compiled_call_impl


def test_gradients_are_not_accumulated_where_a_graph_overwrites_them(tmp_path):
    with pytest.raises(UsageError, match="accumulate_grad_batches=2"):
        fitted(tmp_path, Compile(mode="max-autotune"), accumulate_grad_batches=2)
    fitted(tmp_path, Compile(backend="aot_eager"), accumulate_grad_batches=2)
