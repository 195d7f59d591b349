import os

# Two processors of one core: one thread is faster, and processes of a test do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Lightning's accelerator probes and TensorBoard's protobuf need no accelerator.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

from tests.helpers import CONFIG, firstlight, newest


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of four epochs in a folder of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    done = firstlight("run", "--config", CONFIG, "--trainer.max_epochs=4", cwd=folder)
    return folder, newest(folder), done
