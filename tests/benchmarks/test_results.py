import json
import runpy
import shutil
from pathlib import Path

import pytest

from tests.helpers import ROOT


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Return the globals of results.py in a copy of its files; measuring returns the stored results of wine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("benchmarks/results.py", "benchmarks/results/wine.json", "configs/wine.yaml", "configs/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "configs" / "other.yaml").touch()
    names = runpy.run_path(str(tmp_path / "benchmarks" / "results.py"))["main"].__globals__
    stored = json.loads((tmp_path / "benchmarks" / "results" / "wine.json").read_text())
    names["measured"] = []
    names["measure"] = lambda config, seed: names["measured"].append((config, seed)) or stored[str(seed)]
    return names


def test_missing_seeds_are_measured_and_added_to_the_table(script):
    script["main"]([])
    assert script["measured"] == [("configs/other.yaml", seed) for seed in range(5)]
    assert Path("configs/README.md").read_text().count("| `firstlight run") == 2


def test_only_a_named_experiment_is_measured_again(script):
    script["main"](["wine"])
    assert script["measured"] == [("configs/wine.yaml", seed) for seed in range(5)]


def test_table_option_measures_nothing(script, capsys):
    script["main"](["--table"])
    assert script["measured"] == []
    assert "configs/wine.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["wnie"], "there is no configs/wnie.yaml; did you mean wine?"),
        (["--tabel"], "unrecognized arguments: --tabel"),
        (["--table", "wine"], "--table measures nothing: leave out --table, or wine"),
    ],
)
def test_wrong_arguments_are_refused_and_no_result_is_deleted(args, message, script, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        script["main"](args)
    assert message in capsys.readouterr().err
    assert script["measured"] == []
    assert (tmp_path / "benchmarks" / "results" / "wine.json").is_file()


def test_a_page_without_its_markers_is_not_written(script):
    page = Path("configs/README.md")
    text = page.read_text().replace("<!-- end of results -->", "")
    page.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md has 0 sections results, and not 1"):
        script["main"](["--table"])
    assert page.read_text() == text


def test_baselines_take_the_seed_of_a_configuration(monkeypatch, capsys, tmp_path):
    names = runpy.run_path(str(ROOT / "benchmarks" / "baselines.py"))["main"].__globals__
    names["scores"] = lambda task, data, seed: {"seed": seed}
    (tmp_path / "seed.yaml").write_text("seed_everything: 7")
    monkeypatch.setattr("sys.argv", ["", "--config", str(ROOT / "configs/wine.yaml"), f"--config={tmp_path}/seed.yaml"])
    names["main"]()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["baselines"] == {"seed": 7}
