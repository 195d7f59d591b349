import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split

from firstlight.data import Corpus, Digits, ImageFolder, Table
from firstlight.errors import UsageError
from tests.data.helpers import Arrays, ready, write_images, write_text

FOLDS = 5


def every(make, folds=FOLDS):
    return [ready(make(folds=folds, fold=fold)) for fold in range(folds)]


def classes(labels, **options):
    return Arrays(np.zeros((len(labels), 1)), labels, [*map(str, range(labels.max() + 1))], options)


def check_cover(modules, plain):
    """Check that the folds share the plain test split, and that their validation splits divide all other rows."""
    rest = sorted([*plain.rows("train"), *plain.rows("val")])
    for module in modules:
        assert module.rows("test").tolist() == plain.rows("test").tolist()
        assert sorted([*module.rows("train"), *module.rows("val")]) == rest
    assert sorted(np.concatenate([module.rows("val") for module in modules])) == rest


def test_folds_share_the_test_split_and_divide_all_other_samples():
    modules = every(Digits)
    check_cover(modules, ready(Digits()))
    assert {len(module.rows("val")) for module in modules} <= {305, 306}  # 1,527 / 5


def test_folds_are_those_of_scikit_learn():
    targets = load_digits().target
    rest, test = train_test_split(np.arange(1797), test_size=270, random_state=3, stratify=targets)
    expected = StratifiedKFold(FOLDS, shuffle=True, random_state=3).split(rest, targets[rest])
    modules = every(lambda **options: Digits(split_seed=3, **options))
    for module, (train, val) in zip(modules, expected, strict=True):
        rows = {"train": rest[train], "val": rest[val], "test": test}
        assert {split: module.rows(split).tolist() for split in rows} == {k: v.tolist() for k, v in rows.items()}


def test_statistics_are_those_of_the_training_samples_of_the_fold():
    inputs = np.random.default_rng(0).normal(size=(100, 1))
    for module in every(lambda **options: Arrays(inputs, np.arange(100.0), options=options)):
        assert module.fitted["mean"].item() == pytest.approx(inputs[module.rows("train")].mean())


def test_own_test_split_is_kept():
    own = np.array(["train"] * 60 + ["test"] * 20)

    def make(**options):
        return Arrays(np.zeros((80, 1)), np.arange(80) % 2, ["a", "b"], options, split=own)

    modules = every(make)
    check_cover(modules, ready(make()))
    assert modules[0].rows("test").tolist() == list(range(60, 80))
    assert {module.dataset("val").targets.sum().item() for module in modules} == {6}


def table(folder, groups, kind="regression", **options):
    generator = np.random.default_rng(0)
    target = {"regression": lambda: f"{generator.normal():.3f}", "binary": lambda: "yn"[int(generator.integers(2))]}
    lines = [f"{generator.normal():.3f},{group},{target[kind]()}" for group in groups]
    (folder / "rows.csv").write_text("\n".join(["x,patient,y", *lines]))
    return Table(str(folder / "rows.csv"), "y", kind, **({"group": "patient"} | options))


@pytest.mark.parametrize("kind", ["regression", "binary"])
def test_no_group_is_in_two_splits_of_a_fold(kind, tmp_path):
    groups = np.array([f"p{each}" for each in np.random.default_rng(1).integers(0, 60, 400)])

    def make(**options):
        return table(tmp_path, groups, kind, **options)

    modules = every(make)
    check_cover(modules, ready(make()))
    for module in modules:
        parts = [set(groups[module.rows(split)]) for split in ("train", "val", "test")]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_folds_of_a_split_by_time_are_refused(tmp_path):
    module = table(tmp_path, range(100), group=None, time="patient", folds=5, fold=0)
    with pytest.raises(UsageError, match="the time patient decides the split: most of folds=5 would be validated on"):
        module.setup()


def test_folds_of_data_with_a_validation_split_are_refused(tmp_path):
    with pytest.raises(UsageError, match="the data define the validation split: folds=5 would replace it"):
        Corpus(write_text(tmp_path), folds=5, fold=0).setup()


def test_image_folders_name_no_share_for_the_validation_split_of_folds(tmp_path, caplog):
    write_images(tmp_path / "train", images=10)
    write_images(tmp_path / "test", images=5)
    ready(ImageFolder(str(tmp_path), folds=5, fold=1))
    assert "has no folder val" not in caplog.text


def test_a_fold_that_would_lack_a_class_is_refused_in_the_first_fold():
    labels = np.array([0] * 60 + [1] * 4)
    with pytest.raises(UsageError, match="class 1 has no sample in the val split, and 4 in all: add samples, or lower"):
        classes(labels, folds=FOLDS, fold=0).setup()


def test_more_folds_than_groups_and_uneven_groups_are_refused(tmp_path):
    groups = [f"p{row % 6}" for row in range(120)]
    with pytest.raises(UsageError, match=r"folds=7 needs as many groups, but there are 5"):
        table(tmp_path, groups, folds=7, fold=0).setup()
    groups = [*("a" * 150), *(f"p{row % 20}" for row in range(150))]
    with pytest.raises(UsageError, match=r"the folds would have \d+ to \d+ rows in place of 55"):
        table(tmp_path, groups, folds=FOLDS, fold=0).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 5}, "Digits was given folds=5 and fold=None: give both, or none of them"),
        ({"fold": 0}, "Digits was given folds=None and fold=0: give both, or none of them"),
        ({"folds": 1, "fold": 0}, "Digits was given folds=1: it must be at least 2"),
        ({"folds": 5, "fold": 5}, r"Digits with folds=5 was given fold=5: it must be in \[0, 5\)"),
    ],
)
def test_fold_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Digits(**options)


def test_a_checkpoint_of_another_fold_is_refused():
    state = ready(Digits(folds=5, fold=0)).state_dict()
    other = Digits(folds=5, fold=1)
    other.load_state_dict(state)
    with pytest.raises(UsageError, match=r"another split of Digits: use the same split_seed, .*folds, fold"):
        other.setup()
