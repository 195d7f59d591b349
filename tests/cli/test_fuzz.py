"""Random files: each is refused in one line, or read exactly."""

import csv
import gzip
import io
import math
import struct

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from firstlight.cli.parser import CLI
from firstlight.data import MNIST, LabelledText, Table
from firstlight.data.cells import MISSING
from firstlight.data.sources.mnist import read_idx
from firstlight.errors import UsageError
from tests.data.helpers import idx, write_idx
from tests.helpers import ROOT

NAMES = ("digits_mlp", "digits_supcon", "diabetes", "wine", "unicode_names", "corpus_lm")
CONFIGS = {name: (ROOT / "configs" / f"{name}.yaml").read_text() for name in NAMES}


def how_often(most=1000):
    return pytest.mark.parametrize("examples", [25, pytest.param(most, marks=pytest.mark.slow)])


ACCEPTED = []
"""The calls that were not refused."""


def refused(use):
    """Return whether `use` was refused in one line; any other exception is a fault."""
    try:
        use()
    except UsageError as error:
        assert str(error) and "\n" not in str(error), str(error)
        return True
    ACCEPTED.append(use)
    return False


@pytest.fixture
def every(figure):
    """Return a function that runs a check on many examples, the same in each run."""

    def tried(case, examples, strategy, check):
        ACCEPTED.clear()
        with figure(f"hypothesis on {case}: no traceback, no wrong acceptance", examples) as count:

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate, Phase.shrink],  # `explain` traces each line, which takes ten times as long.
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def once(example):
                check(example)
                count.reached = min(count.reached + 1, examples)

            once()
        assert len(ACCEPTED) >= examples // 20, "nearly all examples were refused, so the check tested nothing"

    return tried


def nodes(value, path=()):
    """Yield the path of each value in a nest of dictionaries and lists."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(inner, (*path, key))


def at(config, path):
    for key in path:
        config = config[key]
    return config


def values(text):
    """Return the content of a configuration, with NaN as text, because NaN does not equal itself."""
    return yaml.safe_load(text.replace(".nan", "not a number"))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 64) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
# Not {}, which jsonargparse accepts as a torch.Tensor without arguments; a fit refuses it at its start.
NO_NUMBER = st.sampled_from(["abc", {"a": 1}, ["x"], "1e", "--", [[1]]])


@st.composite
def configs(draw):
    """Return the text of a shipped configuration with a fault, and whether it must be refused."""
    text = CONFIGS[draw(st.sampled_from(NAMES))]
    kind = draw(st.sampled_from(["key", "type", "junk", "text"]))
    if kind == "text":
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, len(text) - 1))
            text = text[:place] + draw(st.sampled_from(["", *"\t\n :-[]{},#&*!|>'\"%@`aé\0"])) + text[place + 1 :]
        return text, False
    config = yaml.safe_load(text)
    paths = list(nodes(config))
    if kind == "key":
        path = draw(st.sampled_from([path for path in paths if isinstance(path[-1], str)]))
        parent, place = at(config, path[:-1]), draw(st.integers(0, len(path[-1])))
        parent[path[-1][:place] + draw(st.sampled_from("abxyz_9-")) + path[-1][place:]] = parent.pop(path[-1])
        return yaml.safe_dump(config), True
    if kind == "type":
        numbers = [path for path in paths if type(at(config, path)) in (int, float)]
        path = draw(st.sampled_from(numbers))
        at(config, path[:-1])[path[-1]] = draw(NO_NUMBER)
        return yaml.safe_dump(config), True
    path = draw(st.sampled_from(paths))
    at(config, path[:-1])[path[-1]] = draw(JUNK)
    return yaml.safe_dump(config), False


@how_often(400)  # An example takes a sixth of a second: each is parsed, and an accepted one is parsed again.
def test_config_is_built_exactly_or_refused(examples, every, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"

    def check(example):
        text, must_be_refused = example
        path.write_text(text, encoding="utf-8")
        made = []
        if refused(lambda: made.append(CLI("fit", ["--config", str(path)]))):
            return
        assert not must_be_refused, text
        again = tmp_path / "again.yaml"
        again.write_text(made[0].experiment.config)
        second = CLI("fit", ["--config", str(again), "--experiment=config"]).experiment.config
        assert values(second) == values(again.read_text())

    every("configurations", examples, configs(), check)


CELLS = st.sampled_from(
    ["1", "-2.5", " 3 ", "1e3", "1e400", "1e-400", "nan", "NaN", "NA", "", "inf", "-inf", "1_000", "0x10", "\u0661",
     "yes", "no", "ü", "a,b", 'say "so"', "two\nlines", "\0", " ", "None", "1,5", "1;5", "🙂", "\u2028"]
)  # fmt: skip
GOOD = st.sampled_from(["1", "-2.5", "3.25", "1e3", "0.001"])


@st.composite
def tables(draw):
    """Return the bytes of a mostly correct CSV file, and how missing values are handled."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerow(draw(st.sampled_from([["a", "b", "kind"]] * 9 + [["a", "a", "kind"], ["a", "", "kind"], ["a"]])))
    rows = draw(st.sampled_from([*range(12, 41, 4), 0, 1, 3, 7]))
    bad = draw(st.sampled_from([0] * 5 + [1, 5]))
    for row in range(rows):
        cells = [draw(CELLS) if row < bad else draw(GOOD) for _ in "ab"]
        writer.writerow([*cells, draw(CELLS) if row == 1 and bad > 1 else ("yes", "no")[row % 2]])
    content = output.getvalue().encode()
    for _ in range(draw(st.sampled_from([0] * 5 + [1, 3]))):
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(max_size=2)) + content[place + draw(st.integers(0, 2)) :]
    return draw(st.sampled_from([content] * 9 + [draw(st.binary(max_size=64))])), draw(
        st.sampled_from(["refuse", "drop", "mean"])
    )


