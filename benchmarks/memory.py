"""Measure the peak memory of training on data that stays on disk, and on ten times as much.

    python benchmarks/memory.py           print a table
    python benchmarks/memory.py text      print the line of one kind of data: images, arrays or text
    python benchmarks/memory.py --small   the same with a tenth of the data

Each line is the command `firstlight fit` in its own process, with `data.in_memory=false` and one loader process, for 40
steps. The memory is that of the main process, the largest at any time.
"""

# Import nothing large here: the peak memory of a child process starts at that of this process.
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = "--trainer.max_steps=40 --trainer.limit_val_batches=10 --data.in_memory=false --data.num_workers=1".split()
CONVNET = (
    "--model.class_path=firstlight.tasks.Classification --model.network=ConvNet --model.network.widths=[8] "
    "--model.loss=torch.nn.CrossEntropyLoss --model.optimizer=torch.optim.Adam --model.schedule=Constant"
).split()
TRANSFORMER = (
    "--model=LanguageModel --model.network=TransformerLM --model.network.width=16 --model.network.layers=1 "
    "--model.network.heads=2 --model.loss=torch.nn.CrossEntropyLoss --model.loss.ignore_index=0 "
    "--model.optimizer=torch.optim.Adam --model.schedule=Constant"
).split()

# Writes data of a kind and size; in a process of its own, because it needs memory.
WRITE = """
import sys
from pathlib import Path
import numpy as np
kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
generator = np.random.default_rng(0)
if kind == "images":
    from PIL import Image
    for index in range(count):
        path = folder / f"{index % 4}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((128, 128)).save(path)
elif kind == "arrays":
    folder.mkdir()
    pixels = np.lib.format.open_memmap(folder / "x.npy", "w+", np.uint8, (count, 3, 64, 64))
    for start in range(0, count, 1000):
        pixels[start : start + 1000] = generator.integers(0, 256, pixels[start : start + 1000].shape, np.uint8)
    np.save(folder / "y.npy", np.arange(count) % 4)
else:
    folder.mkdir()
    with (folder / "text.txt").open("wb") as file:
        for _ in range(count):
            file.write(generator.integers(97, 123, 10**6, np.uint8).tobytes())
"""


def measure(kind: str, count: int, folder: Path) -> tuple[float, float]:
    """Return the size of the data on disk and the peak memory of training on it, both in MiB."""
    data = folder / f"{kind}{count}"
    subprocess.run([sys.executable, "-c", WRITE, kind, str(count), str(data)], check=True)
    options = {
        "images": [*CONVNET, "--data=ImageFolder", f"--data.path={data}", "--data.size=128"],
        "arrays": [*CONVNET, "--data=Arrays", f"--data.path={data}/x.npy", f"--data.targets_path={data}/y.npy"],
        "text": [*TRANSFORMER, "--data=Corpus", f"--data.path={data}/text.txt"],
    }[kind]
    command = [sys.executable, "-m", "firstlight", "fit", *options, *COMMON, f"--runs={folder}/runs"]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit((folder / "output.txt").read_text())
    size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
    return size / 2**20, usage.ru_maxrss / 1024


def main() -> None:
    """Measure each kind of data, and print a table."""
    scale = 10 if "--small" in sys.argv else 1
    print("| data | MiB on disk | peak MiB | ten times: MiB on disk | peak MiB |\n|---|---|---|---|---|")
    kinds = {"images": 1000, "arrays": 10_000, "text": 20}
    for kind in [each for each in sys.argv[1:] if each in kinds] or kinds:
        count = kinds[kind]
        with tempfile.TemporaryDirectory() as folder:
            cells = [measure(kind, count * times // scale, Path(folder)) for times in (1, 10)]
        print(f"| {kind} |", " | ".join(f"{value:,.0f}" for each in cells for value in each), "|", flush=True)


if __name__ == "__main__":
    main()
