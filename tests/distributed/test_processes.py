"""Several processes count, step and decide as one process does."""

import json
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from firstlight import callbacks
from firstlight.callbacks.gradient_norm import let_sharded_gradients_clip, norms
from firstlight.data import Digits, Tensors
from firstlight.networks import MLP
from firstlight.schedules import Constant
from firstlight.tasks import Classification
from tests.helpers import CONFIG, DDP, Ranks, called, quick_or_slow

SIZES = (3, 7, 31, 64, 65, 73, 97)


def trainer(ranks, **options):
    options = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **options}
    options.setdefault("strategy", "ddp" if ranks > 1 else "auto")
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def task(features, lr=0.003):
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=lr)
    return Classification(MLP(features, [32], 10), nn.CrossEntropyLoss(), optimizer, Constant(), classes=10)


def found_by(function, ranks, cwd):
    """Return the results of a function on each rank."""
    folder = cwd / f"{function.__name__}-{ranks}"
    folder.mkdir()
    Ranks(function, ranks, cwd=folder, ranks=ranks).succeed()
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


def keep(run, found):
    Path(str(run.global_rank)).write_text(json.dumps(found))


class Seen(Callback):
    """Keep a checksum of each sample that is validated or tested."""

    def __init__(self):
        self.samples = []

    def see(self, trainer, pl_module, batch, *_):
        self.samples += [zlib.crc32(sample.numpy().tobytes()) for sample in batch[0]]

    on_validation_batch_start = on_test_batch_start = see


def awkward(size):
    """Return data with `size` samples for validation and for test."""
    generator = np.random.default_rng(size)
    marks = ["train"] * 20 + ["val"] * size + ["test"] * size
    inputs = generator.normal(3, 5, (len(marks), 6))
    targets = np.concatenate([np.arange(20), np.arange(size), np.arange(size)]) % 3  # Each split has each class.
    names = [str(label) for label in range(3)]
    return Tensors(inputs, targets, names, marks, batch_size=8)


def score(ranks):
    found = {}
    for size in SIZES:
        for verb in ("validate", "test"):
            seen = Seen()
            run = trainer(ranks, callbacks=[seen])
            (metrics,) = getattr(run, verb)(task(6), datamodule=awkward(size), verbose=False)
            found[f"{verb} {size}"] = metrics, seen.samples
    keep(run, found)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", quick_or_slow([1, 2, 3], [2]))
def test_validation_and_test_count_each_sample_once(ranks, figure, tmp_path):
    found = found_by(score, ranks, tmp_path)
    case = "validation and test of awkward sizes on 1, 2 and 3 processes: each sample once, the values of one process"
    with figure(case, 2 * len(SIZES)) as count:
        for size in SIZES:
            data = awkward(size)
            data.setup()
            for verb, split in (("validate", "val"), ("test", "test")):
                inputs, targets = data.tensors(split)
                with torch.no_grad():
                    logits = task(6).eval()(inputs).double()
                loss = nn.functional.cross_entropy(logits, targets).item()
                right = int((logits.argmax(1) == targets).sum())
                each = [own[f"{verb} {size}"] for own in found]
                samples = sorted(sample for _, own in each for sample in own)
                once = samples == sorted(zlib.crc32(sample.numpy().tobytes()) for sample in inputs)
                exact = all(metrics[f"{split}/accuracy"] == np.float32(right / size) for metrics, _ in each)
                close = all(metrics[f"{split}/loss"] == pytest.approx(loss, rel=1e-6) for metrics, _ in each)
                count.trial(
                    "" if once and exact and close else f"{verb} {size} on {ranks}: {each}, not {loss}, {right}"
                )


class Everywhere(Logger):
    """Keep what every rank logs, not only rank 0."""

    name, version = "", ""

    def __init__(self):
        self.values = {}

    def log_metrics(self, metrics, step):
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def log_hyperparams(self, *_):
        pass


STEPS = [(accumulate, clip) for accumulate in (1, 4) for clip in (None, 0.1)]


def descend(ranks):
    found = {}
    for accumulate, clip in STEPS:
        logger = Everywhere()
        run = trainer(
            ranks,
            logger=logger,
            max_steps=50,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            callbacks=[callbacks.GradientNorm()],
            limit_val_batches=0,
        )
        run.fit(task(64), datamodule=Digits(batch_size=32, batch_size_is="global"))
        found[f"{accumulate} {clip}"] = logger.values
    keep(run, found)


