from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from firstlight.callbacks import Compile, NonFinite
from firstlight.errors import TrainingError, UsageError
from firstlight.networks import MLP
from firstlight.tasks import Classification
from tests.tasks.helpers import loader, parts, trainer


class Looks(Callback):
    """Records outputs, copies the network, and makes a weight NaN before a step."""

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


@pytest.mark.slow  # It compiles C++.
@pytest.mark.filterwarnings("ignore:`torch.jit")  # a warning of torch 2.13
def test_a_compiled_network_learns_the_same_and_is_not_compiled_after_the_fit(tmp_path, monkeypatch):
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
    assert not torch.equal(looks.copies[0](inputs), looks.copies[5](inputs))  # Copies do not share weights.
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


def test_nonfinite_names_the_layer_of_a_compiled_network(tmp_path):
    with pytest.raises(TrainingError, match=r"step 4 .*\nthe first layer whose output is not finite: network\.\S+ \(L"):
        fitted(tmp_path, Looks(spoilt_at=4), Compile(backend="aot_eager"), NonFinite())


class Parts(BoringModel):
    """Calls the children of a list, and has a parameter beside them."""

    def __init__(self):
        super().__init__()
        self.layer = None
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(3))
        self.temperature = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        for part in self.parts:
            batch = part(batch)
        return (batch * self.temperature).sum()


class CallsNothing(BoringModel):
    def training_step(self, batch, batch_idx):
        return self.layer.weight.sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it unless warnings are errors
def test_children_in_a_module_list_are_compiled(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fit = trainer(
        tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0, callbacks=[Compile(backend=backend)]
    )
    module = Parts()
    fit.fit(module)
    assert len(graphs) == 3 and all(part._compiled_call_impl is None for part in module.parts)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it unless warnings are errors
def test_each_child_has_its_own_limit_of_compilations(tmp_path):
    graphs, module = [], Parts()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = Compile(backend=backend)
    compiled.on_fit_start(trainer(tmp_path), module)
    for size in range(2, 8):
        module.training_step(torch.randn(size, 32), 0)
    compiled.teardown(trainer(tmp_path), module, "fit")
    assert len(graphs) == 18  # torch's limit is 8 of one code


def test_a_step_that_calls_no_compiled_part_warns(tmp_path):
    options = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0}
    fit = trainer(tmp_path, **options, callbacks=[Compile(backend="eager")])
    with pytest.warns(
        UserWarning, match="^Compile has no effect: a training step of CallsNothing calls none of layer$"
    ):
        fit.fit(CallsNothing())


def test_a_part_that_the_user_compiled_stays_compiled(tmp_path):
    module = BoringModel()
    module.layer.compile(backend="eager")
    own = module.layer._compiled_call_impl
    compiled = Compile(backend="eager")
    compiled.on_fit_start(trainer(tmp_path), module)
    compiled.teardown(trainer(tmp_path), module, "fit")
    assert module.layer._compiled_call_impl is own


def test_accumulation_with_cuda_graphs_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"mode=max-autotune, whose CUDA graphs .* accumulate_grad_batches=2 keeps: use default or"
    ):
        fitted(tmp_path, Compile(mode="max-autotune"), accumulate_grad_batches=2)
    fitted(tmp_path, Compile(backend="aot_eager"), accumulate_grad_batches=2)
