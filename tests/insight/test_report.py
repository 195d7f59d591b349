"""What the sections of a report say, and how their charts are labelled."""

import re

import numpy as np
import pytest

from firstlight.insight.report import charts, sections


def predicted(first, right):
    """Return outputs of 10 classes: the predicted one has the probability `first`, and `right` of ten are right."""
    targets = np.arange(300) % 10
    guesses = np.where(np.arange(300) // 10 % 10 < right, targets, (targets + 1) % 10)
    outputs = np.full((300, 10), (1 - first) / 9)
    outputs[np.arange(300), guesses] = first
    return {"targets": targets, "outputs": outputs, "index": np.arange(300)}


@pytest.mark.parametrize(
    ("first", "right", "told"),
    [(0.99, 6, "too sure"), (0.5, 9, "less sure than it could be"), (0.104, 1, None), (0.6, 6, None)],
)
def test_a_network_is_called_too_sure_only_if_it_is_miscalibrated(first, right, told):
    outputs = {split: predicted(first, right) for split in ("val", "test")}
    run = sections.Run({}, {}, outputs, [str(label) for label in range(10)])
    (text,) = (each.text for each in sections.predictions(run) if each.title == "Calibration")
    assert text.endswith(f"The network is {told}." if told else "000.")


def test_the_map_of_gradients_says_why_it_is_empty():
    steps = np.array([10, 20, 30])
    run = sections.Run({"grad_norm/a": (steps, np.array([0.0, 0.0, 1.0])), "grad_norm/b": (steps, np.ones(3))}, {}, {})
    assert sections.gradients(run)[0].text.endswith("Where a norm is 0, the map is empty.")
    run = sections.Run({"grad_norm/a": (steps, np.ones(3)), "grad_norm/b": (steps, np.ones(3))}, {}, {})
    assert "empty" not in sections.gradients(run)[0].text


@pytest.mark.parametrize(("low", "labels"), [(0.03, ["0.05", "0.1", "0.2", "0.5", "1"]), (0.5, ["0.6", "0.9", "1"])])
def test_labels_of_a_logarithmic_axis_do_not_overlap(low, labels):
    line = np.arange(2), np.array([low, 1.0])
    found = re.findall(r"<text[^>]*>\s*([^<]+?)\s*</text>", charts.lines({"val": line}, "x", "y", log=True))
    assert {*labels} <= {*found}
    if low < 0.1:
        assert not {"0.04", "0.06", "0.07", "0.08", "0.09", "0.9"} & {*found}
