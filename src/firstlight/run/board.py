"""What TensorBoard shows of a run that was tested: confusion matrix, most confident errors, embeddings."""

import base64
import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from firstlight.data import DataModule
from firstlight.data.shown import pixels
from firstlight.insight.report import sections
from firstlight.insight.report.charts import matrix_pixels
from firstlight.loggers import TensorBoard
from firstlight.run import report
from firstlight.tasks import Embedding, Task

_SIDE = 160  # Pixels of a picture among the errors.
_MAX_EMBEDDINGS = 1000
_SECONDS = 0.5  # After which no more embeddings are computed.
_SPRITE = 32  # Pixels of the side of a picture in the projector.


def show(folder: Path, results: Mapping[str, Any], task: LightningModule, datamodule: DataModule) -> None:
    """Write to the TensorBoard events of a run what its tested checkpoint predicts.

    Args:
        folder: The run directory, with the outputs of its splits.
        results: Content of `results.json`.
        task: The task, with the weights of the tested checkpoint.
        datamodule: Its data.
    """
    run = report.read_run(folder, results, datamodule)
    if not run.outputs and not isinstance(task, Embedding):
        return
    logger, step = TensorBoard(folder), int(results["best"].get("step", results["steps"]))
    with logger.guard(folder):
        split = "test" if "test" in run.outputs else "val"
        found = sections.class_probabilities(run, split)
        if found is not None and len(run.class_names) <= sections.MAX_CLASSES:
            picture = matrix_pixels(sections.confusion(*found), run.class_names)
            logger.experiment.add_image(f"{split}/confusion", picture, step, dataformats="HWC")
        for section in sections.errors(run):
            _show_errors(logger.experiment, f"{split}/errors", section, step)
        if isinstance(task, Embedding):
            _show_embeddings(logger.experiment, task, datamodule, step)
    logger.finalize("success")


def _show_errors(writer: Any, tag: str, section: sections.Section, step: int) -> None:
    """Write the samples of a section as one picture, or as a table of texts or values."""
    pictures = [(str(card["picture"]), str(card["caption"])) for card in section.cards if "picture" in card]
    if pictures:
        writer.add_image(tag, np.asarray(picture_grid(pictures)), step, dataformats="HWC")
        return
    shown = [
        card.get("text") or ", ".join(f"{k} {v}" for k, v in card.get("row", {}).items()) for card in section.cards
    ]
    rows = [f"| {_plain(text)} | {_plain(card['caption'])} |" for text, card in zip(shown, section.cards, strict=True)]
    writer.add_text(tag, "\n".join([_plain(section.text), "", "| sample | prediction |", "|---|---|", *rows]), step)


def picture_grid(pictures: Sequence[tuple[str, str]]) -> Image.Image:
    """Return pictures, each a data address and a caption, in rows of four, with the captions below them."""
    font, lines = ImageFont.load_default(12), 3
    columns = min(4, len(pictures))
    width, height = _SIDE + 10, _SIDE + 15 * lines + 10
    grid = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    draw = ImageDraw.Draw(grid)
    for index, (address, caption) in enumerate(pictures):
        left, top = index % columns * width, index // columns * height
        image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
        scale = _SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        grid.paste(image.resize(size, Image.Resampling.NEAREST if scale > 1 else None), (left, top))
        text = _wrapped(caption, font, _SIDE)[:lines]
        draw.multiline_text((left, top + _SIDE + 2), "\n".join(text), "black", font, spacing=2)
    return grid


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    """Return a text in lines of at most `width` pixels; a longer word is cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            word = word[:-2] + "…"
        if font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _plain(text: str) -> str:
    """Return a text with every mark of Markdown escaped."""
    return "".join(each if each.isalnum() or each in " ,.;:%()" else f"&#{ord(each)};" for each in str(text))


def _show_embeddings(writer: Any, task: Task, datamodule: DataModule, step: int) -> None:
    """Write embeddings of the validation split for the projector: as many, at most 1,000, as take half a second."""
    end = time.monotonic() + _SECONDS
    dataset = datamodule.dataset("val")
    embeddings: list[Tensor] = []
    labels: list[int] = []
    sprites: list[NDArray[Any]] = []
    weight = next(task.parameters())
    task.eval()
    for places in torch.arange(min(len(dataset), _MAX_EMBEDDINGS)).split(100):  # type: ignore[no-untyped-call]
        inputs, targets = datamodule.on_after_batch_transfer(dataset.__getitems__(places), 0)
        with torch.inference_mode():
            inputs = inputs.to(weight.device, weight.dtype if inputs.is_floating_point() else None)
            embeddings.append(task.predict_step((inputs, targets), 0)["embedding"].float().cpu())
        labels += targets.tolist()
        raw = datamodule.raw_numbers("val", places.numpy())
        if raw.ndim == 4 and raw.shape[1] in (1, 3):
            sprites += [np.atleast_3d(pixels(each.numpy())) for each in raw]
        if time.monotonic() > end:
            break
    pictures = None
    if sprites:
        pictures = torch.from_numpy(np.stack(sprites)).permute(0, 3, 1, 2).float().div_(255).expand(-1, 3, -1, -1)
        if max(pictures.shape[2:]) > _SPRITE:
            pictures = nn.functional.interpolate(pictures, (_SPRITE, _SPRITE), mode="area")
    names = datamodule.class_names
    texts = [names[label] if names else str(label) for label in labels]
    writer.add_embedding(torch.cat(embeddings), texts, pictures, step, "val")
