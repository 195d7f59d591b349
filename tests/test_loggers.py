import csv
import errno
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from firstlight.errors import UsageError
from firstlight.loggers import History, MetricsCSV, TensorBoard, current_step, should_log


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_metrics_csv_has_one_line_for_each_number(tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=9)
    logger.log_metrics({"val/loss": 0.1 + 0.2}, step=10)
    logger.save()
    assert read(logger.path) == [
        ["step", "name", "value"],
        ["9", "train/loss", "0.5"],
        ["9", "epoch", "0"],
        ["10", "val/loss", repr(0.1 + 0.2)],
    ]
    logger.finalize("success")


def test_metrics_csv_does_not_repeat_the_epoch_of_a_step(tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0, "epoch": 0}, step=4)
    logger.log_metrics({"val": 2.0, "epoch": 0, "loss": 1.0}, step=4)
    logger.log_metrics({"loss": 1.0, "epoch": 0}, step=5)
    logger.finalize("success")
    logger.log_metrics({"epoch": 0}, step=5)
    logger.log_metrics({"epoch": 1}, step=5)
    logger.finalize("success")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    expected = [
        "4,loss,1.0",
        "4,epoch,0",
        "4,val,2.0",
        "4,loss,1.0",
        "5,loss,1.0",
        "5,epoch,0",
        "5,epoch,0",
        "5,epoch,1",
    ]
    assert lines == expected


