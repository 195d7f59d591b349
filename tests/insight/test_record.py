"""What a run recorded is read back from its directory."""

import json
import math

import numpy as np

from firstlight.insight.record import Record, SeriesReader


def test_a_record_is_read_from_a_run_directory(tmp_path):
    rows = ["step,name,value", "0,lr,0.5", "49,val/loss,nan", "99,val/loss,inf", "99,lr,0.25", "99,l"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {}, "error": "failed", "facts": {"epochs": 3}}))
    record = Record.read(tmp_path)
    assert record.facts == {"epochs": 3}
    assert record.series.keys() == {"lr", "val/loss"}
    assert record.series["lr"].steps.tolist() == [0, 99] and record.series["lr"].steps.dtype == np.int64
    assert record.series["lr"].values.tolist() == [0.5, 0.25] and record.series["lr"].values.dtype == np.float64
    assert math.isnan(record.series["val/loss"].values[0]) and record.series["val/loss"].values[1] == math.inf


def test_the_record_of_a_missing_or_damaged_run_is_empty(tmp_path):
    assert Record.read(tmp_path / "none") == Record({}, {})
    (tmp_path / "metrics.csv").write_bytes(b"\xff\0\n1,a\n1e3,a,b\nx,lr,1\n")
    for text in ("[1]", "{", '{"facts": 3}', "[" * 100_000):
        (tmp_path / "results.json").write_text(text)
        assert Record.read(tmp_path) == Record({}, {})


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    path = tmp_path / "metrics.csv"
    reader = SeriesReader(path)
    assert reader.read() == {}
    path.write_text("step,name,value\n9,lr,1\n19,lr,2\n29,lr,3\n9,x,7\n")
    assert reader.read()["lr"].values.tolist() == [1, 2, 3]
    with path.open("a") as file:
        file.write("19,lr,4\n29,lr,5\n39,l")
    found = reader.read()
    assert found["lr"].steps.tolist() == [9, 19, 29] and found["lr"].values.tolist() == [1, 4, 5]
    assert found["x"].values.tolist() == [7]
    with path.open("a") as file:
        file.write("r,6\n")
    assert reader.read()["lr"].values.tolist() == [1, 4, 5, 6]
    path.write_text("step,name,value\n0,lr,8\n")
    assert reader.read()["lr"].values.tolist() == [8]


def test_layers_have_the_order_of_the_file(tmp_path):
    (tmp_path / "metrics.csv").write_text("".join(f"9,gradient/norm/{name},1\n" for name in ("stem", "a.1", "a.0")))
    assert list(Record.read(tmp_path).layers("gradient/norm")) == ["stem", "a.1", "a.0"]
