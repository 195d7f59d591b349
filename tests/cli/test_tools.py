"""Configurations are found by name from anywhere, editors know their options, and a shell completes commands."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from firstlight.cli import packaged
from tests.helpers import ROOT, called, newest, results

FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def test_a_configuration_of_firstlight_runs_from_anywhere(tmp_path):
    args = ["--config", "firstlight:wine", "--config=firstlight:overlays/debug"]
    called("run", *args, cwd=tmp_path)
    run = newest(tmp_path, "wine")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["experiment"] == "wine"
    assert saved["data"]["init_args"]["path"] == str(ROOT / "configs" / "data" / "wine.csv")
    assert "test/accuracy" in results(run)["metrics"]
    called("fit", "--run", str(run), "--trainer.max_epochs=2", cwd=tmp_path)


def test_an_option_overrides_the_data_of_a_configuration_of_firstlight(tmp_path):
    refused = called("fit", "--config", "firstlight:wine", "--data.path=mine.csv", cwd=tmp_path, code=2).stderr
    assert refused == "firstlight: cannot read mine.csv: No such file or directory\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_configuration_has_a_name_and_finds_its_files(path):
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    (_, found), files = packaged.with_files(["--config", f"firstlight:{name}"])
    assert found == str(path)
    given = yaml.safe_load(path.read_text())
    _, text = packaged.with_data(["--config", found], files)
    options = (given.get("data") or {}).get("init_args", {})
    if "path" in options:
        options["path"] = str(ROOT / options["path"])
        assert yaml.safe_load(text) == given
        assert os.path.exists(options["path"])
    else:
        assert text == found


def test_an_unknown_configuration_is_refused_with_a_suggestion(tmp_path):
    refused = called("run", "--config", "firstlight:digit_mlp", cwd=tmp_path, code=2).stderr
    assert refused == (
        "firstlight: there is no configuration firstlight:digit_mlp; firstlight configs lists all; did you mean "
        "digits_mlp?\n"
    )


def test_configs_lists_each_with_its_comment_and_its_result(tmp_path):
    _, _, *lines = called("configs", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == packaged.names()
    assert max(map(len, lines)) <= 120
    (line,) = (line for line in lines if line.startswith("digits_mlp "))
    row = next(row for row in (ROOT / "configs" / "README.md").read_text().splitlines() if "/digits_mlp.yaml" in row)
    assert row.split("**")[1] in line
    assert "A multi-layer perceptron" in line


def test_configs_imports_nothing_heavy():
    code = "from firstlight.__main__ import main; main(['configs']); import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"


@pytest.fixture(scope="module")
def validator(tmp_path_factory):
    jsonschema = pytest.importorskip("jsonschema")
    schema = yaml.safe_load(called("schema", cwd=tmp_path_factory.mktemp("schema")).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_schema_accepts_each_configuration(path, validator):
    validator.validate(yaml.safe_load(path.read_text()))


def test_the_schema_accepts_a_saved_configuration(validator, tmp_path):
    called("fit", "--config", "firstlight:digits_mlp", "--config", "firstlight:overlays/debug", cwd=tmp_path)
    validator.validate(yaml.safe_load((newest(tmp_path) / "config.yaml").read_text()))


MLP = "firstlight.networks.MLP"


@pytest.mark.parametrize(
    "wrong",
    [
        {"trainer": {"max_epoch": 3}},
        {"trainer": {"max_epochs": "many"}},
        {"early_stopping": {"patience": 1.5}},
        {"time": 10},
        {"data": {"class_path": "firstlight.data.Digits", "init_args": {"batch": 3}}},
        {
            "model": {
                "class_path": "firstlight.tasks.Classification",
                "init_args": {"network": {"class_path": MLP, "init_args": {"width": 3}}},
            }
        },
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_parser_refuses(wrong, validator):
    assert not validator.is_valid(wrong)


def test_the_schema_accepts_a_class_of_the_user_and_documents_options(validator):
    validator.validate({"model": {"class_path": "mine.Task", "init_args": {"anything": 1}}})
    properties = validator.schema["properties"]
    assert properties["early_stopping"]["properties"]["patience"]["default"] == 10
    assert "Folder of all runs" in properties["runs"]["description"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_verbs_options_and_classes(tmp_path):
    pytest.importorskip("shtab")
    (tmp_path / "complete.sh").write_text(called("completion", "bash", cwd=tmp_path).stdout)

    def completed(*words):
        line = " ".join(map(repr, words))
        code = f"source complete.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_firstlight; " + (
            'echo "${COMPREPLY[@]}"'
        )
        return subprocess.check_output(["bash", "-c", code], cwd=tmp_path, text=True).split()

    assert completed("firstlight", "ru") == ["run"]
    assert "--trainer.max_epochs" in completed("firstlight", "fit", "--trainer.max_e")
    assert completed("firstlight", "run", "--model.network", "Res") == ["ResNet"]
    assert completed("firstlight", "run", "--disable", "early") == ["early_stopping"]
    assert completed("firstlight", "report", "--f") == ["--format"]
    assert completed("firstlight", "report", "--format", "h") == ["html"]


def test_an_unknown_shell_is_refused_with_the_known_ones(tmp_path):
    pytest.importorskip("shtab")
    assert "available: bash" in called("completion", "bsh", cwd=tmp_path, code=2).stderr


@pytest.mark.parametrize("args", [["new", "a", "--dat=x"], ["compare", "a", "--spli=val"], ["report", "--form=md"]])
def test_tools_take_no_shortened_option(args, tmp_path):
    refused = called(*args, cwd=tmp_path, code=2).stderr
    assert refused.startswith(f"firstlight: {args[0]} does not take {args[-1]}: firstlight {args[0]} ")
