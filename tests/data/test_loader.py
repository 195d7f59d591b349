import signal

import pytest
import torch
from lightning.pytorch import Trainer

from firstlight.data import Digits
from firstlight.data.loader import Loader, ResumableDistributedSampler, keep_on_device, make_loader
from firstlight.data.samples import TensorBatches
from firstlight.errors import UsageError


def batches_of_each_process(samples, batch_size, processes, shuffle=True):
    """Return for each process the indices of its batches."""
    samplers = [
        ResumableDistributedSampler(samples, batch_size, shuffle, 0, rank, processes) for rank in range(processes)
    ]
    return [[batch.tolist() for batch in sampler] for sampler in samplers]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("samples", [7, 64, 65, 129, 130])
def test_each_sample_is_taken_once_and_processes_have_equally_many_batches(samples, processes):
    found = batches_of_each_process(samples, 32, processes)
    assert sorted(index for own in found for batch in own for index in batch) == list(range(samples))
    assert len({len(own) for own in found}) == 1
    assert all(batch for own in found for batch in own)
    assert [len(own) for own in found] == [
        len(ResumableDistributedSampler(samples, 32, True, 0, rank, processes)) for rank in range(processes)
    ]


def test_global_batch_holds_the_same_samples_with_one_and_two_processes():
    (whole,), halves = batches_of_each_process(100, 20, 1), batches_of_each_process(100, 10, 2)
    for together, one, other in zip(whole, *halves, strict=True):
        assert sorted(together) == sorted(one + other)


def test_some_processes_have_no_batch_with_fewer_samples_than_processes():
    assert [sum(map(len, own)) for own in batches_of_each_process(2, 8, 3, shuffle=False)] == [1, 1, 0]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("samples", range(40, 60))
def test_no_process_gets_a_single_sample_if_two_are_needed(samples, processes):
    samplers = [
        ResumableDistributedSampler(samples, 4, True, 0, rank, processes, fewest=2) for rank in range(processes)
    ]
    found = [[batch.tolist() for batch in sampler] for sampler in samplers]
    assert sorted(index for own in found for batch in own for index in batch) == list(range(samples))
    assert min(len(batch) for own in found for batch in own) == samplers[0].smallest >= 2


def test_order_depends_on_seed_and_epoch_and_repeats_with_both():
    def first(seed, epoch):
        sampler = ResumableDistributedSampler(100, 100, True, seed, 0, 1)
        sampler.set_epoch(epoch)
        return next(iter(sampler))

    found = [tuple(first(seed, epoch)) for seed in (0, 1, 2**31 + 1) for epoch in (0, 1, 2)]
    assert len(set(found)) == 9
    assert tuple(first(1, 2)) == found[5]


def loader(**options):
    inputs = torch.arange(50.0)[:, None]
    sampler = ResumableDistributedSampler(
        **{"samples": 50, "batch_size": 8, "shuffle": True, "seed": 3, "rank": 0, "world_size": 1, **options}
    )
    return Loader(TensorBatches(inputs, inputs), sampler, 0)


@pytest.mark.parametrize("batches_consumed", range(8))
def test_loader_resumes_after_the_last_batch_that_was_used(batches_consumed):
    whole = [batch[0].tolist() for batch in loader()]
    stopped, resumed = loader(), loader(seed=9)
    batches = iter(stopped)
    for _ in range(batches_consumed):
        next(batches, None)
    resumed.load_state_dict(stopped.state_dict())
    assert [batch[0].tolist() for batch in resumed] == whole[batches_consumed:]
    next_epoch = loader()
    next_epoch.sampler.set_epoch(1)
    assert [batch[0].tolist() for batch in resumed] == [batch[0].tolist() for batch in next_epoch]


def test_start_of_an_epoch_does_not_advance_the_global_generator():
    state = torch.get_rng_state()
    list(loader())
    assert torch.equal(state, torch.get_rng_state())


def test_resuming_with_another_batch_size_is_refused():
    with pytest.raises(
        UsageError, match=r"cannot resume exactly: batch_size was 8 and is 16; --allow_inexact restarts"
    ):
        loader(batch_size=16).load_state_dict(loader().state_dict())


class BlockedSignals:
    """A dataset whose batches are the signals that its process blocks."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_workers_start_with_stop_signals_blocked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (blocked,) = Loader(BlockedSignals(), ResumableDistributedSampler(4, 4, False, 0, 0, 1), num_workers=1)
    assert {signal.SIGINT, signal.SIGTERM} <= set(blocked)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_samples_are_kept_on_a_gpu_if_they_need_at_most_an_eighth_of_its_free_memory(monkeypatch):
    samples, gpu = TensorBatches(torch.zeros(10, 2), torch.zeros(10)), torch.device("cuda", 0)
    for free, kept in ((8 * 120, True), (8 * 120 - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert keep_on_device(samples, gpu, 0, None) == kept
        assert not keep_on_device(samples, gpu, 2, None)


@pytest.mark.parametrize(("options", "kept"), [({}, False), ({"on_device": True}, True), ({"on_device": False}, False)])
def test_on_device_keeps_the_samples_on_the_device(monkeypatch, options, kept):
    # "meta" stands in for another device; tests/test_gpu.py uses a real one.
    device = torch.device("meta")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(trainer.strategy), "root_device", device)
    data = Digits(batch_size=100, **options)
    data.setup()
    made = make_loader(data.dataset("train"), trainer, 100, True, 0, data.on_device)
    inputs, targets = next(iter(made))
    assert (inputs.device == device) == (targets.device == device) == (made.sampler.device == device) == kept
    assert len(made) == 13 and inputs.dtype == torch.uint8
