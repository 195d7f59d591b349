"""One experiment: train, evaluate, run directory, resume, console output."""
