"""Search for good settings: the space, the study with its trials, its lines and its report."""
