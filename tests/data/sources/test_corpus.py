import sys
import tracemalloc

import numpy as np
import pytest
import torch

from firstlight.data import Corpus, PythonDocs
from firstlight.errors import UsageError
from firstlight.tasks.gradient_weights import may_hold

TEXT = bytes(np.random.default_rng(0).integers(1, 128, 1000).tolist())


def write(folder, content, name="text.txt"):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def corpus(folder, content=TEXT, **options):
    return Corpus(
        write(folder, content), **{"length": 16, "context": 5, "val_fraction": 0.2, "test_fraction": 0.1, **options}
    )


def windows(data, split):
    """Return the windows and their next tokens as network and loss get them."""
    data.setup()
    samples = data.dataset(split)
    return data.on_after_batch_transfer((samples.inputs, samples.targets), 0)


def as_bytes(tokens):
    return bytes((tokens - 1).tolist())


@pytest.mark.parametrize("context", [0, 5, 15])
@pytest.mark.parametrize(("split", "part"), [("val", slice(700, 900)), ("test", slice(900, 1000))])
def test_each_byte_of_validation_and_test_is_scored_once(tmp_path, split, part, context):
    inputs, targets = windows(corpus(tmp_path, context=context), split)
    assert inputs.shape == targets.shape == (len(inputs), 16)
    assert as_bytes(targets[targets != 0]) == TEXT[part]


@pytest.mark.parametrize("split", ["val", "test"])
def test_scored_bytes_have_their_context_in_the_window(tmp_path, split):
    inputs, targets = windows(corpus(tmp_path), split)
    position = {"val": 700, "test": 900}[split]
    for window, scored in zip(inputs, targets, strict=True):
        for column in scored.nonzero().flatten().tolist():
            assert column >= 5
            assert as_bytes(window[: column + 1]) == TEXT[position - column - 1 : position]
            position += 1


@pytest.mark.parametrize("stride", [None, 3, 16, 40])
def test_training_windows_start_a_stride_apart_and_end_before_validation(tmp_path, stride):
    inputs, targets = windows(corpus(tmp_path, stride=stride), "train")
    starts = [*range(0, 700 - 16, stride or 16)]
    starts += [700 - 17] * (starts[-1] != 700 - 17)
    assert [as_bytes(row) for row in inputs] == [TEXT[start : start + 16] for start in starts]
    assert [as_bytes(row) for row in targets] == [TEXT[start + 1 : start + 17] for start in starts]


def test_other_text_than_that_of_the_checkpoint_is_scored_whole(tmp_path):
    trained, other = corpus(tmp_path), bytes(reversed(TEXT))
    trained.setup()
    data = Corpus(write(tmp_path, other, "other.txt"), length=16, context=5)
    data.load_state_dict(trained.state_dict())
    samples = data.dataset("test")
    assert as_bytes(samples.targets[samples.targets != 0]) == other[1:]
    assert as_bytes(samples.inputs[0]) == other[:16]


def test_text_shorter_than_a_window_is_padded(tmp_path):
    trained = corpus(tmp_path)
    trained.setup()
    data = Corpus(write(tmp_path, b"abc", "other.txt"), length=16, context=5)
    data.load_state_dict(trained.state_dict())
    samples = data.dataset("test")
    assert samples.inputs.tolist() == [[98, 99, 100] + [0] * 13]
    assert samples.targets.tolist() == [[99, 100] + [0] * 14]


def test_python_docs_are_the_help_topics_sorted_by_name():
    from pydoc_data.topics import topics

    data = PythonDocs(length=256, test_fraction=0.1)
    inputs, targets = windows(data, "test")
    text = b"\n".join(topics[name].encode() for name in sorted(topics))
    assert as_bytes(targets[targets != 0]) == text[len(text) - round(len(text) / 10) :]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in data.load().source
    assert inputs.dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "options", "found"),
    [
        (b"", {}, r"text.txt has 0 bytes: too few for a training window of length=16"),
        (b"a" * 20, {}, r"text.txt has 20 bytes: too few for a training window of length=16"),
        (
            b"a" * 7 + b"\xff" + b"a" * 900,
            {},
            r"not UTF-8: line 1 has the byte 0xff; encoding_errors=bytes",
        ),
        (TEXT, {"length": 1, "context": 0}, "length=1: it must be at least 2"),
        (TEXT, {"context": 16}, r"Corpus with length=16 was given context=16: it must be in \[0, 16\)"),
        (TEXT, {"context": -1}, "context=-1"),
        (TEXT, {"stride": 0}, "stride=0: it must be at least 1"),
    ],
)
def test_unusable_text_is_refused_in_one_line(tmp_path, content, options, found):
    with pytest.raises(UsageError, match=found) as error:
        corpus(tmp_path, content, **options).setup()
    assert "\n" not in str(error.value)


def test_unreadable_file_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*missing.txt: No such file"):
        Corpus(str(tmp_path / "missing.txt")).setup()


def test_encoding_errors_bytes_accepts_text_that_is_not_utf8(tmp_path):
    content = bytes(range(256)) * 4
    _, targets = windows(corpus(tmp_path, content, encoding_errors="bytes"), "test")
    assert as_bytes(targets[targets != 0]) == content[-102:]


@pytest.mark.parametrize("options", [{}, {"stride": 7, "context": 15}, {"length": 100, "context": 0}])
def test_windows_read_from_the_file_equal_those_in_memory(options, tmp_path):
    found = []
    for in_memory in (True, False):
        torch.manual_seed(0)
        data = corpus(tmp_path, in_memory=in_memory, batch_size=4, **options)
        data.setup()
        assert data.dataset("train").in_memory == in_memory
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        batches = [batch for loader in loaders for _ in range(2) for batch in loader]
        found.append(([data.on_after_batch_transfer(batch, 0) for batch in batches], data.fitted))
    assert repr(found[0][1]) == repr(found[1][1])
    assert len(found[0][0]) == len(found[1][0])
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_bytes_that_are_not_utf8_are_found_where_they_are_in_a_large_file(tmp_path, monkeypatch):
    content = ("\u00e4" * 50 + "\n").encode() * 60_000  # Two chunks; one of them ends within a letter.
    assert len(content) > 2**22
    data = corpus(tmp_path, content[:-1] + b"\xff\n", in_memory=False)
    with pytest.raises(UsageError, match=r"text.txt is not UTF-8: line 60000 has the byte 0xff; encoding_errors=bytes"):
        data.setup()
    corpus(tmp_path, content + content, in_memory=False).content()
    with pytest.raises(UsageError, match="is not UTF-8: line 60000"):
        corpus(tmp_path, content[:-2], in_memory=False).content()


def test_preparing_a_text_on_disk_takes_the_memory_of_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("firstlight.data.stored._CHUNK_VALUES", 2**16)
    data = corpus(tmp_path, TEXT * 40_000, in_memory=False, length=256)  # 40 MB
    tracemalloc.start()
    try:
        data.setup()
        next(iter(data.train_dataloader()))
        assert not may_hold(data.train_dataloader(), 0) and may_hold(data.train_dataloader(), TEXT[0] + 1)
        # The UTF-8 decoder makes a text of each part of 4 MiB, and each window has some numbers.
        assert tracemalloc.get_traced_memory()[1] < 25e6
    finally:
        tracemalloc.stop()
