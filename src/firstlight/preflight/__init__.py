"""Everything that refuses a run before its first step. `FitChecks` is for a fit, `check` for `firstlight check`.

`rules` holds the rules, `probe` tries network and loss on a few samples, `dry_run` tries a whole step on a copy of the
task, and `report` collects findings in a table.
"""
