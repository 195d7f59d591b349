import numpy as np
import pytest

from firstlight.errors import UsageError
from tests.data.helpers import Arrays, numbers, ready


def test_checkpoint_with_other_classes_is_refused():
    state = ready(numbers()).state_dict()
    state["class_names"] = ["no", "maybe"]
    with pytest.raises(UsageError, match=r"trained on the class_names \['no', 'maybe'\].*\['no', 'yes'\]"):
        ready(numbers()).load_state_dict(state)


@pytest.mark.parametrize("options", [{"split_seed": 5}, {"test_fraction": 0.3}])
def test_another_split_of_the_same_data_is_refused(options):
    module = numbers(**options)
    module.load_state_dict(dict(ready(numbers()).fitted))
    with pytest.raises(
        UsageError, match="trained on another split of Arrays: use the same split_seed, val_fraction, test_fraction"
    ):
        module.dataset("test")


def test_rows_that_are_no_longer_dropped_are_another_split():
    inputs = np.random.default_rng(0).normal(size=(40, 3))
    inputs[::7, 1] = np.nan
    trained, module = (Arrays(inputs, np.arange(40) % 2, "ab", {"missing": missing}) for missing in ("drop", "mean"))
    module.load_state_dict(dict(ready(trained).fitted))
    with pytest.raises(UsageError, match="trained on another split"):
        module.dataset("test")
