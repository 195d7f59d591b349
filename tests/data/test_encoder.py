from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from sklearn.preprocessing import OneHotEncoder, QuantileTransformer, StandardScaler

from firstlight.data.dates import date_formats, seconds
from firstlight.data.encoder import TableEncoder

GENERATOR = np.random.default_rng(0)
NUMBERS = np.stack(
    [
        GENERATOR.normal(size=900),
        GENERATOR.exponential(size=900) * 1e6,
        GENERATOR.integers(0, 3, 900),
        np.full(900, 3.0),
    ],
    axis=1,
)


def fit(rows, kinds, categories=(), others=(), scale="standard", indicators=False):
    return TableEncoder.fit(torch.from_numpy(rows), kinds, categories, others, scale, indicators)


def test_standard_scale_is_that_of_scikit_learn():
    encoder = fit(NUMBERS[:600], ["number"] * 4)
    expected = StandardScaler().fit(NUMBERS[:600]).transform(NUMBERS[600:])
    np.testing.assert_allclose(encoder(torch.from_numpy(NUMBERS[600:])), expected, atol=1e-12)


def test_quantile_scale_is_the_normal_quantile_of_scikit_learns_uniform_one():
    encoder = fit(NUMBERS[:600], ["number"] * 4, scale="quantile")
    uniform = QuantileTransformer(n_quantiles=60, subsample=None).fit(NUMBERS[:600]).transform(NUMBERS[600:])
    expected = torch.special.ndtri((torch.from_numpy(uniform) * 59 + 0.5) / 60)
    inside = (uniform > 0) & (uniform < 1)
    found = encoder(torch.from_numpy(NUMBERS[600:]))
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-6)
    assert found.abs().max() <= torch.special.ndtri(torch.tensor(1 - 0.5 / 60)) + 1e-6
    assert not found[:, 3].any()


def test_quantile_scale_keeps_the_order_of_numbers_beyond_float32():
    rows = 1.7e9 + np.arange(500.0)[:, None] / 8
    encoded = fit(rows, ["number"], scale="quantile")(torch.from_numpy(rows)).flatten()
    assert (encoded.diff() > 0).all()


def test_categories_are_those_of_scikit_learn_and_rare_ones_share_a_feature():
    rows = GENERATOR.integers(-1, 4, (200, 1)).astype(float)
    encoder = fit(rows, ["category"], [4], [True])
    expected = OneHotEncoder(sparse_output=False).fit_transform(rows)[:, [1, 2, 3, 4, 0]]
    np.testing.assert_array_equal(encoder(torch.from_numpy(rows)), expected)


def test_missing_values_get_the_mean_the_shares_and_an_indicator():
    rows = np.array([[1.0, 0.0], [np.nan, 1.0], [3.0, np.nan], [5.0, 1.0]])
    encoder = fit(rows, ["number", "category"], [2], [False], indicators=True)
    found = encoder(torch.tensor([[np.nan, np.nan], [3.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found[0], torch.tensor([0, 1 / 3, 2 / 3, 1, 1], dtype=torch.float64))
    assert found[1].tolist() == [0, 1, 0, 0, 0]


def test_parts_of_dates_are_those_of_the_calendar():
    days = GENERATOR.integers(-200_000, 200_000, 3000)
    stamps = days * 86_400.0 + GENERATOR.integers(0, 86_400, 3000)
    encoder = TableEncoder(["date"], [], [], [], 0)
    found = encoder(torch.from_numpy(stamps)[:, None])
    for row, stamp, day in zip(found.tolist(), stamps, days, strict=True):
        date = datetime.fromtimestamp(stamp, UTC)
        assert row == [day, date.month, date.day, date.weekday(), date.hour]


@pytest.mark.parametrize("scale", ["standard", "quantile"])
def test_state_restores_the_encoder(scale):
    rows = np.concatenate([NUMBERS, GENERATOR.integers(0, 5, (900, 1)), np.arange(900.0)[:, None] * 1e5], axis=1)
    rows[::7, 1] = np.nan
    encoder = fit(rows, ["number"] * 4 + ["category", "date"], [4], [True], scale, True)
    again = TableEncoder.from_state(encoder.state)
    assert again(torch.from_numpy(rows)).equal(encoder(torch.from_numpy(rows)))
    assert encoder(torch.from_numpy(rows)).shape == (900, 4 + 5 + 5 + 1)


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2024-01-31", datetime(2024, 1, 31)),
        ("2024-01-31T12:30:00+02:00", datetime(2024, 1, 31, 10, 30)),
        ("20240131", datetime(2024, 1, 31)),
        ("31.01.2024", datetime(2024, 1, 31)),
        ("1/31/2024 0:00:00", datetime(2024, 1, 31)),
        ("31-Jan-99", datetime(1999, 1, 31)),
    ],
)
def test_dates_are_read(text, date):
    (style,) = date_formats([text])
    assert seconds(text, style) == date.replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize("text", ["2024", "12", "apple", "", "1.5", "31/31/2024"])
def test_other_values_are_no_dates(text):
    assert date_formats([text]) == []
