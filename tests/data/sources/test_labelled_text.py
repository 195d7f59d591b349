import csv
import logging
import unicodedata

import numpy as np
import pytest
import torch

from firstlight.data import LabelledText, UnicodeNames
from firstlight.errors import UsageError


def write(folder, content, name="text.txt"):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def as_bytes(tokens):
    return bytes((tokens - 1).tolist())


ROWS = [("Grüße", "de"), ("hello", "en"), ("good day, all", "en"), ("tag", "de")] * 5


def table(folder, rows=ROWS, header="text,label", name="texts.csv"):
    lines = [header, *(",".join(f'"{value}"' for value in row) for row in rows)]
    return write(folder, "\n".join(lines).encode(), name)


def test_tokens_are_bytes_and_targets_are_indices_of_the_sorted_labels(tmp_path):
    data = LabelledText(table(tmp_path))
    found = set()
    data.setup()
    for split in ("train", "val", "test"):
        samples = data.dataset(split)
        for tokens, target in zip(samples.inputs, samples.targets, strict=True):
            found.add((as_bytes(tokens[tokens != 0]).decode(), data.class_names[target]))
    assert data.class_names == ["de", "en"]
    assert found == set(ROWS)


def test_batch_is_as_long_as_its_longest_text(tmp_path):
    data = LabelledText(table(tmp_path), batch_size=2)
    data.setup()
    for tokens, _ in data.train_dataloader():
        lengths = (tokens != 0).sum(1)
        assert tokens.shape[1] == lengths.max()
        for row, length in zip(tokens, lengths, strict=True):
            assert (row[:length] != 0).all() and (row[length:] == 0).all()


def test_long_texts_are_cut_with_a_warning(tmp_path, caplog):
    data = LabelledText(table(tmp_path), max_length=6)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert "10 of 20 texts were cut, because they are longer than max_length=6 bytes" in caplog.text
    assert {as_bytes(row[row != 0]) for row in data.dataset("train").inputs} <= {
        b"Gr\xc3\xbc\xc3\x9f",
        b"hello",
        b"good d",
        b"tag",
    }


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 4, 68], 68),
        ([1] * 99 + [256], 256),
        ([1] * 98 + [500, 600], 500),  # 99 of 100 texts have at most 500 bytes.
        ([1] * 99 + [600], 256),
        ([10_000] * 10, 4096),
        ([1000] * 10, 1000),
    ],
)
def test_max_length_follows_from_the_data(tmp_path, caplog, lengths, expected):
    data = LabelledText(table(tmp_path, [("x" * length, "ab"[row % 2]) for row, length in enumerate(lengths)]))
    assert data.load().inputs.shape == (len(lengths), expected)
    longer = sum(length > expected for length in lengths)
    told = f"{longer} of {len(lengths)} texts were cut, because they are longer than" if longer else "the longest of"
    assert told in caplog.text and f"max_length={expected} bytes" in caplog.text and len(caplog.messages) == 1


@pytest.mark.parametrize("given", [None, 4])
@pytest.mark.parametrize("is_set_up", [False, True])
def test_checkpoint_cuts_new_texts_as_its_training_texts(tmp_path, caplog, given, is_set_up):
    trained = LabelledText(table(tmp_path), max_length=given)
    trained.setup()
    expected = given or len("good day, all")
    assert trained.state_dict()["max_length"] == expected
    for rows in ([("x" * 99, "de")], ROWS):
        data = LabelledText(table(tmp_path, rows, name="new.csv" if rows is not ROWS else "texts.csv"))
        if is_set_up and rows is ROWS:
            data.setup()
        data.load_state_dict(trained.state_dict())
        caplog.clear()
        assert data.dataset("test").inputs.count_nonzero(1).max() <= expected
        assert data.state_dict()["max_length"] == expected
        if rows is not ROWS:
            assert f"1 of 1 texts were cut, because they are longer than max_length={expected}" in caplog.text


