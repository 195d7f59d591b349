"""The command line: verbs, parser, class help and parser errors. The only package that joins everything.

Importing this package imports nothing else, so that `firstlight --help` is instant.
"""

VERBS = {
    "run": "fit, then test the best checkpoint",
    "repeat": "run with several seeds, or on the folds of a cross-validation",
    "sweep": "search for good settings with many short runs; again: continue",
    "fit": "train; with --run DIR, resume from its last checkpoint",
    "check": "find what is wrong with a fit in seconds, before it starts",
    "lr": "suggest a learning rate: a range test, then short runs around its rate",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write a checkpoint's predictions for the test split",
    "export": "write a checkpoint as ONNX, pt2 or safetensors, with its scaling inside",
}
"""Verbs that share one set of options, with a line of help. `firstlight.cli.verbs` has a function for each."""

TOOLS = {
    "compare": "compare runs: what differs, metrics with intervals, and a verdict",
    "new": "look at your data, and write an experiment of your own",
    "report": "write the report of a run again, as a page or as Markdown",
    "configs": "list the configurations that come with firstlight",
    "schema": "print a JSON schema of configuration files, for editors",
    "completion": "print a script that completes commands in bash, zsh or tcsh",
}
"""Verbs with options of their own, with a line of help. `firstlight.cli.tools` has a function for each."""
