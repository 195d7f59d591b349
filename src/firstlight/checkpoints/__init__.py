"""Checkpoint files: atomic writes, verification, hyper-parameters and trusted classes."""
