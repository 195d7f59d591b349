"""The command line: verbs, parser, class help and parser errors. The only package that joins everything.

Importing this package imports nothing else, so that `firstlight --help` is instant.
"""

VERBS = {
    "new": "look at your data, and write an experiment of your own",
    "run": "fit, then test the best checkpoint",
    "fit": "train; with --run DIR, resume from its last checkpoint",
    "check": "find what is wrong with a fit in seconds, before it starts",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write a checkpoint's predictions for the test split",
}
"""The verbs, each with a line of help. A function of the same name in `firstlight.cli.verbs` runs it."""
