"""Statistics of a factorial study: comparisons of methods over cells, and verdicts on claims.

A record of a study is one training and one row of a frame. A cell is a setting in which every
method was trained, such as a data set and an activation. All methods are compared on the same
cells, and a cell counts once, however many seeds it has. The tests take the cells as independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import scikit_posthocs
from scipy import stats
from statsmodels.stats.multitest import multipletests

LEVEL = 0.05
RESAMPLES = 9999
SEED = 0


def _rounded(values: Any, scale: float) -> Any:
    """``values`` to 12 digits of ``scale``: sums of floats that should tie differ in the 16th."""
    return np.round(values, 12 - int(np.ceil(np.log10(scale)))) if scale > 0 else values


def cells(frame: pd.DataFrame, metric: str, *, cell: Sequence[str], method: str) -> pd.DataFrame:
    """The mean of ``metric`` over the seeds, with a row for each cell and a column for each method.

    A mean is over the finite values of a cell. A cell in which a method has none is left out, for
    all methods.

    Args:
        frame: the records.
        metric: the column to average.
        cell: the columns that together name a cell.
        method: the column that names the methods.

    Returns:
        The table. Its ``attrs`` hold ``"dropped"``, the number of cells left out, and
        ``"not_finite"``, the number of records whose value is NaN or infinite.
    """
    finite = frame[metric].where(np.isfinite(frame[metric].astype(float)))
    means = finite.groupby([frame[name] for name in (*cell, method)], dropna=False).mean()
    table = means.unstack(method)
    kept = table.dropna()
    kept = _rounded(kept, kept.abs().to_numpy().max(initial=0.0))
    kept.attrs = {
        "dropped": len(table) - len(kept),
        "not_finite": int(finite.isna().sum()),
    }
    return kept


def matching(frame: pd.DataFrame, other: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The rows whose values in the columns ``names`` occur together in another frame."""
    return frame.merge(other[list(names)].drop_duplicates(), on=list(names))


@dataclass(frozen=True)
class Paired:
    """A comparison of ``a`` with ``b`` over ``n`` pairs; see :func:`paired`."""

    n: int
    p: float
    effect: float
    low: float
    high: float
    wins: int
    losses: int


def paired(a: Any, b: Any) -> Paired:
    """Compares two arrays of paired values with the Wilcoxon signed-rank test.

    Two Series are paired by their index, and what is in only one of them is left out. To compare
    two advantages, pass two arrays of differences.

    ``p`` is two-sided and NaN if there are fewer than two pairs. It is exact for up to 50 pairs,
    or 13 if some differences tie, and otherwise from the normal distribution. Pairs without a
    difference count in ``n`` but not in the test. With five pairs ``p`` is at least 0.0625.

    ``effect`` is the mean of ``a - b``; ``low`` and ``high`` are its 95% bootstrap interval (BCa,
    or percentile where BCa is undefined), with a fixed seed. The interval is not corrected and is
    too narrow for a few pairs, so it may exclude 0 where ``p`` is large. ``wins`` and ``losses``
    count the pairs with a positive and a negative difference.
    """
    if isinstance(a, pd.Series) and isinstance(b, pd.Series):
        a, b = a.align(b, join="inner")
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two vectors of one length, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("expected finite values; leave out the pairs without one")
    difference = _rounded(a - b, np.abs([a, b]).max(initial=0.0))
    n = len(difference)
    effect = float(difference.mean()) if n else np.nan
    p = low = high = np.nan
    if n >= 2:
        low, high = _interval(difference)
        # Wilcoxon's own treatment of zeros; left in, they make scipy give up the exact p.
        nonzero = difference[difference != 0]
        p = float(stats.wilcoxon(nonzero).pvalue) if len(nonzero) else 1.0
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return Paired(n, p, effect, low, high, wins, losses)


def _interval(difference: np.ndarray) -> tuple[float, float]:
    # BCa is 0 / 0 where all differences are equal.
    method = "BCa" if np.ptp(difference) > 0 else "percentile"
    low, high = stats.bootstrap(
        (difference,), np.mean, n_resamples=RESAMPLES, method=method, rng=SEED
    ).confidence_interval
    return float(low), float(high)


def holm(p: pd.Series) -> pd.Series:
    """Holm's correction of the values that are not NaN; statsmodels would count NaN as a test."""
    known = p.dropna()
    corrected = multipletests(known, method="holm")[1] if len(known) else known
    return pd.Series(corrected, index=known.index, dtype=float).reindex(p.index)


