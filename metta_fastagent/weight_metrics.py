"""Singular-value metrics of weight matrices: norms, conditioning, power-law fit, effective rank.

With singular values s_1 >= ... >= s_n of a weight and `live` the values above ZERO_SV:

    sv_ratio         s_1 / min(live)
    collapsed_dim_%  (n - |live|) / n, a fraction from 0 to 1 despite its name
    sv_loglog_*      least-squares line through (log k, log(s_k + ZERO_SV)) for k = 1 ... |live|
    effective_rank   min{k : s_1 + ... + s_k >= (1 - delta) (s_1 + ... + s_n)}

The effective rank is `srank_delta` of Kumar et al. 2020, "Implicit Under-Parameterization Inhibits Data-Efficient
Deep Reinforcement Learning".

Singular values are computed in float64 for every dtype (float32 on devices without float64, such as mps).
In float32 a duplicated column leaves a singular value near 1e-7 x s_1, which an absolute limit of 1e-10 never catches.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from metta_fastagent.runtime.checks import require_number

# Singular values up to this count as zero; also added inside the logarithm of the fit.
ZERO_SV = 1e-10
# A power law is fitted only to more singular values than this.
MAX_UNFITTED = 5
# Elements per batch of stacked weights: limits the float64 copy to 0.5 GiB.
MAX_BATCH_ELEMENTS = 1 << 26
# Columns of the transferred table, which has one row per weight.
COLUMNS = (
    "bad_values",
    "weight_norm",
    "mean_sv",
    "largest_sv",
    "sv_ratio",
    "collapsed_dim_%",
    "sv_loglog_r2",
    "sv_loglog_slope",
    "effective_rank",
)


def analyze_weights(weights: Mapping[str, Tensor], delta: float = 0.01) -> list[dict[str, float | int | str]]:
    """Singular-value metrics of every weight, one dict per entry of `weights` and in its order.

    Draws no random numbers and does not change the weights. Weights of equal shape, transposed or not, share one
    svdvals call. The results reach the host in one transfer per device (svdvals itself may wait for CUDA).

    Args:
        weights: name -> floating-point matrix [m, n], each on any device.
        delta: fraction of the sum of singular values that `effective_rank` may leave out, 0 <= delta < 1.

    Returns:
        Dicts with `name`, `weight_norm` (Frobenius), `mean_sv`, `largest_sv`, `sv_ratio` (0.0 where no singular value
        is above 1e-10), `collapsed_dim_%` (a fraction, 0 to 1), `effective_rank` (int, at least 1) and, for weights
        with more than 5 singular values, `sv_loglog_r2` and `sv_loglog_slope` (both 0.0 where fewer than two values are
        above 1e-10 or the spectrum is flat to the rounding of the weight's dtype). For a weight that is empty or not
        finite, or whose singular values do not converge: only `name`, `weight_norm` and `svd_error` (a sentence).

    Raises:
        TypeError: `weights` is not a mapping of names to floating-point tensors, or `delta` is not a real number.
        ValueError: a weight is not 2-D, or `delta` is outside [0, 1).

    Example:
        >>> (metrics,) = analyze_weights({"layer": torch.eye(3)})
        >>> metrics["largest_sv"], metrics["effective_rank"]
        (1.0, 3)
    """
    _check_weights(weights)
    _check_delta(delta)
    by_device = defaultdict(dict)
    for name, weight in weights.items():
        if weight.numel() > 0:
            by_device[weight.device][name] = weight
    rows: dict[str, list[float]] = {}
    for on_device in by_device.values():
        names, table = _metrics_table(on_device, float(delta))
        rows.update(zip(names, table.tolist(), strict=True))
    return [_record(name, weight, rows.get(name)) for name, weight in weights.items()]


def _check_weights(weights: object) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: got {type(weights).__name__}, expected a mapping of names to matrices")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise TypeError(f"weights: got the name {name!r} ({type(name).__name__}), expected a string")
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{name!r}]: got {type(weight).__name__}, expected a tensor")
        if not weight.dtype.is_floating_point:
            raise TypeError(f"weights[{name!r}]: got {weight.dtype}, expected a floating-point dtype")
        if weight.dim() != 2:
            raise ValueError(f"weights[{name!r}]: got shape {list(weight.shape)}, expected two dimensions")


def _check_delta(delta: object) -> None:
    if not 0 <= require_number("delta", delta, "a real number in [0, 1)") < 1:
        raise ValueError(f"delta: got {delta!r}, expected a real number in [0, 1)")


@torch.no_grad()
def _metrics_table(weights: dict[str, Tensor], delta: float) -> tuple[list[str], Tensor]:
    """Names and their rows [len(weights), len(COLUMNS)] for non-empty matrices of one device; reads nothing back."""
    names, tables = [], []
    for batch in _batches(weights):
        # Same orientation for all: a matrix and its transpose have the same singular values.
        wide = [w if w.shape[0] <= w.shape[1] else w.mT for w in (weights[name] for name in batch)]
        tables.append(_batch_table(torch.stack(wide), delta))
        names.extend(batch)
    return names, torch.cat(tables)


def _batches(weights: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names of weights that can be stacked: equal dtype and equal shape up to transposition."""
    groups = defaultdict(list)
    for name, weight in weights.items():
        groups[(weight.dtype, *sorted(weight.shape))].append(name)
    for (_, rows, columns), names in groups.items():
        size = max(1, MAX_BATCH_ELEMENTS // (rows * columns))
        for start in range(0, len(names), size):
            yield names[start : start + size]


def _batch_table(stacked: Tensor, delta: float) -> Tensor:
    """Rows [b, len(COLUMNS)] of a stack [b, m, n] with m <= n."""
    raw = stacked.to(torch.float32 if stacked.device.type == "mps" else torch.float64)
    bad_values = (~raw.isfinite()).sum((1, 2))
    sv = _singular_values(raw.where((bad_values == 0)[:, None, None], 0.0))
    live = sv > ZERO_SV
    largest = sv[:, 0]
    # Without any live value the smallest is inf, which makes the ratio 0.
    smallest = sv.where(live, math.inf).amin(1)
    flat_spread = 4 * torch.finfo(stacked.dtype).eps * math.sqrt(stacked.shape[2])
    r2, slope = _loglog_fit(sv, live, flat_spread)
    partial_sums = sv.cumsum(1)
    effective_rank = (partial_sums < (1 - delta) * partial_sums[:, -1:]).sum(1) + 1
    columns = (
        bad_values,
        torch.linalg.vector_norm(raw, dim=(1, 2)),
        sv.mean(1),
        largest,
        largest / smallest,
        (~live).to(raw.dtype).mean(1),
        r2,
        slope,
        effective_rank,
    )
    return torch.stack([column.to(raw.dtype) for column in columns], dim=1)


def _singular_values(stacked: Tensor) -> Tensor:
    """Singular values [b, m] of finite matrices [b, m, n], largest first; NaN for a matrix that does not converge."""
    try:
        return torch.linalg.svdvals(stacked)
    except LinAlgError:
        if stacked.shape[0] == 1:
            return stacked.new_full(stacked.shape[:2], math.nan)
    return torch.cat([_singular_values(one) for one in stacked.split(1)])


def _loglog_fit(sv: Tensor, live: Tensor, flat_spread: float) -> tuple[Tensor, Tensor]:
    """R^2 [b] and slope [b] of the line through (log k, log s_k) over the live ones of sv [b, n].

    A spectrum whose largest and smallest live values are within a factor exp(flat_spread) gets slope and R^2 0: the
    rest is rounding, and because the values are sorted, even rounding errors fit a line well.
    """
    count = live.sum(1, keepdim=True).clamp_min(1)
    x = torch.arange(1, sv.shape[1] + 1, device=sv.device, dtype=sv.dtype).log().expand_as(sv)
    y = (sv + ZERO_SV).log()
    dx = (x - x.where(live, 0.0).sum(1, keepdim=True) / count).where(live, 0.0)
    dy = (y - y.where(live, 0.0).sum(1, keepdim=True) / count).where(live, 0.0)
    sxx, sxy, syy = (dx * dx).sum(1), (dx * dy).sum(1), (dy * dy).sum(1)
    sloped = y[:, 0] - y.where(live, math.inf).amin(1) > flat_spread
    r2 = (sxy * sxy / (sxx * syy)).clamp_max(1.0)
    return r2.where(sloped, 0.0), (sxy / sxx).where(sloped, 0.0)


def _record(name: str, weight: Tensor, row: list[float] | None) -> dict[str, float | int | str]:
    """The dict of one weight from its transferred row; None for an empty weight, which has none."""
    if row is None:
        return {"name": name, "weight_norm": 0.0, "svd_error": f"the weight is empty: shape {list(weight.shape)}"}
    values = dict(zip(COLUMNS, row, strict=True))
    bad_values = int(values.pop("bad_values"))
    record: dict[str, float | int | str] = {"name": name, "weight_norm": values.pop("weight_norm")}
    if bad_values:
        record["svd_error"] = f"{bad_values} of the weight's {weight.numel()} values are NaN or infinite"
    elif math.isnan(values["largest_sv"]):
        record["svd_error"] = "the singular value decomposition did not converge"
    else:
        if min(weight.shape) <= MAX_UNFITTED:
            del values["sv_loglog_r2"], values["sv_loglog_slope"]
        record |= values
        record["effective_rank"] = int(values["effective_rank"])
    return record