@pytest.mark.parametrize(
    ("header", "rows", "found"),
    [
        (
            "text,label",
            [*ROWS, ("hm", "")],
            r"texts.csv: 1 row with .*: line 22 target \(empty\); missing_targets=drop",
        ),
        ("text,label", [("", "de"), *ROWS], "texts.csv: 1 row with .*: line 2 without a token; missing=drop"),
        ("tekst,label", ROWS, "texts.csv has no column text; available: tekst, label; did you mean tekst"),
        ("text,lable", ROWS, "texts.csv has no column label; available: text, lable; did you mean lable"),
        ("text;label", [("a;b",)] * 20, "texts.csv: line 2 has"),
        ("text,label", [*ROWS, ("hm",)], "texts.csv: line 22 has 1 value,"),
    ],
)
def test_unusable_texts_are_refused_by_row_and_column(tmp_path, header, rows, found):
    with pytest.raises(UsageError, match=found) as error:
        LabelledText(table(tmp_path, rows, header)).setup()
    assert "\n" not in str(error.value)


def test_missing_drop_drops_and_counts_rows_without_text_or_label(tmp_path):
    data = LabelledText(
        table(tmp_path, [("", "de"), *ROWS, ("hm", ""), ("", "")]), missing="drop", missing_targets="drop"
    )
    data.setup()
    assert data.dropped == 3
    kept = sorted(row for split in ("train", "val", "test") for row in data.rows(split))
    assert kept == list(range(1, 21))
    assert data.class_names == ["de", "en"]


def test_new_texts_without_labels_are_predicted_and_labels_keep_their_indices(tmp_path):
    trained = LabelledText(table(tmp_path))
    trained.setup()
    data = LabelledText(table(tmp_path, [("ciao",), ("hey",)], "text", "new.csv"))
    data.load_state_dict(trained.state_dict())
    ((tokens, _),) = data.predict_dataloader()
    assert [as_bytes(row[row != 0]) for row in tokens] == [b"ciao", b"hey"]
    only = LabelledText(table(tmp_path, [("hey", "en")], name="only.csv"))
    only.load_state_dict(trained.state_dict())
    assert only.dataset("test").targets.tolist() == [1]


def test_labels_with_other_spaces_are_one_class_and_missing_labels_none(tmp_path):
    rows = [("hello", label) for label in ["en", " en", "en ", "de", "NA"] * 10]
    data = LabelledText(table(tmp_path, rows), missing_targets="drop")
    data.setup()
    assert (data.class_names, data.dropped) == (["de", "en"], 10)
    assert data.dataset("train").targets.tolist() == [int(row % 5 < 3) for row in data.rows("train")]


def test_label_unknown_to_the_checkpoint_is_refused(tmp_path):
    trained = LabelledText(table(tmp_path))
    trained.setup()
    data = LabelledText(table(tmp_path, [("hey", "en"), ("ciao", "it")], name="new.csv"))
    data.load_state_dict(trained.state_dict())
    with pytest.raises(UsageError, match=r"new.csv: line 3 column label is it, but .* the classes de, en"):
        data.dataset("test")


def test_max_length_below_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="LabelledText was given max_length=0: it must be at least 1"):
        LabelledText("texts.csv", max_length=0)


def test_text_that_is_its_own_label_is_refused():
    with pytest.raises(UsageError, match="given text=label and label=label: they must be two columns"):
        LabelledText("texts.csv", text="label")


def test_unicode_names_have_the_category_of_their_character():
    data = UnicodeNames()
    data.setup()
    samples = data.dataset("test")
    assert len(samples) > 1000
    for tokens, target in zip(samples.inputs[:200], samples.targets[:200], strict=True):
        character = unicodedata.lookup(as_bytes(tokens[tokens != 0]).decode())
        assert unicodedata.category(character) == data.class_names[target]


def test_categories_with_fewer_than_100_names_are_left_out():
    samples = UnicodeNames().load()
    assert np.bincount(samples.targets).min() >= 100
    assert "Sk" in samples.class_names  # 125 names
    assert "Sc" not in samples.class_names  # 63 names


def test_names_that_follow_from_the_code_point_are_left_out():
    names = {as_bytes(row[row != 0]).decode() for row in torch.from_numpy(UnicodeNames().load().inputs)}
    assert "LATIN SMALL LETTER A" in names
    assert not [name for name in names if name.startswith(("HANGUL SYLLABLE", "CJK UNIFIED IDEOGRAPH", "TANGUT IDEO"))]


def test_text_may_be_longer_than_the_default_limit_of_the_csv_module(tmp_path):
    limit = csv.field_size_limit()
    rows = [("x" * 200_000 if row == 3 else "hi", "ab"[row % 2]) for row in range(60)]
    data = LabelledText(table(tmp_path, rows), max_length=8)
    data.setup()
    assert data.load().inputs[3].tolist() == [ord("x") + 1] * 8
    assert csv.field_size_limit() == limit
