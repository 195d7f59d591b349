"""The formats of exported models: how each is written, and loaded to compare it with the original."""

import copy
import io
import json
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn

from firstlight.errors import UsageError

Outputs = Mapping[str, Any]


class Format(ABC):
    """A file format. `suffix` ends the name of a file, and `usage` is Python code that loads it."""

    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    usage: ClassVar[str]

    def check_installed(self) -> None:
        """Raise a UsageError if a package is missing."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            raise UsageError(
                f"this export needs {', '.join(missing)}, in firstlight's extra {self.extra}: "
                f"pip install 'firstlight[{self.extra}]'"
            )

    @abstractmethod
    def write(self, model: nn.Module, sample: Tensor, description: Mapping[str, Any], file: IO[bytes]) -> None:
        """Write a model that takes raw numbers like `sample`, with its description; a disk that fails is an OSError."""

    @abstractmethod
    def load(self, file: Path, model: nn.Module) -> Callable[[Tensor], Outputs]:
        """Return a function of raw numbers that uses the file; `model` gives the code if the file holds none."""


class Onnx(Format):
    """ONNX, for onnxruntime and others. The description is in the metadata of the model."""

    suffix = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    usage = """import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
description = json.loads(session.get_modelmeta().custom_metadata_map["firstlight"])
inputs = np.array(...)  # as described below
outputs = dict(zip(description["outputs"], session.run(None, {"inputs": inputs})))"""

    def write(self, model: nn.Module, sample: Tensor, description: Mapping[str, Any], file: IO[bytes]) -> None:
        """Write one file with weights and metadata."""
        program = traced(model, sample)
        with _quiet():
            try:
                exported: Any = torch.onnx.export(
                    program, input_names=["inputs"], output_names=description["outputs"], dynamo=True, verbose=False
                )
            except torch.onnx.errors.OnnxExporterError as error:
                raise UsageError(f"{_network(model)} has no ONNX form: {_first_line(error)}") from error
        exported.model.metadata_props["firstlight"] = json.dumps(description)
        file.write(exported.model_proto.SerializeToString())

    def load(self, file: Path, model: nn.Module) -> Callable[[Tensor], Outputs]:
        """Return a function that calls onnxruntime on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, {"inputs": inputs.numpy()}), strict=True))


class Pt2(Format):
    """torch's own format of a traced model, for programs with torch and without firstlight."""

    suffix = "pt2"
    usage = """import json
import torch

files = {"description.json": ""}
model = torch.export.load("model.pt2", extra_files=files).module()
description = json.loads(files["description.json"])
inputs = torch.tensor(...)  # as described below
outputs = model(inputs)"""

    def write(self, model: nn.Module, sample: Tensor, description: Mapping[str, Any], file: IO[bytes]) -> None:
        """Write one file with weights and the description."""
        program, buffer = traced(model, sample), io.BytesIO()
        with _quiet():  # torch 2.14 warns of channels-last weights, and writes them right.
            torch.export.save(program, buffer, extra_files={"description.json": json.dumps(description)})
        file.write(buffer.getbuffer())  # If the disk fails, torch 2.14 aborts the process.

    def load(self, file: Path, model: nn.Module) -> Callable[[Tensor], Outputs]:
        """Return the traced model."""
        return _without_gradients(torch.export.load(file).module())


class Safetensors(Format):
    """Weights, statistics and the description, without code."""

    suffix = "safetensors"
    packages = ("safetensors",)
    extra = "safetensors"
    usage = """import json
from safetensors import safe_open

with safe_open("model.safetensors", "pt") as file:
    description = json.loads(file.metadata()["firstlight"])
    weights = {name: file.get_tensor(name) for name in file.keys()}
# Weights of the network: task.network.*; of the preparation: preparation.*, see firstlight.data.scale.Preparation.
prefix = "task.network."
network_state = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}"""

    def write(self, model: nn.Module, sample: Tensor, description: Mapping[str, Any], file: IO[bytes]) -> None:
        """Write one file. Tensors that share memory, as tied weights do, are written once each."""
        from safetensors.torch import save

        weights = {name: each.detach().clone().contiguous() for name, each in model.state_dict().items()}
        file.write(save(weights, {"firstlight": json.dumps(description)}))

    def load(self, file: Path, model: nn.Module) -> Callable[[Tensor], Outputs]:
        """Return a copy of the model with the weights of the file."""
        from safetensors.torch import load_file

        loaded = copy.deepcopy(model)
        for weight in loaded.state_dict().values():
            weight.zero_()  # So that nothing but the file gives the numbers.
        loaded.load_state_dict(load_file(file))
        return _without_gradients(loaded)


FORMATS: dict[str, Format] = {"onnx": Onnx(), "pt2": Pt2(), "safetensors": Safetensors()}


def traced(model: nn.Module, sample: Tensor) -> torch.export.ExportedProgram:
    """Return a model as a graph, for batches of any size and tokens of any length.

    Raises:
        UsageError: If its forward pass depends on values, or on the size of the batch.
    """
    sizes: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    if sample.dtype == torch.int64:
        sizes[1] = torch.export.Dim.AUTO
    with torch.no_grad(), _quiet():
        try:
            return torch.export.export(model, (sample,), dynamic_shapes=(sizes,))
        except Exception as error:  # Tracing calls the network, so any error is possible.
            raise UsageError(f"{_network(model)} cannot be traced: {_first_line(error)}") from error


def _without_gradients(module: nn.Module) -> Callable[[Tensor], Outputs]:
    @torch.no_grad()
    def call(inputs: Tensor) -> Outputs:
        found: Outputs = module(inputs)
        return found

    return call


def _network(model: Any) -> str:
    return type(model.task.network).__name__


def _first_line(error: BaseException) -> str:
    """Return the first line of the innermost message."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters log, warn and print about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
