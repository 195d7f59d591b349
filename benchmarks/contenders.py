"""Run the same training by hand, with firstlight, and with other frameworks.

    python benchmarks/contenders.py CONTENDER CASE FOLDER [OPTION ...]

This trains a case of `cases/`. Options are passed to firstlight's command line. It prints as JSON the seconds of
epochs, steps and validations, without the first epoch, and the peak memory. If `FIRSTLIGHT_STAMPS` names a file, the
time of every batch is written there, and training does not end by itself.

`prepare CASE FOLDER` writes the data of the other contenders into FOLDER. It is already scaled, so they neither load
nor scale anything. Each framework is used as its documentation shows, in the fastest documented way we know.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from stamps import Stamps, figures
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CASES = Path(__file__).parent / "cases"
FILE = "FIRSTLIGHT_STAMPS"
IS_FIRST = os.environ.get("RANK", "0") == os.environ.get("LOCAL_RANK", "0") == "0"


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits `(..., classes)` against targets `(...)`."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=-100 if outputs.ndim == 2 else 0)


def hits_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return how many targets are the largest of their logits."""
    return (outputs.argmax(-1) == targets).sum()


class Work:
    """The network, data, optimiser and number of epochs of a case."""

    def __init__(self, case: str, folder: Path, processes: int = 1) -> None:
        self.config, self.prepared, self.folder = CASES / f"{case}.yaml", folder / f"{case}.pt", folder
        config = yaml.safe_load(self.config.read_text())
        model = config["model"]["init_args"]
        self.optimizer = partial(torch.optim.Adam, **model["optimizer"]["init_args"])
        self.lr = model["optimizer"]["init_args"]["lr"]
        self.batch_size = config["data"]["init_args"]["batch_size"]
        path = os.environ.get(FILE)
        self.epochs = config["trainer"]["max_epochs"] if path is None else 10**6
        self.endless = (
            [] if path is None else [f"--trainer.max_epochs={self.epochs}", "--early_stopping.patience=1000000"]
        )
        self.steps = config["trainer"]["limit_train_batches"] // processes
        network = model["network"] if isinstance(model["network"], dict) else {"class_path": model["network"]}
        module, name = network["class_path"].rsplit(".", 1)
        kind = getattr(__import__(module, fromlist=[name]), name)
        torch.manual_seed(0)
        self.network: nn.Module = kind(**network.get("init_args", {}))
        self.stamps = Stamps(kind, path if IS_FIRST else None)

    @cached_property
    def splits(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return inputs and targets of the training split and of the validation split."""
        splits: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] = torch.load(self.prepared)
        return splits

    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return torch's loaders of the training and the validation split."""
        train, val = (TensorDataset(*split) for split in self.splits)
        return DataLoader(train, self.batch_size, shuffle=True), DataLoader(val, self.batch_size)


def prepare(case: str, folder: Path) -> None:
    """Write the data of the other contenders."""
    from firstlight.cli.parser import CLI

    work = Work(case, folder)
    data = CLI("fit", ["--config", str(work.config)]).experiment.datamodule
    data.setup()
    inputs, targets = data.tensors("train")
    order = torch.randperm(len(inputs))[: work.batch_size * work.steps]
    torch.save(((inputs[order], targets[order]), data.tensors("val")), work.prepared)


def ddp(work: Work) -> None:
    """Train by hand on tensors in memory, on two processes, with torch's DistributedDataParallel."""
    import subprocess

    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    rank = int(os.environ.setdefault("RANK", "0"))
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29511")}
    other = None if rank else subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": "1"})
    distributed.init_process_group("gloo")
    network = DistributedDataParallel(work.network)
    optimizer = work.optimizer(network.parameters())
    (inputs, targets), (val_inputs, val_targets) = work.splits
    val_inputs, val_targets = val_inputs[rank::2], val_targets[rank::2]
    for epoch in range(work.epochs):
        network.train()
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch))[rank::2]
        for index in order.split(work.batch_size):
            loss = loss_of(network(inputs[index]), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            sums = torch.zeros(2)
            for start in range(0, len(val_inputs), work.batch_size):
                batch = val_targets[start : start + work.batch_size]
                outputs = work.network(val_inputs[start : start + work.batch_size])
                sums += torch.stack([loss_of(outputs, batch) * len(batch), hits_of(outputs, batch)])
        distributed.all_reduce(sums)
        print(sums.tolist(), file=sys.stderr)
    distributed.destroy_process_group()
    if other is not None:
        other.wait()


def floor(work: Work) -> None:
    """Train by hand on tensors in memory."""
    optimizer = work.optimizer(work.network.parameters())
    (inputs, targets), (val_inputs, val_targets) = work.splits
    for _ in range(work.epochs):
        work.network.train()
        for index in torch.randperm(len(inputs)).split(work.batch_size):
            loss = loss_of(work.network(inputs[index]), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        work.network.eval()
        with torch.inference_mode():
            total = hits = torch.zeros(())
            for start in range(0, len(val_inputs), work.batch_size):
                batch = val_targets[start : start + work.batch_size]
                outputs = work.network(val_inputs[start : start + work.batch_size])
                total, hits = total + loss_of(outputs, batch) * len(batch), hits + hits_of(outputs, batch)
            print(f"{total.item() / len(val_targets):.4f} {hits.item() / val_targets.numel():.4f}", file=sys.stderr)


def dataloader(work: Work) -> None:
    """Train by hand with torch's DataLoader."""
    by_hand(work, work.network, work.optimizer(work.network.parameters()), *work.loaders(), Tensor.backward)


def accelerate(work: Work) -> None:
    """Train by hand, with the parts wrapped by accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    parts = accelerator.prepare(work.network, work.optimizer(work.network.parameters()), *work.loaders())
    by_hand(work, *parts, accelerator.backward)


def by_hand(work: Work, network: Any, optimizer: Any, train: Any, val: Any, backward: Callable[[Tensor], None]) -> None:
    """Train and validate on the batches of two loaders."""
    for _ in range(work.epochs):
        network.train()
        for inputs, targets in train:
            loss = loss_of(network(inputs), targets)
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            total = hits = torch.zeros(())
            for inputs, targets in val:
                outputs = network(inputs)
                total, hits = total + loss_of(outputs, targets) * len(targets), hits + hits_of(outputs, targets)
            print(f"{total.item():.4f} {hits.item()}", file=sys.stderr)


def lightning(work: Work) -> None:
    """Train with Lightning as its tutorials show."""
    from lightning.pytorch import LightningModule, Trainer
    from torchmetrics.classification import MulticlassAccuracy

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = work.network
            classes = work.network.eval()(work.splits[1][0][:1]).shape[-1]  # In train mode, it would count as a step.
            work.network.train()
            self.train_accuracy = MulticlassAccuracy(classes, average="micro")
            self.val_accuracy = MulticlassAccuracy(classes, average="micro")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            outputs = self.network(inputs)
            loss = loss_of(outputs, targets)
            self.train_accuracy(outputs.flatten(0, -2), targets.flatten())
            self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            inputs, targets = batch
            outputs = self.network(inputs)
            self.val_accuracy(outputs.flatten(0, -2), targets.flatten())
            self.log("val/loss", loss_of(outputs, targets), prog_bar=True)
            self.log("val/accuracy", self.val_accuracy)

        def configure_optimizers(self) -> Any:
            return work.optimizer(self.parameters())

    trainer = Trainer(max_epochs=work.epochs, accelerator="cpu", devices=1, default_root_dir=work.folder / "lightning")
    trainer.fit(Module(), *work.loaders())


def skorch(work: Work) -> None:
    """Train with skorch, as a scikit-learn estimator."""
    from skorch import NeuralNet
    from skorch.callbacks import EpochScoring
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    train, val = work.splits

    class Loss(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return loss_of(outputs, targets)

    def accuracy(net: Any, data: Any, _: Any) -> float:
        return float((net.forward(data).argmax(-1) == val[1]).float().mean())

    net = NeuralNet(
        work.network,
        criterion=Loss,
        optimizer=torch.optim.Adam,
        optimizer__fused=True,
        lr=work.lr,
        batch_size=work.batch_size,
        max_epochs=work.epochs,
        iterator_train__shuffle=True,
        train_split=predefined_split(Dataset(*val)),
        callbacks=[EpochScoring(accuracy, lower_is_better=False, use_caching=True)],
    )
    net.fit(*train)


def fastai(work: Work) -> None:
    """Train with a fastai Learner."""
    from fastai.callback.progress import ProgressCallback  # noqa: F401
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
        return hits_of(outputs, targets) / targets.numel()

    learner = Learner(
        DataLoaders(*work.loaders(), device="cpu"),
        work.network,
        loss_func=loss_of,
        opt_func=lambda parameters, **options: OptimWrapper(parameters, work.optimizer),
        metrics=[accuracy],
        path=work.folder,
    )
    learner.fit(work.epochs, lr=work.lr)


def keras(work: Work) -> None:
    """Train with Keras on its torch backend."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    train, val = work.splits
    model = keras.Sequential([keras.layers.TorchModuleWrapper(work.network)])
    model.compile(
        optimizer=keras.optimizers.Adam(work.lr),
        loss=lambda targets, outputs: loss_of(outputs, targets.long()),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    model.fit(*train, batch_size=work.batch_size, epochs=work.epochs, validation_data=val)


def transformers(work: Work) -> None:
    """Train with the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = work.network

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.network(inputs)
            return {"loss": loss_of(outputs, labels), "logits": outputs}

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        inputs, labels = zip(*samples, strict=True)
        return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}

    def hits(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(-1) == targets

    train, val = work.splits
    # The Trainer cannot save weights in channels-last memory order, or weights that two layers share.
    weights = [each for _, each in work.network.named_parameters(remove_duplicate=False)]
    packed = all(each.is_contiguous() for each in weights) and len(weights) == len(set(weights))
    arguments = TrainingArguments(
        output_dir=str(work.folder / "transformers"),
        num_train_epochs=work.epochs,
        per_device_train_batch_size=work.batch_size,
        per_device_eval_batch_size=work.batch_size,
        learning_rate=work.lr,
        weight_decay=0.0,
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        logging_steps=50,
        save_strategy="epoch" if packed else "no",
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        Model(),
        arguments,
        data_collator=collate,
        train_dataset=TensorDataset(*train),
        eval_dataset=TensorDataset(*val),
        preprocess_logits_for_metrics=hits,
        compute_metrics=lambda result: {"accuracy": float(result.predictions.mean())},
    )
    trainer.train()


def firstlight(work: Work) -> None:
    """Train with firstlight, with everything on."""
    _firstlight(work)


def firstlight_ddp(work: Work) -> None:
    """Train with firstlight on two processes, with everything on."""
    options = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    options.append(f"--trainer.limit_train_batches={work.steps}")
    _firstlight(work, *options)


def _firstlight(work: Work, *options: str) -> None:
    from firstlight.__main__ import main
    from firstlight.tasks import Task

    work.stamps.take_from_steps(Task)
    places = ["--config", str(work.config), "--runs", str(work.folder)]
    if code := main(["fit", *places, *work.endless, *options, *sys.argv[4:]]):
        sys.exit(code)


CONTENDERS: dict[str, Callable[[Work], None]] = {
    each.__name__: each
    for each in (
        *(floor, dataloader, firstlight, accelerate, lightning, skorch, fastai, keras, transformers),
        *(ddp, firstlight_ddp),
    )
}


def main() -> None:
    """Train, and print the figures."""
    name, case, folder = sys.argv[1:4]
    if name == "prepare":
        prepare(case, Path(folder))
        return
    work = Work(case, Path(folder), 2 if name.endswith("ddp") else 1)
    CONTENDERS[name](work)
    if not IS_FIRST:
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trained, validated = work.stamps.trained[work.steps :], work.stamps.validated
    print(json.dumps({**figures(trained, validated, work.steps, work.steps), "MiB": round(peak)}))


if __name__ == "__main__":
    main()