@pytest.mark.faults
def test_two_processes_train_as_one_with_the_same_global_batch(figure, tmp_path):
    (one,), two = (found_by(descend, ranks, tmp_path) for ranks in (1, 2))
    with (
        figure("losses of 50 steps with one global batch, 1 and 2 processes: within 1e-5", len(STEPS)) as losses,
        figure(
            "gradient norms, accumulation 1 and 4, clipped or not: equal on ranks, 1 process within 1e-6", len(STEPS)
        ) as norms,
    ):
        for accumulate, clip in STEPS:
            single, (first, second) = one[f"{accumulate} {clip}"], [own[f"{accumulate} {clip}"] for own in two]
            assert len(single["train/loss"]) == 50
            close = first["train/loss"] == pytest.approx(single["train/loss"], rel=1e-5)
            losses.trial("" if close else f"{accumulate} {clip}: {single['train/loss']}, {first['train/loss']}")
            names = [name for name in single if name.startswith("grad_norm/")]
            assert len(names) == 3
            close = all(first[name] == pytest.approx(single[name], rel=1e-6) for name in names)
            equal = all(first[name] == second[name] for name in names)
            norms.trial("" if close and equal else f"{accumulate} {clip}: {single}, {first}, {second}")


class Apart(BoringModel):
    """A foreign module that logs another value on each rank without a reduction: on one, each epoch is better."""

    def validation_step(self, batch, batch_idx):
        epoch = self.current_epoch
        self.log("val/loss", 1.0 / (1 + epoch) if self.global_rank else 1.0 + epoch)


def shard(ranks):
    distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=ranks)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(4, 7)
    found = []
    strategy = ModelParallelStrategy(process_group_backend="gloo")
    clip = let_sharded_gradients_clip(trainer(1, strategy=strategy)).precision_plugin.clip_grad_by_norm
    meshes = (
        init_device_mesh("cpu", (ranks,)),
        init_device_mesh("cpu", (1, ranks), mesh_dim_names=("one", "all"))["all"],
    )
    for prepare in (
        lambda: None,
        lambda: fully_shard(net[0], mesh=meshes[0]),  # The other gradients are plain.
        lambda: fully_shard(net[2], mesh=meshes[1]),
    ):
        prepare()
        net.zero_grad()
        net(inputs).square().sum().backward()
        found.append(norms({name: [p.grad for p in part.parameters()] for name, part in net.named_children()}))
        clip(torch.optim.SGD(net.parameters()), 0.5)
        clipped = norms({name: [p.grad for p in part.parameters()] for name, part in net.named_children()})
        found[-1] |= {f"clipped {name}": value for name, value in clipped.items()}
    Path(str(distributed.get_rank())).write_text(json.dumps(found))


def test_norms_of_sharded_gradients_equal_those_of_whole_ones(tmp_path):
    for whole, *sharded in found_by(shard, 2, tmp_path):
        assert whole["total"] > 0.6
        for name in ("total", "0", "2"):
            assert whole[f"clipped {name}"] == pytest.approx(whole[name] * 0.5 / whole["total"], rel=1e-5)
        for each in sharded:
            assert each == pytest.approx(whole, rel=1e-5)


def decide(ranks):
    found = []
    for module, data in ((task(64, lr=0.05), Digits(batch_size=64)), (Apart(), None)):
        stopping = callbacks.EarlyStopping("val/loss", patience=2)
        best = callbacks.BestCheckpoint("val/loss", "min", Path.cwd() / f"best-{len(found)}")
        run = trainer(ranks, max_epochs=40, enable_checkpointing=True, callbacks=[stopping, best], limit_val_batches=5)
        run.fit(module, datamodule=data)
        decided = [run.current_epoch, run.global_step, stopping.stopped_epoch, best.best_model_path]
        own = [stopping.wait_count, stopping.best_score.item(), best.best_model_score.item()]
        found.append([decided, own if isinstance(module, Classification) else []])
    keep(run, found)


@pytest.mark.faults
def test_early_stopping_and_the_best_checkpoint_decide_alike_on_every_rank(figure, tmp_path):
    first, second = found_by(decide, 2, tmp_path)
    with figure(
        "early stopping and best checkpoint: the same decisions on 2 ranks, also of a foreign module", 2
    ) as count:
        for one, other in zip(first, second, strict=True):
            assert 0 < one[0][2] < 39
            count.trial("" if one == other else f"{one} and {other}")


def test_a_global_batch_that_is_no_multiple_of_the_processes_is_refused(tmp_path):
    options = ["--config", DDP, "--data.batch_size=33", "--data.batch_size_is=global"]
    done = called("fit", "--config", CONFIG, *options, cwd=tmp_path, code=2)  # No other process is started.
    assert done.stderr == "firstlight: batch_size=33 is global: it must be a multiple of the 2 processes\n"
    assert not list(tmp_path.rglob("*.ckpt"))
