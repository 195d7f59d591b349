"""The page docs/serve.md: its code serves a run."""

import csv
import re
import runpy
import subprocess
import sys
from contextlib import chdir

import pytest

import firstlight
from tests.helpers import ROOT, called

fastapi_testclient = pytest.importorskip("fastapi.testclient")

PAGE = (ROOT / "docs" / "serve.md").read_text()


def test_page_serves_a_run_behind_an_address(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    called("run", "--config", "configs/wine.yaml", "--trainer.max_epochs=1", "--report=false", cwd=tmp_path)
    (code,) = re.findall(r"```python\n(# serve.py\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "serve.py").write_text(code)
    with chdir(tmp_path):
        client = fastapi_testclient.TestClient(runpy.run_path("serve.py")["app"])
        expected = firstlight.load("runs/wine/latest").predict("configs/data/wine.csv").to_dict("records")
    rows = [*csv.DictReader((ROOT / "configs" / "data" / "wine.csv").read_text().splitlines())]
    assert client.post("/predict", json=rows).json() == expected
    numbers = [{name: float(value) for name, value in row.items() if name != "grape"} for row in rows]
    assert client.post("/predict", json=numbers).json() == expected
    del rows[0]["alcohol"]
    refused = client.post("/predict", json=rows[:1])
    assert refused.status_code == 422 and "the input has no column alcohol" in refused.json()["detail"]


def test_page_reads_an_exported_file_without_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    called("run", "--config", "configs/wine.yaml", "--trainer.max_epochs=1", "--report=false", cwd=tmp_path)
    called("export", "--run", "runs/wine/latest", "--to", "onnx", cwd=tmp_path)
    (code,) = re.findall(r"```python\n# without torch.*?\n(.*?)```", PAGE, re.DOTALL)
    code += "\nimport sys; assert 'torch' not in sys.modules"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path, timeout=120)
    with chdir(tmp_path):
        first = firstlight.load("runs/wine/latest").predict("configs/data/wine.csv").iloc[0]
    columns, predicted = printed.splitlines()
    assert columns.startswith("['alcohol', ") and predicted.split()[0] == first["prediction"]
