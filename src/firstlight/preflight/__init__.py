"""Checks that refuse a run before its first step, and the dry run of `firstlight check`."""
