import logging
import sys
import unicodedata

import numpy as np
import pytest
import torch

from firstlight.data import Corpus, LabelledText, PythonDocs, UnicodeNames
from firstlight.errors import UsageError

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
    """Windows and what follows each, as the network and the loss take them."""
    data.setup()
    samples = data.dataset(split)
    return data.on_after_batch_transfer((samples.inputs, samples.targets), 0)


def as_bytes(tokens):
    return bytes((tokens - 1).tolist())


@pytest.mark.parametrize("context", [0, 5, 15])
@pytest.mark.parametrize(("split", "part"), [("val", slice(700, 900)), ("test", slice(900, 1000))])
def test_each_byte_of_a_held_out_split_is_scored_once(tmp_path, split, part, context):
    inputs, targets = windows(corpus(tmp_path, context=context), split)
    assert inputs.shape == targets.shape == (len(inputs), 16)
    assert as_bytes(targets[targets != 0]) == TEXT[part]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_scored_byte_has_the_text_before_it_in_its_window(tmp_path, split):
    inputs, targets = windows(corpus(tmp_path), split)
    position = {"val": 700, "test": 900}[split]
    for window, scored in zip(inputs, targets, strict=True):
        for column in scored.nonzero().flatten().tolist():
            assert column >= 5
            assert as_bytes(window[: column + 1]) == TEXT[position - column - 1 : position]
            position += 1


@pytest.mark.parametrize("stride", [None, 3, 16, 40])
def test_training_windows_start_a_stride_apart_and_end_before_what_is_held_out(tmp_path, stride):
    inputs, targets = windows(corpus(tmp_path, stride=stride), "train")
    starts = [*range(0, 700 - 16, stride or 16)]
    starts += [700 - 17] * (starts[-1] != 700 - 17)
    assert [as_bytes(row) for row in inputs] == [TEXT[start : start + 16] for start in starts]
    assert [as_bytes(row) for row in targets] == [TEXT[start + 1 : start + 17] for start in starts]


def test_a_text_that_a_checkpoint_was_not_trained_on_is_scored_as_a_whole(tmp_path):
    trained, other = corpus(tmp_path), bytes(reversed(TEXT))
    trained.setup()
    data = Corpus(write(tmp_path, other, "other.txt"), length=16, context=5)
    data.load_state_dict(trained.state_dict())
    samples = data.dataset("test")
    assert as_bytes(samples.targets[samples.targets != 0]) == other[1:]
    assert as_bytes(samples.inputs[0]) == other[:16]


def test_a_text_shorter_than_a_window_is_padded(tmp_path):
    trained = corpus(tmp_path)
    trained.setup()
    data = Corpus(write(tmp_path, b"abc", "other.txt"), length=16, context=5)
    data.load_state_dict(trained.state_dict())
    samples = data.dataset("test")
    assert samples.inputs.tolist() == [[98, 99, 100] + [0] * 13]
    assert samples.targets.tolist() == [[99, 100] + [0] * 14]


def test_python_docs_are_the_topics_of_help_in_the_order_of_their_names():
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
        (b"", {}, r"text.txt has 0 bytes: too few for windows of 16"),
        (b"a" * 20, {}, r"text.txt has 20 bytes: too few for windows of 16"),
        (
            b"a" * 7 + b"\xff" + b"a" * 900,
            {},
            r"not UTF-8: line 1 has the byte 0xff; encoding_errors=bytes",
        ),
        (TEXT, {"length": 1, "context": 0}, "length=1"),
        (TEXT, {"context": 16}, "context=16 and length=16"),
        (TEXT, {"context": -1}, "context=-1"),
        (TEXT, {"stride": 0}, "stride=0"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, options, found):
    with pytest.raises(UsageError, match=found) as error:
        corpus(tmp_path, content, **options).setup()
    assert "\n" not in str(error.value)


def test_a_text_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*missing.txt: No such file"):
        Corpus(str(tmp_path / "missing.txt")).setup()


def test_a_text_that_is_not_utf8_is_taken_as_it_is_when_that_is_asked_for(tmp_path):
    content = bytes(range(256)) * 4
    _, targets = windows(corpus(tmp_path, content, encoding_errors="bytes"), "test")
    assert as_bytes(targets[targets != 0]) == content[-102:]


ROWS = [("Grüße", "de"), ("hello", "en"), ("good day, all", "en"), ("tag", "de")] * 5


def table(folder, rows=ROWS, header="text,label", name="texts.csv"):
    lines = [header, *(",".join(f'"{value}"' for value in row) for row in rows)]
    return write(folder, "\n".join(lines).encode(), name)


