"""What looks wrong in data before training: columns without use, leaks, drift, classes that are rare or absent.

It reads at most some million values, so large data is sampled, with a fixed seed.
"""

from collections.abc import Collection, Mapping

import numpy as np

from firstlight.data.quality import checks
from firstlight.data.quality.finding import Finding, most_severe_first
from firstlight.data.quality.values import figures, input_columns, target_columns
from firstlight.data.samples import Samples, Split
from firstlight.data.stored import Indices


def find(
    samples: Samples, rows: Indices, parts: Mapping[Split, Indices], dropped: int = 0, options: Collection[str] = ()
) -> list[Finding]:
    """Return what looks wrong in samples, the most severe findings first.

    Args:
        samples: After `clean`.
        rows: Row of each sample in the loaded data.
        parts: Indices of the samples of each split. Before a split exists, all are `"train"`.
        dropped: Rows that `clean` dropped.
        options: Names of the options that the data module takes, for advice.
    """
    assert samples.targets is not None
    parts = {split: part for split, part in parts.items() if len(part)}
    names = samples.class_names
    # Targets that are tokens may be too many to read.
    is_read = names or samples.targets.dtype.kind == "f"
    targets = {split: samples.targets[part] for split, part in parts.items()} if is_read else {}
    single = bool(names) and samples.targets.size == len(samples.targets)
    found = [*checks.copies(samples, rows, parts), *checks.dropped_rows(dropped, len(rows))]
    if single:
        labels = {split: each.reshape(-1).astype(np.int64) for split, each in targets.items()}
        found += checks.imbalance(labels["train"], names)
    elif names:
        # The labels that a sample belongs to.
        labels = {split: np.nonzero(each)[1] for split, each in targets.items()}
    if names:
        found += [*checks.absent_classes(labels, names), *checks.few_samples(labels, names)]
    is_table = samples.inputs.ndim == 2 and samples.inputs.dtype.kind == "f"
    leave_out = checks.ignore if "ignore" in options else checks.leave_out
    columns = input_columns(samples, parts) if is_table else figures(samples, parts)
    if is_table:
        read = len(columns[0].train)
        of = "all rows" if read == len(parts["train"]) else f"{read:,} sampled rows"
        found += [*checks.constant(columns, leave_out, of), *checks.duplicates(columns, leave_out, of)]
        found += checks.dates_as_numbers(columns, "dates" in options)
        found += [*checks.missing(columns), *checks.missing_codes(columns), *checks.out_of_range(columns)]
        found += checks.identifiers(columns, leave_out, rows[parts["train"]])
    of_targets = target_columns(samples, targets)
    if is_table:
        found += checks.codes_as_numbers(columns, of_targets, "categorical" in options)
    found += checks.leaks(columns, of_targets, leave_out if is_table else checks.collect_alike)
    found += checks.drift([*columns, *of_targets])
    return most_severe_first(found)
