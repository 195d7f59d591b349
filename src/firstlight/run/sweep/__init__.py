"""Search for good settings: the space, the study with its trials, and what is told of them."""
