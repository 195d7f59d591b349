"""When the disk for logs is full or fails, the logger warns and training continues."""

import os
import re

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from firstlight.loggers import MetricsCSV, TensorBoard
from tests.checkpoints.test_io import limited
from tests.helpers import CONFIG, Ranks, newest, repeatable_lines, results
from tests.test_loggers import read


@pytest.mark.slow
def test_run_whose_log_files_cannot_grow_ends_with_the_same_weights(tmp_path):
    options = ["--model.network.hidden=[4]", "--trainer.log_every_n_steps=1", "--trainer.max_epochs=12"]
    args, runs = ["fit", "--config", CONFIG, "--disable=[progress]", *options], []
    for limit in (10_000_000, 60_000):
        folder = tmp_path / str(limit)
        folder.mkdir()
        done = Ranks(limited, limit, args, cwd=folder).succeed()
        runs.append(newest(folder))
    whole, short = runs
    said = done.stderr.splitlines()
    assert len(said) == 2, done.stderr
    for path in (short.relative_to(folder), (short / "metrics.csv").relative_to(folder)):
        assert f"{path}: File too large; logging there stops, training continues" in said
    checkpoints = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs]
    for name, value in checkpoints[0]["state_dict"].items():
        assert torch.equal(value, checkpoints[1]["state_dict"][name])
    assert results(whole)["best"] == results(short)["best"]
    text = (short / "metrics.csv").read_bytes()
    assert 50_000 < len(text) <= 60_000
    assert text.endswith(b"\n")
    kept = repeatable_lines(short)
    assert repeatable_lines(whole)[: len(kept)] == kept


@pytest.mark.parametrize("logger", [TensorBoard, lambda folder: MetricsCSV(folder / "metrics.csv")])
def test_logger_that_cannot_create_its_file_warns_once_and_the_fit_completes(logger, tmp_path, caplog):
    class Logging(BoringModel):
        def training_step(self, batch, batch_idx):
            self.log("count", float(self.global_step))
            return super().training_step(batch, batch_idx)

    (tmp_path / "file").touch()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=6,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=logger(tmp_path / "file" / "logs"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logging())
    assert trainer.global_step == 6
    (said,) = [record.message for record in caplog.records if record.name.startswith("firstlight")]
    assert re.search(r"file/logs\S*: Not a directory; logging there stops, training continues$", said)


def test_an_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,name,value\r\n0,loss,0.25\r\n1,loss,0.1")
    logger = MetricsCSV(path)
    logger.log_metrics({"loss": 0.125}, 1)
    logger.finalize("success")
    assert read(path) == [["step", "name", "value"], ["0", "loss", "0.25"], ["1", "loss", "0.125"]]


def test_a_pipe_in_place_of_metrics_csv_does_not_hang(tmp_path, caplog):
    os.mkfifo(tmp_path / "metrics.csv")
    MetricsCSV(tmp_path / "metrics.csv").log_metrics({"train/loss": 0.5}, step=0)
    (warning,) = caplog.messages
    assert warning.endswith("metrics.csv: it is a pipe; logging there stops, training continues")
