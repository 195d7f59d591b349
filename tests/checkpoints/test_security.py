"""Crafted checkpoints, loaded in every possible way with torch's override variable set: none runs code."""

import json
import os
import pickle
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import lightning
import pytest
import torch
from lightning.pytorch import Trainer

from firstlight.__main__ import main
from firstlight.checkpoints.io import AtomicCheckpointIO, read_checkpoint_metrics
from firstlight.cli.parser import CLI
from firstlight.data import Digits
from firstlight.errors import UsageError
from firstlight.networks import MLP
from firstlight.tasks import Classification, Regression, Task
from tests.helpers import QUICK_CONFIGS, newest, quick_or_slow

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
pytestmark = pytest.mark.faults
SPAWN = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
SIZES = {"in_features": 64, "hidden": [8], "out_features": 10}
MODULE = """
import os, torch
{}
class Net(torch.nn.Module):
    def __init__(self, width: int = 1):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
    def forward(self, inputs):
        return self.layer(inputs.flatten(1))
def build(cls, arguments):
    return cls(**arguments)
def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)
"""


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@contextmanager
def local_server():
    """Serve the current folder on a local socket; yield its address and the list of requested paths."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch, request, figure):
    """A file that exists if code of a checkpoint was run. `evil.py` in the current folder writes it when imported."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "canary"
    Path("evil.py").write_text(MODULE.format(f"open({str(path)!r}, 'w').close()"))
    Path("evil.yaml").write_text("class_path: evil.Net")
    Path("my_project.py").write_text(MODULE.format(""))
    yield path
    if request.node.name.startswith("test_no_"):
        with figure("crafted checkpoints, loaded in several ways: none runs code") as case:
            case.trial(request.node.name if path.exists() else "")
    assert not path.exists(), "code of a checkpoint was run"
    for name in ("evil", "my_project"):
        sys.modules.pop(name, None)


def task_arguments(**changes):
    """Return the hyper-parameters of a task as the command line stores them."""
    return {
        "_class_path": "firstlight.tasks.Classification",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "network": {"class_path": "firstlight.networks.MLP", "init_args": SIZES},
        "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "schedule": {"class_path": "firstlight.schedules.Constant"},
        "classes": 10,
        **changes,
    }


def data_arguments(**changes):
    return {
        "_class_path": "firstlight.data.Digits",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "batch_size": 8,
        **changes,
    }


def write(path, task=None, data=None, network=None, **more):
    """Write a checkpoint like a run's, with the given hyper-parameters."""
    weights = (network or MLP(64, [8], 10)).state_dict()
    checkpoint = {
        "state_dict": {f"network.{name}": value for name, value in weights.items()},
        "hyper_parameters": task or task_arguments(),
        "datamodule_hyper_parameters": data or data_arguments(),
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 1,
        "optimization": {"first_total": 1, "total": 1, "steps": 1, "epochs": 1, "steps_per_epoch": 1},
        **more,
    }
    torch.save(checkpoint, path)
    return path


def spawn(canary):
    """Return a class of torch with arguments that start a process."""
    arguments = {"entrypoint": shutil.which("touch"), "args": [str(canary)], "env": {}, "local_rank_id": 0}
    return {"class_path": SPAWN, "init_args": {**arguments, "stdout": None, "stderr": None, "numa_options": None}}


