"""Turn the columns of a table into features: scaled numbers and parts of dates, then categories, then indicators.

Shapes: `N` rows, `C` columns, `M` numbers and parts of dates, `F` features.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from torch import Tensor, nn
from torch.compiler import is_exporting

from firstlight.data.dates import DATE_PARTS
from firstlight.errors import UsageError, check_saved

Kind = Literal["number", "date", "category"]
Scale = Literal["standard", "quantile"]

_DAY = 86_400
_MAX_QUANTILES = 256
_CENTRE = (
    (-59.9633501014107895267, 98.0010754185999661536, -56.6762857469070293439, 13.9312609387279679503,
     -1.23916583867381258016),
    (1.0, 1.95448858338141759834, 4.67627912898881538453, 86.3602421390890590575, -225.462687854119370527,
     200.260212380060660359, -82.0372256168333339912, 15.9056225126211695515, -1.18331621121330003142),
)  # fmt: skip
_TAIL = (
    (4.05544892305962419923, 31.5251094599893866154, 57.1628192246421288162, 44.0805073893200834700,
     14.6849561928858024014, 2.18663306850790267539, -0.140256079171354495875, -0.0350424626827848203418,
     -0.000857456785154685413611),
    (1.0, 15.7799883256466749731, 45.3907635128879210584, 41.3172038254672030440, 15.0425385692907503408,
     2.50464946208309415979, -0.142182922854787788574, -0.0380806407691578277194, -0.000933259480895457427372),
)  # fmt: skip
_ROWS_PER_QUANTILE = 10


class TableEncoder(nn.Module):
    """Encode rows `(N, C)` float64 as features `(N, F)`. Its buffers hold all that was fitted.

    A number is standardised, or mapped to a standard normal by its quantiles. A date is seconds since 1970 in UTC and
    becomes five numbers: days since 1970, month, day of the month, day of the week from Monday, and hour. A category is
    an index and becomes one feature for each category, and one for all others if `others` says so. A missing value
    (NaN) becomes 0 in numbers, and the shares of the training rows in categories. With indicators, a further feature
    is 1 where a value is missing.

    Args:
        kinds: Kind of each column.
        categories: For each column of categories, the number of its categories.
        others: For each column of categories, whether other indices, -1 for example, have a feature of their own.
        indicators: Columns whose missing values have a feature, in this order.
        quantiles: How many quantiles are kept of each number; 0 if numbers are standardised.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor
    shares: Tensor

    def __init__(
        self,
        kinds: Sequence[Kind],
        categories: Sequence[int],
        others: Sequence[bool],
        indicators: Sequence[int],
        quantiles: int,
    ) -> None:
        super().__init__()
        self._columns = {
            kind: [i for i, each in enumerate(kinds) if each == kind] for kind in ("number", "date", "category")
        }
        self._categories = [*categories]
        self._widths = [count + other for count, other in zip(categories, others, strict=True)]
        self._others = [*others]
        self._indicators = [*indicators]
        self.numeric_features = len(self._columns["number"]) + DATE_PARTS * len(self._columns["date"])
        self.register_buffer("mean", torch.zeros(self.numeric_features, dtype=torch.float64))
        self.register_buffer("std", torch.ones(self.numeric_features, dtype=torch.float64))
        self.register_buffer("quantiles", torch.zeros(self.numeric_features, quantiles, dtype=torch.float64))
        self.register_buffer("shares", torch.zeros(sum(self._widths), dtype=torch.float64))

    @property
    def state(self) -> dict[str, Any]:
        """What `from_state` takes: plain values and tensors."""
        kinds = {i: kind for kind, columns in self._columns.items() for i in columns}
        return {
            "kinds": [kinds[i] for i in range(len(kinds))],
            "categories": self._categories,
            "others": self._others,
            "indicators": self._indicators,
            **self.state_dict(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TableEncoder":
        """Return the encoder with a state.

        Raises:
            UsageError: If the state has another form than `state`, for example in a crafted checkpoint.
        """
        check_saved("the encoder", state, kinds=list[str], categories=list[int], others=list[bool])
        check_saved("the encoder", state, indicators=list[int], shares=Tensor, quantiles=Tensor)
        if sum(state["categories"]) + sum(state["others"]) != state["shares"].numel():  # They decide what is allocated.
            raise UsageError("the checkpoint is damaged: the encoder has other categories than shares")
        arguments = {name: state[name] for name in ("kinds", "categories", "others", "indicators")}
        encoder = cls(**arguments, quantiles=state["quantiles"].shape[1])
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
        return encoder

    @classmethod
    def fit(
        cls,
        rows: Tensor,
        kinds: Sequence[Kind],
        categories: Sequence[int],
        others: Sequence[bool],
        scale: Scale,
        indicators: bool,
    ) -> "TableEncoder":
        """Return an encoder that is fitted to training rows `(N, C)`; with `indicators`, one for each gap in them."""
        missing = rows.isnan().any(0) if indicators else torch.zeros(len(kinds), dtype=torch.bool)
        count = max(2, min(_MAX_QUANTILES, len(rows) // _ROWS_PER_QUANTILE)) if scale == "quantile" else 0
        encoder = cls(kinds, categories, others, missing.nonzero().flatten().tolist(), count)
        numbers = encoder._numbers(rows)
        if count and numbers.shape[1]:
            fitted = QuantileTransformer(n_quantiles=count, subsample=None).fit(numbers.numpy())
            encoder.quantiles.copy_(torch.from_numpy(fitted.quantiles_.T.copy()))
        elif numbers.shape[1]:
            scaler = StandardScaler().fit(numbers.numpy())
            encoder.mean.copy_(torch.from_numpy(scaler.mean_))
            encoder.std.copy_(torch.from_numpy(scaler.scale_))
        if encoder._widths:
            encoder.shares.copy_(torch.cat(encoder._one_hot(rows), 1).nanmean(0))
        return encoder

    def forward(self, rows: Tensor) -> Tensor:
        """Return the features of rows, without NaN."""
        numbers = self._numbers(rows)
        if self.quantiles.shape[1]:
            numbers = _to_normal(numbers, self.quantiles)
        else:
            numbers = (numbers - self.mean) / self.std
        features = [numbers.where(~numbers.isnan(), 0.0)]
        start = 0
        for one_hot, width in zip(self._one_hot(rows), self._widths, strict=True):
            features.append(one_hot.where(~one_hot.isnan(), self.shares[start : start + width]))
            start += width
        if self._indicators:
            features.append(rows[:, self._indicators].isnan().to(rows.dtype))
        return torch.cat(features, dim=1)

    def _numbers(self, rows: Tensor) -> Tensor:
        """Return numbers and parts of dates, `(N, M)`, NaN if missing."""
        columns = [rows[:, self._columns["number"]]]
        for column in self._columns["date"]:
            columns.append(torch.stack(_date_parts(rows[:, column]), dim=1))
        return torch.cat(columns, dim=1)

    def _one_hot(self, rows: Tensor) -> list[Tensor]:
        """Return the features `(N, width)` of each column of categories, NaN if missing."""
        found = []
        for i, count, width in zip(self._columns["category"], self._categories, self._widths, strict=True):
            index = rows[:, i, None]
            if width > count:
                index = index.where((index >= 0) | index.isnan(), float(count))
            one_hot = (index == torch.arange(width, dtype=rows.dtype, device=rows.device)).to(rows.dtype)
            found.append(one_hot.where(~index.isnan(), torch.nan))
        return found


def _date_parts(seconds: Tensor) -> list[Tensor]:
    """Return days since 1970, month, day of the month, day of the week and hour, each `(N,)`.

    Source: Hinnant, "chrono-Compatible Low-Level Date Algorithms" (2021), `civil_from_days`.
    """
    days = (seconds / _DAY).floor()
    shifted = days + 719_468
    day_of_era = shifted % 146_097
    leap_days = (day_of_era / 1460).floor() - (day_of_era / 36_524).floor() + (day_of_era / 146_096).floor()
    year_of_era = ((day_of_era - leap_days) / 365).floor()
    leap_days = (year_of_era / 4).floor() - (year_of_era / 100).floor()
    day_of_year = day_of_era - (365 * year_of_era + leap_days)  # From 1 March.
    shifted_month = ((5 * day_of_year + 2) / 153).floor()
    day = day_of_year - ((153 * shifted_month + 2) / 5).floor() + 1
    month = (shifted_month + 2) % 12 + 1
    return [days, month, day, (days + 3) % 7, (seconds % _DAY / 3600).floor()]


def _to_normal(numbers: Tensor, quantiles: Tensor) -> Tensor:
    """Return numbers `(N, M)` as those of a standard normal with the same quantile; `quantiles` is `(M, Q)`.

    Between two quantiles it interpolates, and equal quantiles map to their middle, as `QuantileTransformer` does. The
    ends differ: the k-th of Q quantiles has the probability (k + 1/2) / Q, so that no number is an outlier.
    """
    count = quantiles.shape[1]
    inputs = numbers.T.contiguous()
    if is_exporting():  # ONNX has no form of `searchsorted`, and counting takes the memory of all comparisons.
        first = (quantiles[:, None] < inputs[..., None]).sum(-1)
        last = (quantiles[:, None] <= inputs[..., None]).sum(-1)
    else:
        first = torch.searchsorted(quantiles, inputs, right=False)  # Quantiles below each number.
        last = torch.searchsorted(quantiles, inputs, right=True)
    left, right = (first - 1).clamp(min=0), first.clamp(max=count - 1)
    low, high = quantiles.gather(1, left), quantiles.gather(1, right)
    inside = left + (inputs - low) / (high - low).where(high > low, 1.0)
    position = inside.where(first == last, (first + last - 1) / 2).clamp(0, count - 1)
    probability = (position + 0.5) / count
    normal: Tensor = ndtri(probability) if is_exporting() else torch.special.ndtri(probability)
    return normal.where(~inputs.isnan(), torch.nan).T


def ndtri(probability: Tensor) -> Tensor:
    """Return the number below which a standard normal lies with a probability, from 1e-14 to 1 - 1e-14, float64.

    It is `torch.special.ndtri`, which ONNX does not have, to 15 digits, in 14 times its time.

    Source: Moshier, "Methods and Programs for Mathematical Functions" (1989), `ndtri` of Cephes.
    """
    tail = torch.minimum(probability, 1 - probability)
    offset = probability - 0.5
    square = offset * offset
    centre = (offset + offset * square * _ratio(square, _CENTRE)) * math.sqrt(2 * math.pi)
    root = (-2 * tail.log()).sqrt()
    far = root - root.log() / root - _ratio(1 / root, _TAIL) / root
    return centre.where(tail > math.exp(-2), far.where(offset > 0, -far))


def _ratio(values: Tensor, polynomials: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Return the ratio of two polynomials, whose coefficients begin with that of the highest power."""
    above, below = (reduce(lambda total, each: total * values + each, one, 0 * values) for one in polynomials)
    return above / below