def test_texts_are_their_bytes_and_labels_their_place_in_the_alphabet(tmp_path):
    data = LabelledText(table(tmp_path))
    found = set()
    data.setup()
    for split in ("train", "val", "test"):
        samples = data.dataset(split)
        for tokens, target in zip(samples.inputs, samples.targets, strict=True):
            found.add((as_bytes(tokens[tokens != 0]).decode(), data.class_names[target]))
    assert data.class_names == ["de", "en"]
    assert found == set(ROWS)


def test_a_batch_is_as_long_as_its_longest_text(tmp_path):
    data = LabelledText(table(tmp_path), batch_size=2)
    data.setup()
    for tokens, _ in data.train_dataloader():
        lengths = (tokens != 0).sum(1)
        assert tokens.shape[1] == lengths.max()
        for row, length in zip(tokens, lengths, strict=True):
            assert (row[:length] != 0).all() and (row[length:] == 0).all()


def test_a_long_text_is_cut_and_that_is_said(tmp_path, caplog):
    data = LabelledText(table(tmp_path), max_length=6)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert "10 of 20 texts are longer than max_length=6 bytes, and were cut" in caplog.text
    assert {as_bytes(row[row != 0]) for row in data.dataset("train").inputs} <= {
        b"Gr\xc3\xbc\xc3\x9f",
        b"hello",
        b"good d",
        b"tag",
    }


@pytest.mark.parametrize(
    ("header", "rows", "found"),
    [
        ("text,label", [*ROWS, ("hm", "")], r"texts.csv: 1 row with .*: line 22 target \(empty\); missing=drop"),
        ("text,label", [("", "de"), *ROWS], "texts.csv: 1 row with .*: line 2 without a token; missing=drop"),
        ("tekst,label", ROWS, "texts.csv: there is no column text among tekst, label; did you mean tekst"),
        ("text,lable", ROWS, "texts.csv: there is no column label among text, lable; did you mean lable"),
        ("text;label", [("a;b",)] * 20, "texts.csv: its values are separated by ';', in a CSV file .* by commas"),
        ("text,label", [*ROWS, ("hm",)], "texts.csv: line 22 has 1 value,"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_by_row_and_column(tmp_path, header, rows, found):
    with pytest.raises(UsageError, match=found) as error:
        LabelledText(table(tmp_path, rows, header)).setup()
    assert "\n" not in str(error.value)


def test_rows_without_a_text_or_a_label_are_left_out_and_counted(tmp_path):
    data = LabelledText(table(tmp_path, [("", "de"), *ROWS, ("hm", ""), ("", "")]), missing="drop")
    data.setup()
    assert data.dropped == 3
    kept = sorted(row for split in ("train", "val", "test") for row in data.rows(split))
    assert kept == list(range(1, 21))
    assert data.class_names == ["de", "en"]


def test_texts_without_labels_are_predicted_for_and_others_keep_the_classes_of_the_checkpoint(tmp_path):
    trained = LabelledText(table(tmp_path))
    trained.setup()
    data = LabelledText(table(tmp_path, [("ciao",), ("hey",)], "text", "new.csv"))
    data.load_state_dict(trained.state_dict())
    ((tokens, _),) = data.predict_dataloader()
    assert [as_bytes(row[row != 0]) for row in tokens] == [b"ciao", b"hey"]
    only = LabelledText(table(tmp_path, [("hey", "en")], name="only.csv"))
    only.load_state_dict(trained.state_dict())
    assert only.dataset("test").targets.tolist() == [1]


def test_a_label_that_the_checkpoint_has_not_learned_is_refused(tmp_path):
    trained = LabelledText(table(tmp_path))
    trained.setup()
    data = LabelledText(table(tmp_path, [("hey", "en"), ("ciao", "it")], name="new.csv"))
    data.load_state_dict(trained.state_dict())
    with pytest.raises(UsageError, match=r"new.csv: line 3 has the label 'it', but .* the classes de, en"):
        data.dataset("test")


def test_a_maximal_length_below_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="max_length=0"):
        LabelledText("texts.csv", max_length=0)


def test_unicode_names_have_the_category_of_their_character():
    data = UnicodeNames()
    data.setup()
    samples = data.dataset("test")
    assert len(samples) > 1000
    for tokens, target in zip(samples.inputs[:200], samples.targets[:200], strict=True):
        character = unicodedata.lookup(as_bytes(tokens[tokens != 0]).decode())
        assert unicodedata.category(character) == data.class_names[target]


def test_names_that_a_rule_makes_are_left_out():
    names = {as_bytes(row[row != 0]).decode() for row in torch.from_numpy(UnicodeNames().load().inputs)}
    assert "LATIN SMALL LETTER A" in names
    assert not [name for name in names if name.startswith(("HANGUL SYLLABLE", "CJK UNIFIED IDEOGRAPH", "TANGUT IDEO"))]
