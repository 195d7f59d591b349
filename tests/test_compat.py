import warnings

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from firstlight.compat import innermost_statement, let_fused_optimisers_clip, without_side_effects


def test_known_warnings_are_silent_and_others_are_not():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with without_side_effects():
            warnings.warn("The 'train_dataloader' does not have many workers which may be a bottleneck.", stacklevel=1)
            warnings.warn("another warning", stacklevel=1)
    assert [str(each.message) for each in shown] == ["another warning"]


@pytest.mark.parametrize(("precision", "is_changed"), [("bf16-mixed", True), ("32-true", False)])
def test_only_mixed_precision_without_a_scaler_gets_the_plain_clipping(precision, is_changed):
    trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_progress_bar=False)
    plugin = let_fused_optimisers_clip(trainer).precision_plugin
    assert isinstance(plugin, MixedPrecision) == is_changed
    assert plugin.clip_gradients.__func__ is Precision.clip_gradients


def test_innermost_statement_drops_the_outer_lines():
    message = """Parser key "trainer":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'int'>, <class 'NoneType'>]
      Errors:
        - Expected a <class 'int'>. Got value: abc
        - Expected a <class 'NoneType'>
      Given value type: <class 'str'>
      Given value: abc"""
    assert innermost_statement(message) == "expected int, got abc"