def refusal(call):
    """Return the message of a refusal, which is one line."""
    with pytest.raises(UsageError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def refused_by_command(capsys, *args):
    assert main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


MLP_WITH = partial(dict, class_path="firstlight.networks.MLP")
NAMES = {
    "a module that is run when imported": (
        {"network": {"class_path": "evil.Net"}},
        r"trust evil, use trust=",
    ),
    "the same as text": ({"network": "evil.Net"}, r"names evil\.Net"),
    "the same from a file": ({"network": "evil.yaml"}, r"evil"),
    "the same within a part": (
        {"network": MLP_WITH(init_args={**SIZES, "activation": "evil.Net"})},
        r"names evil\.Net",
    ),
    "the same as a schedule": ({"schedule": {"class_path": "evil.Net"}}, r"names evil\.Net"),
    "the same within a list within a part": (
        {"loss": {"class_path": "torch.nn.ParameterList", "init_args": {"values": [[{"class_path": "evil.Net"}]]}}},
        r"names evil\.Net",
    ),
    "os.system": ({"optimizer": "os.system"}, r"names os\.system"),
    "os.system as a class": ({"optimizer": {"class_path": "os.system", "init_args": {"command": "x"}}}, r"os\.system"),
    "os.system in the namespace of torch": (
        {"optimizer": "torch.os.system"},
        r"names torch\.os\.system, which is not a network",
    ),
    "a function of torch": ({"optimizer": "torch.hub.load"}, r"torch\.hub\.load, which is not a network"),
    "another class in the namespace of torch": (
        {"loss": {"class_path": "torch.ctypes.CDLL", "init_args": {"name": "evil.so"}}},
        r"torch\.ctypes\.CDLL, which is not a network",
    ),
    "a class of torch that is not a part": ({"network": spawn}, r"SubprocessHandler, which is not a network"),
    "the same where any value is allowed": (
        {"loss": lambda canary: {"class_path": "torch.nn.ParameterList", "init_args": {"values": [spawn(canary)]}}},
        r"SubprocessHandler, which is not a network",
    ),
    "an optimiser as a network": (
        {"network": {"class_path": "torch.optim.SGD"}},
        r"torch\.optim\.SGD.*not.*subclass of Module",
    ),
    "a loss for an optimiser": ({"optimizer": {"class_path": "torch.nn.MSELoss"}}, r"optimizer"),
    "another task": ({"_class_path": "evil.Net"}, r"names evil\.Net"),
    "a task that is a function": ({"_class_path": "evil.build"}, r"names evil\.build"),
    "another function that builds": ({"_instantiator": "evil.build"}, r"built by evil\.build"),
    "os.system to build": ({"_instantiator": "os.system"}, r"built by os\.system"),
    "an error that quotes an import": ({"classes": "module 'evil' has no attribute 'Net'"}, r"evil"),
    "an error that quotes a class": (
        {"classes": "class_path 'evil.Net' Option 'x' is not accepted"},
        r"evil",
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "way",
    [
        "a program",
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in ("a program that asks for any task", "test", "predict", "validate")
        ),
    ],
)
def test_no_class_that_is_not_trusted_is_built(name, way, canary, capsys):
    changes, message = NAMES[name]
    changes = {key: value(canary) if callable(value) else value for key, value in changes.items()}
    path = write(canary.with_name("a.ckpt"), task_arguments(**changes))
    if way.startswith("a program"):
        cls = Task if way.endswith("any task") else Classification
        found = refusal(lambda: cls.load_from_checkpoint(path))
    else:
        found = refused_by_command(capsys, way, "--ckpt", path)
    assert re.search(message, found), found
    assert "evil" not in sys.modules


def test_untrusted_class_of_a_data_module_is_not_built(canary, capsys):
    path = write(canary.with_name("a.ckpt"), data=data_arguments(augment=[{"class_path": "evil.Net"}]))
    assert "names evil.Net" in refusal(lambda: Digits.load_from_checkpoint(path))
    assert "names evil.Net" in refused_by_command(capsys, "test", "--ckpt", path)
    write(path, data=data_arguments(_class_path="evil.Net"))
    assert "names evil.Net" in refusal(lambda: Digits.load_from_checkpoint(path))
    assert "names evil.Net" in refused_by_command(capsys, "test", "--ckpt", path)
    write(path, data=data_arguments(_instantiator="evil.build"))
    assert "built by evil.build" in refusal(lambda: Digits.load_from_checkpoint(path))


@pytest.mark.parametrize("key", ["hparams", "module_arguments"])
def test_hyper_parameters_under_the_keys_of_old_versions_are_checked_too(key, canary):
    arguments = task_arguments(network={"class_path": "evil.Net"})
    path = write(canary.with_name("a.ckpt"), {"classes": 10}, **{key: arguments})
    assert "names evil.Net" in refusal(lambda: Classification.load_from_checkpoint(path))
    path = write(canary.with_name("a.ckpt"), {"classes": 10}, **{key: {"_instantiator": "evil.build"}})
    assert "built by evil.build" in refusal(lambda: Classification.load_from_checkpoint(path))


def test_hparams_file_is_not_read(canary):
    path = write(canary.with_name("a.ckpt"))
    assert "not read" in refusal(lambda: Classification.load_from_checkpoint(path, hparams_file="evil.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    quick = ["--trainer.max_epochs=1", "--disable=progress"]
    assert main(["fit", "--config", str(ROOT / "configs/digits_mlp.yaml"), f"--runs={folder}/runs", *quick]) == 0
    return newest(folder)


@pytest.fixture
def run(trained, canary):
    return shutil.copytree(trained, canary.with_name("run"))


PICKLES = {
    "where a name is": lambda path, code: write(path, task_arguments(classes=code)),
    "beside the weights": lambda path, code: write(path, code=code),
    "in place of the weights": lambda path, code: torch.save(code, path),
    "in a file of the old format": lambda path, code: torch.save(code, path, _use_new_zipfile_serialization=False),
    "in a bare pickle": lambda path, code: path.write_bytes(pickle.dumps(code)),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_no_pickled_code_is_run(kind, run, canary, capsys):
    path = run / "checkpoints" / "last.ckpt"
    for file in run.glob("checkpoints/*.ckpt"):
        PICKLES[kind](file, Runs(f"touch {canary}"))
    for load in (Classification.load_from_checkpoint, Digits.load_from_checkpoint):
        refusal(lambda load=load: load(path))
        refusal(lambda load=load: load(path, weights_only=None))
        assert "leave it out" in refusal(lambda load=load: load(path, weights_only=False))
    refusal(lambda: AtomicCheckpointIO().load_checkpoint(path))
    with pytest.raises(Exception):  # noqa: B017  # torch raises several types
        read_checkpoint_metrics(path)
    # Every verb reads a checkpoint by the same function, so each is tried in one way.
    refused_by_command(capsys, "validate", "--ckpt", path)
    refused_by_command(capsys, "test", "--run", run)
    refused_by_command(capsys, "predict", "--run", run, "--ckpt", path)
    refused_by_command(capsys, "fit", "--run", run, "--trainer.max_epochs=2")


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_no_pickled_code_is_run_in_a_trainer_with_the_plugin(verb, canary):
    torch.save({"state_dict": {}, "code": Runs(f"touch {canary}")}, "a.ckpt")
    trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu", max_epochs=1)
    task = Classification.load_from_checkpoint(write(canary.with_name("right.ckpt")))
    refusal(lambda: getattr(trainer, verb)(task, datamodule=Digits(), ckpt_path="a.ckpt"))


def test_no_checkpoint_is_read_from_a_url(run, canary, capsys):
    torch.save(Runs(f"touch {canary}"), "a.ckpt")
    with local_server() as (url, asked):
        url += "/a.ckpt"
        assert "is a URL" in refusal(lambda: Classification.load_from_checkpoint(url))
        assert "is a URL" in refusal(lambda: Digits.load_from_checkpoint(url))
        assert "is a URL" in refusal(lambda: AtomicCheckpointIO().load_checkpoint(url))
        for verb in ("validate", "test", "predict"):
            assert "is a URL" in refused_by_command(capsys, verb, "--ckpt", url)
            assert "no checkpoint" in refused_by_command(capsys, verb, "--run", run, "--ckpt", url)
    assert not asked


PLACES = {
    "a part": lambda text: (task_arguments(network=text), None),
    "the loss": lambda text: (task_arguments(loss=text), None),
    "the optimiser": lambda text: (task_arguments(optimizer=text), None),
    "the schedule": lambda text: (task_arguments(schedule=text), None),
    "an option of a part": lambda text: (
        task_arguments(network=MLP_WITH(init_args={**SIZES, "activation": text})),
        None,
    ),
    "an option that takes any value": lambda text: (
        task_arguments(network={"class_path": "torch.nn.ParameterList", "init_args": {"values": [[text]]}}),
        None,
    ),
    "arguments without a type": lambda text: (
        task_arguments(loss={"class_path": "torch.nn.CrossEntropyLoss", "dict_kwargs": {"weight": text}}),
        None,
    ),
    "an option of an optimiser": lambda text: (
        task_arguments(optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": text}}),
        None,
    ),
    "an option of a schedule": lambda text: (
        task_arguments(schedule={"class_path": "firstlight.schedules.Cosine", "init_args": {"final": text}}),
        None,
    ),
    "a number": lambda text: (task_arguments(classes=text), None),
    "a name of a class": lambda text: (task_arguments(network={"class_path": text}), None),
    "all options of a part": lambda text: (task_arguments(network=MLP_WITH(init_args=text)), None),
    "an unknown option": lambda text: (task_arguments(weights=text), None),
    "augmentations": lambda text: (None, data_arguments(augment=text)),
    "an augmentation": lambda text: (None, data_arguments(augment=[text])),
    "an option of an augmentation": lambda text: (
        None,
        data_arguments(augment=[{"class_path": "torch.nn.Unflatten", "init_args": {"dim": text}}]),
    ),
    "an option of the data": lambda text: (None, data_arguments(missing=text)),
    "the class of the data": lambda text: (None, data_arguments(_class_path=text)),
}
ADDRESSES = {
    "an address": "{url}/evil.yaml",
    "a chain": "filecache::{url}/evil.yaml",
    "a longer chain": "simplecache::filecache::{url}/evil.yaml",
    "references from an address": "reference://x::{url}/references.json",
    "references in the text": 'reference://x::data:application/json,{{"version":1,"refs":{{"x":["{url}/evil.yaml"]}}}}',
    "a local address": "file://{folder}/evil.yaml",
    "a chain to a file": "simplecache::file://{folder}/evil.yaml",
    "a path": "{folder}/evil.yaml",
    "a relative path": "./evil.yaml",
    "a name of a file": "evil.yaml",
    "a path in the home folder": "~/evil.yaml",
    "YAML with an address": '{{class_path: "{url}/evil.yaml"}}',
}


TEXTS = ("a name of a file", "YAML with an address")
"""What is no location by its text, and so may be the name of a column, for example."""


QUICK_PLACES = {
    "a part",
    "arguments without a type",
    "an option of a schedule",
    "a name of a class",
    "an augmentation",
    "the class of the data",
}


@pytest.mark.parametrize("place", quick_or_slow(PLACES, QUICK_PLACES))
def test_no_file_or_address_in_hyper_parameters_is_opened(place, canary, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "references.json").write_text(json.dumps({"version": 1, "refs": {"x": [str(tmp_path / "evil.yaml")]}}))
    opened = []
    monkeypatch.setattr(fsspec, "open", lambda *args, **options: opened.append(args))
    with local_server() as (url, asked):
        for kind, text in ADDRESSES.items():
            text = text.format(url=url, folder=tmp_path)
            task, data = PLACES[place](text)
            path = write(tmp_path / "a.ckpt", task, data)
            os.utime(tmp_path / "evil.yaml", ns=(0, (tmp_path / "evil.yaml").stat().st_mtime_ns))
            found = [refusal(lambda task=task: (Classification if task else Digits).load_from_checkpoint("a.ckpt"))]
            if kind == "a name of a file":  # The command line is slower, and the other texts are refused earlier.
                found.append(refused_by_command(capsys, "test", "--ckpt", path))
            assert kind in TEXTS or all("location" in each or "names" in each for each in found), (kind, found)
            assert (tmp_path / "evil.yaml").stat().st_atime_ns == 0, f"{kind}: the file was read"
    assert not asked and not opened
    assert "evil" not in sys.modules


CLASSES_WITH_FILES = [
    "torchmetrics.functional.image.lpips._LPIPS",
    "torchmetrics.image.fid.NoTrainInceptionV3",
    "torchmetrics.image.FrechetInceptionDistance",
    "torchmetrics.image.LearnedPerceptualImagePatchSimilarity",
    "torchmetrics.text.BERTScore",
    "torchmetrics.text.rouge.ROUGEScore",
    "torchmetrics.multimodal.CLIPScore",
    "torch.utils.model_dump.__main__",
    "torch.hub.load",
    "torch.jit.ScriptModule",
    "torch.nn.modules.module.Module.load_state_dict",
    "torch.nn.parallel.DataParallel",
    "torch.package.PackageImporter",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "torch.optim.Optimizer.load_state_dict",
    "firstlight.checkpoints.io.read",
    "firstlight.run.directory.discard",
    "firstlight.data.Digits.load",
    "firstlight.data.files.read_bytes",
]


@pytest.mark.parametrize("where", ["network", "activation", "optimizer", "_class_path"])
def test_no_class_that_opens_files_is_imported_or_built(where, canary, capsys, monkeypatch):
    before = set(sys.modules)
    for name in CLASSES_WITH_FILES:
        changes = {where: name if where == "_class_path" else {"class_path": name, "init_args": {"model_path": "x"}}}
        if where == "activation":
            changes = {"network": MLP_WITH(init_args={**SIZES, "activation": name})}
        path = write(canary.with_name("a.ckpt"), task_arguments(**changes))
        found = refusal(lambda path=path: Classification.load_from_checkpoint(path))
        assert f"names {name}, which is not a network" in found
    assert refused_by_command(capsys, "test", "--ckpt", path) == f"firstlight: {found}"
    assert not {
        name for name in set(sys.modules) - before if name.startswith(("torch.utils.model_dump", "torch.package"))
    }


def test_no_metadata_of_a_sharded_checkpoint_is_read(run, canary, capsys):
    shards = run / "checkpoints" / "last.ckpt"
    for path in (shards, shards.with_name("best.ckpt")):
        path.unlink()
        path.mkdir()
        (path / ".metadata").write_bytes(pickle.dumps(Runs(f"touch {canary}")))
        torch.save(Runs(f"touch {canary}"), path / "meta.pt")
    assert "no checkpoint" in refusal(lambda: Classification.load_from_checkpoint(shards))
    assert "no checkpoint" in refusal(lambda: AtomicCheckpointIO().load_checkpoint(shards))
    refused_by_command(capsys, "test", "--ckpt", shards)
    refused_by_command(capsys, "test", "--run", run)
    refused_by_command(capsys, "fit", "--run", run, "--trainer.max_epochs=2")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_run_is_built_from_its_config_and_not_from_its_checkpoint(run, canary, capsys):
    for path in run.glob("checkpoints/*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            checkpoint[key] |= {"_class_path": "evil.Net", "_instantiator": "evil.build", "network": "evil.Net"}
        torch.save(checkpoint, path)
    for verb in ("validate", "test", "predict"):
        assert main([verb, "--run", str(run)]) == 0
    assert main(["fit", "--run", str(run), "--trainer.max_epochs=2"]) == 0
    assert "evil" not in sys.modules


def test_checkpoint_alone_gives_the_metrics_of_its_run(run, capsys):
    for given in (["--run", str(run)], ["--ckpt", str(run / "checkpoints" / "best.ckpt")]):
        assert main(["test", *given, "--runs=alone"]) == 0
    of_run, alone = (json.loads(path.read_text()) for path in Path().rglob("results.json") if "test-" in str(path))
    assert of_run["metrics"] == alone["metrics"]


@pytest.mark.parametrize(
    "config",
    quick_or_slow(CONFIGS, QUICK_CONFIGS),
    ids=lambda path: path.stem,
)
def test_parts_of_every_config_load_from_a_checkpoint_alone(config, tmp_path, monkeypatch):
    augmented = "kornia" in config.read_text()
    if augmented:
        pytest.importorskip("kornia")
    monkeypatch.chdir(ROOT)
    made = CLI("fit", ["--config", str(config)]).experiment
    kept = dict(made.task.hparams), dict(made.datamodule.hparams)
    path = write(tmp_path / "a.ckpt", *kept, state_dict=made.task.state_dict())
    loaded = type(made.task).load_from_checkpoint(path)
    assert str(loaded) == str(made.task)
    assert loaded.optimization.schedule == made.task.optimization.schedule
    assert loaded.optimization.build_optimizer.keywords == made.task.optimization.build_optimizer.keywords
    given = [
        f"--data.{name}={getattr(made.datamodule, name)}" for name in ("path", "root") if hasattr(made.datamodule, name)
    ]
    if given:
        with pytest.raises(UsageError, match=f"needs .*hold no locations, so add {given[0].partition('=')[0]}$"):
            CLI("test", ["--ckpt", str(path), *(["--trust=kornia"] if augmented else [])])
    again = CLI("test", ["--ckpt", str(path), *given, *(["--trust=kornia"] if augmented else [])]).experiment
    assert again.task.hparams == made.task.hparams
    assert again.datamodule.hparams == made.datamodule.hparams


def test_named_module_is_trusted(tmp_path, capsys):
    import my_project

    own = {"class_path": "my_project.Net", "init_args": {"width": 2}}
    path = write(tmp_path / "a.ckpt", task_arguments(network=own), network=my_project.Net())
    del sys.modules["my_project"]
    assert "trust my_project, use trust=" in refusal(lambda: Classification.load_from_checkpoint(path))
    assert "names my_project.Net" in refused_by_command(capsys, "test", "--ckpt", path)
    assert "my_project" not in sys.modules
    for trust in ("my_project", ["my_project"]):
        assert type(Classification.load_from_checkpoint(path, trust=trust).network).__module__ == "my_project"
    cli = CLI("test", ["--ckpt", str(path), "--trust", "another,my_project"])
    assert type(cli.experiment.task.network).__module__ == "my_project"
    assert "is not a module name" in refusal(lambda: Classification.load_from_checkpoint(path, trust="./my_project"))


def test_function_of_a_trusted_module_may_be_named(tmp_path):
    path = write(tmp_path / "a.ckpt", task_arguments(optimizer="my_project.sgd"))
    loaded = Classification.load_from_checkpoint(path, trust="my_project")
    assert loaded.optimization.build_optimizer is sys.modules["my_project"].sgd
    assert "trust my_project" in refusal(lambda: Classification.load_from_checkpoint(path))


def test_checkpoint_holds_the_folder_that_it_was_written_to_and_no_location_of_data(run):
    for name in ("best", "last"):
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert "/runs/digits_mlp/" in str(checkpoint["callbacks"])
        assert "/runs/" not in str([checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]])


def test_imports_of_a_trusted_module_are_not_trusted(tmp_path):
    path = write(tmp_path / "a.ckpt", task_arguments(optimizer="my_project.os.system"))
    assert "my_project.os.system" in refusal(lambda: Classification.load_from_checkpoint(path, trust="my_project"))


def test_trust_is_refused_where_it_has_no_effect(run, capsys):
    for args in (["test", "--run", run], ["fit", "--run", run], ["test", "--config", CONFIGS[0], "--ckpt", "best"]):
        assert "--trust works only for" in refused_by_command(capsys, *args, "--trust", "my_project")


def test_user_class_needs_no_trust_in_a_run(tmp_path, capsys):
    options = ["--model.network=my_project.Net", "--trainer.max_epochs=1", "--disable=progress"]
    assert main(["fit", "--config", str(ROOT / "configs" / "digits_mlp.yaml"), *options]) == 0
    assert main(["test", "--run", "runs/digits_mlp/latest"]) == 0


def test_checkpoint_loads_as_the_class_that_it_holds(tmp_path):
    path = write(tmp_path / "a.ckpt")
    assert type(Task.load_from_checkpoint(path)) is Classification
    assert "which is not a Regression" in refusal(lambda: Regression.load_from_checkpoint(path))
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        Classification.load_from_checkpoint(path).load_from_checkpoint(path)


def test_passed_arguments_replace_those_of_the_checkpoint(tmp_path):
    path = write(tmp_path / "a.ckpt", network=MLP(64, [4], 10))
    assert Classification.load_from_checkpoint(path, network=MLP(64, [4], 10), l1=0.5).hparams["l1"] == 0.5
    assert "another network" in refusal(lambda: Classification.load_from_checkpoint(path))


def test_config_may_name_any_class_after_a_checkpoint_was_loaded(tmp_path):
    path = write(tmp_path / "a.ckpt", task_arguments(network="my_project.Net"))
    refusal(lambda: Classification.load_from_checkpoint(path))
    Classification.load_from_checkpoint(write(path))
    options = ["--config", str(ROOT / "configs" / "digits_mlp.yaml"), "--model.network=my_project.Net"]
    assert type(CLI("fit", options).experiment.task.network).__module__ == "my_project"