def cells_of(content):
    """Return the rows of a CSV file by name, as the standard library reads them."""
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    header, *rows = [row for row in reader if row]
    return [dict(zip(header, row, strict=True)) for row in rows]


def check_splits(data, content):
    """Compare accepted data with the file; return its rows in the order of the training samples."""
    rows = cells_of(content)
    found = np.concatenate([data.rows(split) for split in data.indices])
    assert len(found) + data.dropped == len(rows) and len(set(found)) == len(found)
    assert data.dropped == 0 or data.missing == "drop"
    for split in data.indices:
        inputs, targets = data.tensors(split)
        assert len(inputs) == len(targets) == len(data.rows(split)) > 0
        assert inputs.isfinite().all() and targets.isfinite().all()
        assert [data.class_names[target] for target in targets] == [rows[row]["kind"] for row in data.rows(split)]
    return [rows[row] for row in data.rows("train")]


@how_often()
def test_table_is_read_row_by_row_or_refused(examples, every, tmp_path):
    path = tmp_path / "table.csv"

    def check(example):
        content, missing = example
        path.write_bytes(content)
        data = Table(str(path), "kind", "multiclass", missing=missing)
        if refused(data.setup):
            return
        rows = check_splits(data, content)
        mean, std = data.fitted["encoder"]["mean"], data.fitted["encoder"]["std"]
        for row, values in zip(rows, (data.tensors("train")[0].double() * std + mean).tolist(), strict=True):
            for name, value in zip(data._columns, values, strict=True):
                if missing != "mean" or row[name].strip() not in MISSING:
                    assert "_" not in row[name]
                    assert value == pytest.approx(float(row[name]), rel=1e-4, abs=1e-4 * float(std.max()))

    every("CSV bytes of tables", examples, tables(), check)


@how_often()
def test_labelled_text_is_read_byte_by_byte_or_refused(examples, every, tmp_path):
    path = tmp_path / "texts.csv"

    def check(example):
        content, missing = example
        path.write_bytes(content)
        data = LabelledText(str(path), "a", "kind", missing=missing)
        if refused(data.setup):
            return
        rows = check_splits(data, content)
        for row, tokens in zip(rows, data.tensors("train")[0], strict=True):
            assert bytes((tokens[tokens > 0] - 1).tolist()) == row["a"].encode()[:256]

    every("CSV bytes of texts", examples, tables(), check)


@st.composite
def idx_files(draw):
    """Return the bytes of a mostly correct IDX file of images or labels."""
    shape = draw(
        st.sampled_from([(4, 28, 28), (4,)] * 2 + [(4, 28), (0, 28, 28), (4, 27, 28), (4, 0, 28), (3, 28, 28), (0,)])
    )
    values = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape) % draw(st.sampled_from([10, 11, 255]))
    content = idx(values.astype(np.uint8))
    kind = draw(st.sampled_from(["whole", "header", "bytes", "cut", "longer", "anything"]))
    if kind == "header":
        place = draw(st.integers(0, 15))
        content = content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :]
    elif kind == "bytes":
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + draw(st.integers(0, 4)) :]
    elif kind == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif kind == "longer":
        content += draw(st.binary(min_size=1, max_size=9))
    elif kind == "anything":
        content = draw(st.binary(max_size=40))
    if draw(st.booleans()):
        packed = gzip.compress(content)
        return packed[: draw(st.integers(0, len(packed)))] if draw(st.booleans()) else packed, ".gz"
    return content, ""


@how_often()
def test_idx_file_has_the_shape_in_its_header_or_is_refused(examples, every, tmp_path):
    root = write_idx(tmp_path, compressed=False, test=4)
    kept = {name: (tmp_path / name).read_bytes() for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}

    def check(example):
        (content, suffix), name = example
        path = tmp_path / f"{name}{suffix}"
        (tmp_path / name).unlink()
        path.write_bytes(content)
        try:
            data, axes = MNIST(root), int(name[-7])
            if not refused(lambda: read_idx(path, axes)):
                raw = gzip.decompress(content) if suffix else content
                shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
                found = read_idx(path, axes)
                assert found.shape == shape and found.tobytes() == raw[4 + 4 * axes :]
            if not refused(data.setup):
                assert data.tensors("test")[0].shape == (4, 1, 28, 28)
                assert set(data.tensors("test")[1].tolist()) <= set(range(10))
        finally:
            path.unlink()
            (tmp_path / name).write_bytes(kept[name])

    every("IDX bytes", examples, st.tuples(idx_files(), st.sampled_from(sorted(kept))), check)


def test_configs_without_a_fault_are_accepted(tmp_path):
    for text in CONFIGS.values():
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert not refused(lambda: CLI("fit", ["--config", str(path)]))  # noqa: B023
