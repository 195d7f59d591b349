"""Everything that refuses a run before its first step.

`Experiment.fit` calls the `rules` in the order of a fit. `probe` tries network and loss on a few samples. `report`
makes the table of `firstlight check`, for which `dry_run` tries a whole step on a copy of the task. `rate_sweep` trains
copies for `firstlight lr`, and `lr_range` suggests a learning rate from their losses.
"""
