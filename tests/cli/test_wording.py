"""The wording of jsonargparse's errors that `parser_errors` and `errors` depend on, in real errors."""

import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from firstlight import errors
from firstlight.cli.class_help import ShortHelp
from firstlight.cli.parser import CLI
from firstlight.cli.parser_errors import WORDING
from firstlight.errors import UsageError
from firstlight.schedules import Schedule
from tests.helpers import CONFIG, ROOT

CAUSES = {
    "key": ["--model.network.hiden=[3]"],
    "nested key": ["--model.network=MPL"],
    "class": ["--data.batch_sizes=3"],
    "class of a rejected option": ["--model.optimizer.lrr=3"],
    "unknown argument": ["--trainer.max_epoch=3"],
    "unknown option of a class": ["--data.batch_sizes=3"],
    "missing attribute": ["--model.network=firstlight.networks.MPL"],
    "missing module": ["--model.network=missing_module.Net"],
    "not an import path": [f"--data={ROOT / 'configs' / 'data' / 'wine.csv'}"],
    "expected type": ["--model.network.hidden=[x]"],
    "folder instead of a file": ["--config=."],
    "not a subclass": ["--data=torch.nn.Linear"],
    "unknown class": ["--model.optimizer=AdamX"],
    "broken file": ["--config=broken.yaml"],
    "file without options": ["--config=list.yaml"],
    "missing option": None,
    "missing file": ["--config=missing.yaml"],
    "null class_path": ["--config=null_class.yaml"],
    "null init_args": ["--config=null_init.yaml"],
    "typed null": ["--model.network.norm=null"],
}
"""Options that cause an error with each wording; without any, not even a `--config`, for `None`."""

FILES = {
    "broken.yaml": "model: {a: [1\nb: 3",
    "list.yaml": "- a\n",
    "null_class.yaml": "data: {class_path: null}",
    "null_init.yaml": "data: {class_path: firstlight.data.Digits, init_args: null}",
}


@pytest.fixture
def raw_error(tmp_path, monkeypatch):
    """Return a function that returns jsonargparse's error for some options."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    messages = []
    monkeypatch.setattr("firstlight.cli.parser.explain", lambda message, *_: messages.append(message) or "explained")

    def get(options):
        if str(options) not in ERRORS:
            with pytest.raises(UsageError, match="explained"):
                CLI("fit", [] if options is None else ["--config", CONFIG, *options])
            ERRORS[str(options)] = messages[-1]
        return ERRORS[str(options)]

    return get


ERRORS = {}
"""Errors by options: each takes a second."""


def test_every_wording_has_a_cause():
    assert CAUSES.keys() == WORDING.keys()


@pytest.mark.parametrize("kind", WORDING)
def test_wording_of_jsonargparse_is_recognised(kind, raw_error):
    message = raw_error(CAUSES[kind])
    assert re.search(WORDING[kind], message), message


def test_outer_lines_of_jsonargparse_still_occur(raw_error):
    options = [*CAUSES.values(), ["--model.optimizer=[1]"], ["--model.network=1"], ["--model.network.norm=bach"]]
    lines = [line.strip().removeprefix("- ") for each in options for line in raw_error(each).splitlines()]
    assert [start for start in errors._OUTER_LINES if not any(line.startswith(start) for line in lines)] == []


@pytest.mark.parametrize(("formatter", "lists"), [(DefaultHelpFormatter, True), (ShortHelp, False)])
def test_help_lists_subclasses_unless_they_are_removed(formatter, lists):
    parser = ArgumentParser(formatter_class=formatter)
    parser.add_argument("--schedule", type=Schedule)
    text = " ".join(parser.format_help().split())
    assert ("known subclasses: " in text and "WarmupCosine" in text) == lists
    assert lists or "WarmupCosine" not in text
