"""What a run shows: findings, a report and comparisons, made from what it recorded."""
