import signal

import pytest
import torch

from firstlight.data.loader import Loader, ResumableDistributedSampler
from firstlight.data.samples import TensorBatches
from firstlight.errors import UsageError


def orders(samples, batch_size, processes, epoch=0, shuffle=True):
    made = [ResumableDistributedSampler(samples, batch_size, shuffle, 0, rank, processes) for rank in range(processes)]
    for each in made:
        each.set_epoch(epoch)
    return [[batch.tolist() for batch in each] for each in made]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("samples", [7, 64, 65, 129, 130])
def test_every_sample_is_taken_exactly_once_in_equally_many_batches(samples, processes):
    found = orders(samples, 32, processes)
    assert sorted(index for own in found for batch in own for index in batch) == list(range(samples))
    assert len({len(own) for own in found}) == 1
    assert all(batch for own in found for batch in own)
    assert [len(own) for own in found] == [
        len(ResumableDistributedSampler(samples, 32, True, 0, rank, processes)) for rank in range(processes)
    ]


def test_a_batch_of_two_processes_holds_the_samples_of_one_twice_as_large():
    (whole,), halves = orders(100, 20, 1), orders(100, 10, 2)
    for together, one, other in zip(whole, *halves, strict=True):
        assert sorted(together) == sorted(one + other)


def test_with_fewer_samples_than_processes_some_have_none():
    assert [sum(map(len, own)) for own in orders(2, 8, 3, shuffle=False)] == [1, 1, 0]


def test_orders_differ_between_epochs_and_seeds_and_repeat_with_both():
    def first(seed, epoch):
        order = ResumableDistributedSampler(100, 100, True, seed, 0, 1)
        order.set_epoch(epoch)
        return next(iter(order))

    found = [tuple(first(seed, epoch)) for seed in (0, 1, 2**31 + 1) for epoch in (0, 1, 2)]
    assert len(set(found)) == 9
    assert tuple(first(1, 2)) == found[5]


def loader(**options):
    inputs = torch.arange(50.0)[:, None]
    order = ResumableDistributedSampler(
        **{"samples": 50, "batch_size": 8, "shuffle": True, "seed": 3, "rank": 0, "world_size": 1, **options}
    )
    return Loader(TensorBatches(inputs, inputs), order, 0)


@pytest.mark.parametrize("batches_consumed", range(8))
def test_a_loader_goes_on_after_the_batch_that_was_taken_last(taken):
    whole = [batch[0] for batch in loader()]
    stopped, going = loader(), loader(seed=9)
    batches = iter(stopped)
    for _ in range(taken):
        next(batches, None)
    going.load_state_dict(stopped.state_dict())
    left = whole[taken:]
    assert [batch[0].tolist() for batch in going] == [batch.tolist() for batch in left]
    following = loader()
    following.order.set_epoch(1)
    assert [batch[0].tolist() for batch in going] == [batch[0].tolist() for batch in following]


def test_beginning_an_epoch_draws_no_number_from_the_global_generator():
    state = torch.get_rng_state()
    list(loader())
    assert torch.equal(state, torch.get_rng_state())


def test_another_batch_size_is_refused_by_name():
    with pytest.raises(UsageError, match=r"cannot go on exactly: batch_size was 8 and is 16"):
        loader(batch_size=16).load_state_dict(loader().state_dict())


class Masks:
    """Gives as a batch the signals that its process keeps back."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_no_signal_ends_a_worker_from_its_first_moment_on():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (masked,) = Loader(Masks(), ResumableDistributedSampler(4, 4, False, 0, 0, 1), num_workers=1)
    assert {signal.SIGINT, signal.SIGTERM} <= set(masked)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