def compared(pairs: Mapping[str, Paired]) -> pd.DataFrame:
    """A row for each comparison, with the fields of :class:`Paired` and ``p_holm``.

    Args:
        pairs: the comparisons by their names, which become the index.
    """
    rows = pd.DataFrame([asdict(pair) for pair in pairs.values()], index=list(pairs))
    if rows.empty:
        rows = rows.reindex(columns=list(Paired.__dataclass_fields__))
    return rows.assign(p_holm=holm(rows["p"].reset_index(drop=True)).to_numpy())


def against(
    table: pd.DataFrame, method: str, others: Sequence[str], *, better: int = 1
) -> pd.DataFrame:
    """Compares one method with each of the others over the cells of ``table``.

    Args:
        table: the table of :func:`cells`.
        method: the method compared.
        others: the methods it is compared with.
        better: 1 if higher values are better, −1 if lower ones are. A positive ``effect`` and a
            win always mean that ``method`` is better.

    Returns:
        The rows of :func:`compared`, with Holm's correction over ``others``.
    """
    signed = better * table
    names = {other: f"{method} vs {other}" for other in others}
    return compared({names[other]: paired(signed[method], signed[other]) for other in others})


def ranks(table: pd.DataFrame) -> pd.Series:
    """The mean rank of each method over the cells; 1 is the highest value, and ties share a rank.

    For a metric whose lower values are better, pass ``-table``.
    """
    return table.rank(axis=1, ascending=False).mean()


def nemenyi(table: pd.DataFrame) -> pd.DataFrame:
    """The p-values of Nemenyi's test for each two methods, on the ranks of :func:`ranks`.

    Returns:
        A symmetric table. Its ``attrs["friedman"]`` is the p-value of the Friedman test that all
        methods rank alike, and NaN for fewer than three methods or two cells.
    """
    if len(table) < 2:
        matrix = pd.DataFrame(np.nan, index=table.columns, columns=table.columns)
        matrix.attrs["friedman"] = np.nan
        return matrix
    matrix = scikit_posthocs.posthoc_nemenyi_friedman(table)
    if table.shape[1] < 3:
        friedman = np.nan
    elif (table.nunique(axis=1) == 1).all():
        friedman = 1.0
    else:
        friedman = float(stats.friedmanchisquare(*table.to_numpy().T).pvalue)
    matrix.attrs["friedman"] = friedman
    return matrix


@dataclass(frozen=True)
class Claim:
    """A claim of a paper and the comparisons that test it.

    Args:
        text: the claim.
        source: where it is made, such as ``"abstract"``.
        results: the rows of :func:`against` or :func:`compared`.
        direction: the sign that the claim gives to each effect, 1 or −1.
    """

    text: str
    source: str
    results: pd.DataFrame
    direction: int = 1

    @property
    def verdict(self) -> str:
        """``"holds"``, ``"does not hold"`` or ``"undecided at this size"``.

        A claim holds if every comparison is significant (``p_holm`` below 0.05) in its direction.
        It does not hold if one is significant in the opposite direction. A comparison in which the
        mean has one sign and most of the pairs have the other has no direction.
        """
        rows = self.results
        sign = np.sign(rows["effect"])
        agree = sign == np.sign(rows["wins"] - rows["losses"])
        found = sign.where(agree & (rows["p_holm"] < LEVEL), 0.0) * self.direction
        if (found < 0).any():
            return "does not hold"
        return "holds" if len(found) and (found > 0).all() else "undecided at this size"


def claims_table(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table with a row for each comparison.

    Further columns of the results, p-values of other tests of the same comparison, come before the
    verdict under their names.
    """
    known = {*Paired.__dataclass_fields__, "p_holm"}
    others = list(dict.fromkeys(n for c in claims for n in c.results.columns if n not in known))
    names = ["Claim", "Test", "n", "p, corrected", "Wins–losses", "Effect [95% interval]", *others]
    lines = [
        f"| {' | '.join([*names, 'Verdict'])} |",
        "|:--|:--|--:|--:|--:|:--|" + "--:|" * len(others) + ":--|",
    ]
    for claim in claims:
        first = f"{claim.text} ({claim.source})", claim.verdict
        tests = [
            (
                *(str(name), f"{row.n:.0f}", _p(row.p_holm), f"{row.wins:.0f}–{row.losses:.0f}"),
                *(_effect(row), *(_p(row.get(other, np.nan)) for other in others)),
            )
            for name, row in claim.results.iterrows()
        ]
        for index, test in enumerate(tests or [("–", "0", *"–" * (3 + len(others)))]):
            text, verdict = ("", "") if index else first
            row = (part.replace("|", "\\|") for part in (text, *test, verdict))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _p(p: float) -> str:
    if np.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _effect(row: pd.Series) -> str:
    if np.isnan(row.low):
        return "–" if np.isnan(row.effect) else f"{row.effect:+.3g}"
    return f"{row.effect:+.3g} [{row.low:+.3g}, {row.high:+.3g}]"
