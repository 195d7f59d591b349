"""Everything that refuses a run before its first step.

`rules` holds the rules, `probe` tries network and loss on a few samples, `dry_run` tries a whole step on a copy of the
task, and `report` makes the table of `firstlight check`. `Experiment.fit` calls the rules in the order of a fit.
"""
