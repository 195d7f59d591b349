"""Intervals and verdicts of comparisons, against scikit-learn, scipy and formulas written out."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from firstlight.insight import compare
from firstlight.insight.compare import Difference
from firstlight.insight.contributions import contributions
from firstlight.run.comparison import verdict

RNG = np.random.default_rng(0)


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def of_classes(size=300, classes=4):
    targets = RNG.integers(0, classes, size)
    probabilities = softmax(RNG.normal(size=(size, classes)) + 1.5 * np.eye(classes)[targets])
    return {"kind": "classes", "targets": targets, "outputs": probabilities, "predictions": probabilities.argmax(1)}


def means(outputs):
    return {name: each.mean() for name, each in contributions(outputs).items()}


def test_contributions_of_classes_have_the_metrics_of_scikit_learn_as_means():
    each = of_classes()
    targets, probabilities, predictions = each["targets"], each["outputs"], each["predictions"]
    assert means(each) == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(targets, predictions),
            "balanced_accuracy": metrics.balanced_accuracy_score(targets, predictions),
            "f1": metrics.f1_score(targets, predictions, average="macro"),
            "auroc": metrics.roc_auc_score(targets, probabilities, multi_class="ovr"),
            "log_loss": metrics.log_loss(targets, probabilities),
        }
    )


def test_contributions_of_two_classes_and_of_labels_equal_scikit_learn():
    targets = RNG.integers(0, 2, (200, 3))
    values = np.round(0.6 * RNG.random((200, 3)) + 0.4 * targets, 2)  # With equal scores.
    predictions = (values > 0.5).astype(int)
    found = means({"kind": "labels", "targets": targets, "outputs": values, "predictions": predictions})
    assert found == pytest.approx(
        {
            "accuracy": (targets == predictions).mean(),
            "f1": metrics.f1_score(targets, predictions, average="macro"),
            "auroc": metrics.roc_auc_score(targets, values),
        }
    )
    y, p, scores = targets[:, 0], predictions[:, 0], values[:, 0]
    found = means({"kind": "binary", "targets": y, "outputs": scores, "predictions": p})
    assert found == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(y, p),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, p),
            "f1": metrics.f1_score(y, p),
            "auroc": metrics.roc_auc_score(y, scores),
            "log_loss": metrics.log_loss(y, scores),
        }
    )


def test_contributions_of_numbers_and_tokens_equal_their_metrics():
    targets = RNG.normal(size=150) + 1e6
    values = targets + RNG.normal(size=150)
    assert means({"kind": "numbers", "targets": targets, "outputs": values}) == pytest.approx(
        {
            "mae": metrics.mean_absolute_error(targets, values),
            "rmse": metrics.root_mean_squared_error(targets, values),
            "r2": metrics.r2_score(targets, values),
        }
    )
    loss, weight = RNG.random(50), RNG.integers(1, 9, 50)
    mean = np.average(loss, weights=weight)
    assert means({"kind": "tokens", "loss": loss, "weight": weight, "targets": None}) == pytest.approx(
        {"loss": mean, "bits_per_byte": mean / math.log(2), "perplexity": math.exp(mean)}
    )


@pytest.mark.parametrize("name", ["auroc", "f1", "balanced_accuracy", "log_loss"])
def test_the_variance_of_contributions_is_that_of_the_jackknife(name):
    each = of_classes(400)
    size = len(each["targets"])
    values = contributions(each)[name]

    def without(row):
        rest = {key: value if key == "kind" else np.delete(value, row, axis=0) for key, value in each.items()}
        return means(rest)[name]

    jackknife = np.array([without(row) for row in range(size)])
    expected = (size - 1) / size * ((jackknife - jackknife.mean()) ** 2).sum()
    assert values.var(ddof=1) / size == pytest.approx(expected, rel=0.03)


def test_a_metric_that_is_undefined_has_no_contributions():
    found = means({"kind": "binary", "targets": np.ones(9, int), "outputs": RNG.random(9)})
    assert "auroc" not in found
    assert "r2" not in means({"kind": "numbers", "targets": np.ones(9), "outputs": RNG.random(9)})


def test_mcnemar_is_the_mid_p_of_a_binomial_written_out():
    for better, worse in ((9, 1), (3, 12), (20, 11)):
        count, fewer = better + worse, min(better, worse)
        chances = [math.comb(count, each) / 2**count for each in range(count + 1)]
        assert compare.mcnemar(better, worse) == pytest.approx(2 * sum(chances[:fewer]) + chances[fewer])
    assert compare.mcnemar(0, 0) == 1


def test_two_runs_are_compared_in_pairs():
    a = (RNG.random(500) < 0.8).astype(float)
    b = np.where(RNG.random(500) < 0.06, 1, a)
    found = compare.difference_of_samples(a, b)
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx(((b - a).mean(), *expected))
    assert found.is_shown
    assert not compare.difference_of_samples(a, b[::-1]).is_shown


def test_a_difference_of_few_samples_is_shown_only_if_mcnemar_agrees():
    a, b = np.zeros(300), np.zeros(300)
    b[:5] = 1
    found = compare.difference_of_samples(a, b)
    assert found.low > 0
    assert found.p == pytest.approx(2 * 0.5**5 - 0.5**5)
    assert found.is_shown
    b[4] = 0
    found = compare.difference_of_samples(a, b)
    assert found.p == pytest.approx(0.0625)
    assert not found.is_shown


def test_equal_predictions_do_not_prove_that_there_is_no_difference():
    right = np.ones(100)
    found = compare.difference_of_samples(right, right)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 100)) == -found.low
    assert not found.is_shown


def test_the_accuracy_of_one_run_has_the_interval_of_wilson():
    right = np.arange(50) < 47
    z, share, size = stats.norm.ppf(0.975), 0.94, 50
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    found = compare.of_share(right)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half))


def test_seeds_without_samples_are_the_t_tests_of_scipy():
    a, b = RNG.normal(size=6), RNG.normal(size=9) + 1
    found, expected = compare.difference_of_groups(a, b), stats.ttest_ind(b, a, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, *interval))
    b = b[:6]
    found, expected = compare.difference_of_groups(a, b, is_paired=True), stats.ttest_rel(b, a)
    assert (found.p, *expected.confidence_interval(0.95)) == pytest.approx((expected.pvalue, found.low, found.high))
    single = compare.difference_of_groups(a, np.array([3.0]))
    error = a.std(ddof=1) * math.sqrt(1 + 1 / 6)
    assert single.high - single.value == pytest.approx(stats.t.ppf(0.975, 5) * error)


def test_seeds_and_samples_are_two_crossed_random_factors():
    runs, samples = 5, 40
    values = RNG.normal(size=(runs, 1)) + RNG.normal(size=(1, samples)) + RNG.normal(size=(runs, samples))
    mean = values.mean()
    of_runs = samples * ((values.mean(1) - mean) ** 2).sum() / (runs - 1)
    of_samples = runs * ((values.mean(0) - mean) ** 2).sum() / (samples - 1)
    rest = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + mean
    residual = (rest**2).sum() / ((runs - 1) * (samples - 1))
    error = math.sqrt((of_runs + of_samples - residual) / (runs * samples))
    below = of_runs**2 / (runs - 1) + (of_samples - residual) ** 2 / (samples - 1)
    freedom = (of_runs + of_samples - residual) ** 2 / below
    found = compare.of_runs(values)
    assert found.high - mean == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    paired = compare.difference_of_groups(np.zeros_like(values), values, is_paired=True)
    assert (paired.low, paired.high) == pytest.approx((found.low, found.high))


def test_folds_have_the_corrected_variance_of_nadeau_and_bengio():
    a, b = RNG.normal(size=5), RNG.normal(size=5)
    found = compare.difference_of_folds(a, b)
    error = math.sqrt((1 / 5 + 1 / 4) * (b - a).var(ddof=1))
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 4) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs((b - a).mean()) / error, 4))


def test_the_sign_flip_test_counts_all_signs():
    each = RNG.normal(size=7) + 1
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1).T
    flipped = (signs * each).mean(1)
    low, high = (flipped <= each.mean() + 1e-12).mean(), (flipped >= each.mean() - 1e-12).mean()
    assert compare.sign_flip(each) == pytest.approx(2 * min(low, high))
    assert compare.sign_flip(np.arange(1.0, 6)) == 2 / 2**5


def test_the_seeds_needed_would_show_the_difference_in_four_of_five_cases():
    each = 0.5 * (np.arange(6) - 2.5) / 1.8708 + 0.25  # Standard deviation 0.5, mean 0.25.
    found = compare.difference_of_groups(np.zeros(6), each, is_paired=True)
    assert not found.is_shown
    seeds = 6 + int(found.needed.split()[0])

    def power(count):
        return stats.nct.sf(stats.t.ppf(0.975, count - 1), count - 1, 0.25 / 0.5 * math.sqrt(count))

    assert power(seeds - 3) < 0.8 <= power(seeds + 1)
    assert found.needed.endswith(" more seeds would be needed")


def test_more_seeds_are_not_advised_if_samples_are_too_few():
    of_samples = np.where(np.arange(30) < 3, 1.0, -0.05)
    values = of_samples + 1e-3 * RNG.normal(size=(6, 30))
    found = compare.difference_of_groups(np.zeros_like(values), values, is_paired=True)
    assert found.needed == "more seeds alone would not be enough: there are too few test samples"


@pytest.mark.parametrize(
    ("metric", "found", "expected"),
    [
        ("accuracy", (0.0214, 0.0102, 0.0326, True), "B is better than A by 2.1 points of accuracy (1.0 to 3.3)"),
        ("accuracy", (-0.5, -0.6, -0.4, True), "B is worse than A by 50 points of accuracy (40 to 60)"),
        ("loss", (-0.31, -0.4, -0.22, True), "B is better than A by 0.31 in loss (0.22 to 0.40)"),
        ("own", (3.0, 2.0, 4.0, True), "B is higher than A by 3.0 in own (2.0 to 4.0)"),
        ("r2", (0.1, -0.1, 0.3, False), "no difference in r2 shown between A and B (B - A: -0.1 to 0.3)"),
        ("nn", (0.1, math.nan, math.nan), "no verdict on nn: the difference has no interval"),
    ],
)
def test_a_verdict_says_which_is_better_and_by_how_much(metric, found, expected):
    assert verdict("A", "B", metric, Difference(*found)) == expected