def test_metrics_csv_only_grows_when_new_names_appear(tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    before = b""
    for step in range(5):
        logger.log_metrics({f"name{step}": step}, step)
        logger.save()
        after = logger.path.read_bytes()
        assert after.startswith(before)
        assert len(after) > len(before)
        before = after
    logger.finalize("success")


def test_a_second_logger_appends_to_the_file_of_the_first_with_one_header(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    first.log_metrics({"loss": 1.0}, 0)
    first.finalize("success")
    before = path.read_bytes()
    second = MetricsCSV(path)
    assert path.read_bytes() == before
    second.log_metrics({"loss": 0.5, "new": 2.0}, 1)
    second.finalize("success")
    assert path.read_bytes().startswith(before)
    assert read(path) == [["step", "name", "value"], ["0", "loss", "1.0"], ["1", "loss", "0.5"], ["1", "new", "2.0"]]


def test_a_second_logger_appends_to_a_first_that_was_saved_but_never_closed(tmp_path):
    first, second = MetricsCSV(tmp_path / "metrics.csv"), MetricsCSV(tmp_path / "metrics.csv")
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    second.log_metrics({"loss": 0.5}, 1)
    second.save()
    first.log_metrics({"loss": 0.25}, 2)
    first.finalize("success")
    second.finalize("success")
    assert read(first.path) == [
        ["step", "name", "value"],
        ["0", "loss", "1.0"],
        ["1", "loss", "0.5"],
        ["2", "loss", "0.25"],
    ]


def test_a_closed_logger_opens_the_file_again_for_another_number(tmp_path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(3):
        logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("success")
    assert read(logger.path) == [["step", "name", "value"], *[[str(step), "loss", f"{step}.0"] for step in range(3)]]


def test_metrics_csv_creates_nothing_before_the_first_number(tmp_path):
    logger = MetricsCSV(tmp_path / "new" / "metrics.csv")
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "new").exists()
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert logger.path.is_file()
    assert logger.save_dir == str(tmp_path / "new")


def curves(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def test_tensorboard_holds_each_number_at_its_step(tmp_path):
    logger = TensorBoard(tmp_path)
    for step in (1, 1, 2):
        logger.log_metrics({"train/loss": torch.tensor(0.5 * step), "epoch": 0}, step)
    logger.log_metrics({"both": {"train": 1.0, "val": 2.0}}, 2)
    with pytest.raises(ValueError, match="not supported"):
        logger.log_metrics({"nothing": None}, 2)
    logger.finalize("success")
    logger.log_metrics({"test/loss": np.float32(0.25)}, 3)
    logger.finalize("success")
    found = {name: [(each.step, each.value) for each in events] for name, events in curves(tmp_path).items()}
    assert found == {
        "train/loss": [(1, 0.5), (1, 0.5), (2, 1.0)],
        "epoch": [(1, 0.0), (1, 0.0), (2, 0.0)],
        "test/loss": [(3, 0.25)],
    }
    assert [each.name for each in tmp_path.iterdir() if each.is_dir()] == ["both_train", "both_val"]


def test_tensorboard_writes_buffered_numbers_in_one_event_of_their_step(tmp_path):
    logger = TensorBoard(tmp_path)
    logger.buffer_metrics({"lr": 0.5}, 1)
    logger.buffer_metrics({"grad_norm/total": 2.0}, 1)
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.buffer_metrics({"lr": 0.25}, 2)
    logger.log_metrics({"val/loss": 1.0}, 3)
    logger.buffer_metrics({"lr": 0.125}, 4)
    logger.save()
    logger.buffer_metrics({"lr": 0.0625}, 4)
    logger.finalize("success")
    found = curves(tmp_path)
    assert {name: [(each.step, each.value) for each in events] for name, events in found.items()} == {
        "lr": [(1, 0.5), (2, 0.25), (4, 0.125), (4, 0.0625)],
        "grad_norm/total": [(1, 2.0)],
        "train/loss": [(1, 1.0)],
        "val/loss": [(3, 1.0)],
    }
    assert len({found[name][0].wall_time for name in ("lr", "grad_norm/total", "train/loss")}) == 1


def test_history_holds_what_a_run_logged_and_writes_nothing(tmp_path):
    class Counting(BoringModel):
        def on_train_batch_start(self, batch, batch_idx):
            self.log("count", float(self.global_step))

    history = History()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=6,
        limit_val_batches=0,
        log_every_n_steps=2,
        logger=history,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Counting())
    assert history["count"] == ([1, 3, 5], [1.0, 3.0, 5.0])
    assert not list(tmp_path.iterdir())


def test_history_refuses_a_name_that_was_not_logged():
    history = History()
    with pytest.raises(UsageError, match=r"^val/loss was not logged; available: nothing$"):
        history["val/loss"]
    history.log_metrics({"val/loss": 1.0}, step=0)
    with pytest.raises(UsageError, match=r"^val/los was not logged; available: val/loss; did you mean val/loss\?$"):
        history["val/los"]


@pytest.mark.parametrize("reopened", [False, True])
def test_a_disk_error_in_the_thread_of_tensorboard_prints_no_traceback(reopened, tmp_path, monkeypatch, caplog):
    def fail(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    printed, others = [], threading.enumerate()
    monkeypatch.setattr(threading, "excepthook", lambda args: printed.append(args.exc_type))
    logger = TensorBoard(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    if reopened:
        logger.finalize("success")
        logger.log_metrics({"loss": 1.0}, 1)
    (worker,) = set(threading.enumerate()) - set(others)
    monkeypatch.setattr(worker._record_writer, "write", fail)
    with suppress(OSError):
        logger.log_metrics({"loss": 1.0}, 2)
    worker.join()
    logger.log_metrics({"loss": 1.0}, 3)
    assert printed == []
    (said,) = [record.message for record in caplog.records if record.name.startswith("firstlight")]
    assert said == f"{tmp_path}: No space left on device; logging there stops, training continues"


@pytest.mark.parametrize("every", [0, 1, 3])
def test_a_step_is_logged_when_its_number_is_a_multiple_of_log_every_n_steps(every):
    trainer = Trainer(logger=False, accelerator="cpu", log_every_n_steps=every)
    logged = []
    for trainer.fit_loop.epoch_loop._batches_that_stepped in range(20):
        if should_log(trainer):
            logged.append(current_step(trainer))
    assert logged == {0: [], 1: list(range(20)), 3: list(range(2, 20, 3))}[every]
