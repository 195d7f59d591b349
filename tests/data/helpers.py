import numpy as np

from firstlight.data import DataModule, Samples


class Arrays(DataModule):
    """Any arrays as a data module."""

    def __init__(self, inputs, targets, class_names=(), options=None, **fields):
        super().__init__(**(options or {}))
        targets = None if targets is None else np.asarray(targets)
        self.samples = Samples(np.asarray(inputs), targets, list(class_names), **fields)

    def load(self):
        return self.samples


def ready(module):
    module.setup()
    return module


def numbers(rows=40, columns=4, **options):
    generator = np.random.default_rng(0)
    return Arrays(generator.normal(3, 5, (rows, columns)), np.arange(rows) % 2, ["no", "yes"], options)


def images(rows=40, **options):
    generator = np.random.default_rng(0)
    shape = (rows, 2, 6, 6)
    return Arrays(generator.integers(0, 256, shape, np.uint8), np.arange(rows) % 2, ["no", "yes"], options)


def in_batches(module, loader):
    """Return inputs and targets of a loader as they come to a network."""
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]
