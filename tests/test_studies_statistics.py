"""The statistics and the pictures of the studies."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("statsmodels")
pytest.importorskip("scikit_posthocs")
pytest.importorskip("seaborn")

import pandas as pd
from scipy import stats

from studies import plots, statistics
from studies.statistics import Claim, Paired, against, compared, paired

UP = paired(np.arange(1.0, 11.0), np.zeros(10))  # p = 2 / 2¹⁰
DOWN = paired(np.zeros(10), np.arange(1.0, 11.0))
NOISE = paired([1.0, -2.0, 3.0, -4.0], np.zeros(4))


def records(*rows):
    return pd.DataFrame(rows, columns=["data", "act", "method", "seed", "accuracy"])


def table(**columns):
    return pd.DataFrame(columns)


def test_cells_average_the_seeds_and_drop_cells_without_a_method():
    frame = records(
        ("a", None, "x", 0, 1.0),
        ("a", None, "x", 1, 3.0),
        ("a", None, "y", 0, 5.0),
        ("a", None, "y", 1, math.inf),
        ("b", "relu", "x", 0, 1.0),
        ("b", "relu", "y", 0, math.nan),
        ("c", "relu", "y", 0, 1.0),
    )
    means = statistics.cells(frame, "accuracy", cell=["data", "act"], method="method")
    assert means.to_dict("list") == {"x": [2.0], "y": [5.0]}
    assert means.index.get_level_values("data").tolist() == ["a"]
    assert means.attrs == {"dropped": 2, "not_finite": 2}


def test_means_that_differ_in_the_last_bit_tie():
    assert (0.1 + 0.2) / 2 != (0.3 + 0.0) / 2
    rows = [("a", "relu", "x", 0, 0.1), ("a", "relu", "x", 1, 0.2)]
    rows += [("a", "relu", "y", 0, 0.3), ("a", "relu", "y", 1, 0.0)]
    means = statistics.cells(records(*rows), "accuracy", cell=["data"], method="method")
    assert statistics.ranks(means).to_dict() == {"x": 1.5, "y": 1.5}
    assert paired([0.1 + 0.2, 1e-9], [0.3, 0.0]).wins == 1


def test_paired_against_scipy():
    a = np.array([0.9, 0.8, 0.85, 0.7, 0.95, 0.6, 0.91])
    b = np.array([0.8, 0.82, 0.7, 0.66, 0.9, 0.61, 0.5])
    result = paired(a, b)
    difference = np.round(a - b, 12)
    interval = stats.bootstrap((difference,), np.mean, method="BCa", n_resamples=9999, rng=0)
    assert result.p == stats.wilcoxon(difference).pvalue == 10 / 2**7
    assert result.effect == pytest.approx(np.mean(a - b))
    assert [result.low, result.high] == pytest.approx(list(interval.confidence_interval))
    assert (result.n, result.wins, result.losses) == (7, 5, 2)
    assert paired(a, b) == result


@pytest.mark.parametrize(
    ("difference", "p"),
    [
        ([1, 2, 3, 4, 5], 0.0625),
        ([1, 1, 1, 1, 1], 0.0625),
        ([-1, -2], 0.5),
        ([0, 0, 0], 1.0),
        ([*range(1, 7), *[0] * 12], 2 / 2**6),  # zeros leave the test exact
    ],
)
def test_p_of_few_pairs_is_exact(difference, p):
    assert paired(np.array(difference, float), np.zeros(len(difference))).p == pytest.approx(p)


def test_paired_of_equal_differences_and_of_too_few():
    assert paired([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == Paired(3, 0.25, 1.0, 1.0, 1.0, 3, 0)
    assert paired([1.0, 1.0], [1.0, 1.0]) == Paired(2, 1.0, 0.0, 0.0, 0.0, 0, 0)
    one, none = paired([1.0], [0.0]), paired([], [])
    assert (one.n, one.effect, one.wins) == (1, 1.0, 1)
    assert none.n == 0
    assert all(map(math.isnan, (one.p, one.low, one.high, none.p, none.effect)))


def test_series_are_paired_by_their_index():
    a = pd.Series([3.0, 1.0, 9.0], index=["c", "a", "z"])
    b = pd.Series([0.5, 2.0], index=["a", "c"])
    assert (paired(a, b).n, paired(a, b).effect) == (2, 0.75)


@pytest.mark.parametrize(
    ("a", "b"), [([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, math.nan]), ([[1.0, 2.0]], [[1.0, 2.0]])]
)
def test_paired_refuses_what_is_not_two_finite_vectors_of_one_length(a, b):
    with pytest.raises(ValueError, match="expected"):
        paired(a, b)


def test_against_corrects_over_the_others_and_favours_the_better_method():
    errors = table(ours=[1.0, 1, 1, 1, 1], x=[2.0, 3, 4, 5, 6], y=[1.0, 0, 3, 1, 1])
    rows = against(errors, "ours", ["x", "y"], better=-1)
    assert rows.index.tolist() == ["ours vs x", "ours vs y"]
    assert rows["effect"].tolist() == [3.0, 0.2]
    assert rows["wins"].tolist() == [5, 1]
    assert rows["p"].tolist() == [0.0625, 1.0]
    assert rows["p_holm"].tolist() == [0.125, 1.0]


def test_ranks_share_ties_and_nemenyi_is_the_studentized_range():
    scores = table(a=[3.0, 3, 3, 2], b=[2.0, 2, 3, 1], c=[1.0, 1, 1, 0])
    ranks = statistics.ranks(scores)
    assert ranks.to_dict() == {"a": 1.125, "b": 1.875, "c": 3.0}
    matrix = statistics.nemenyi(scores)
    q = (ranks["c"] - ranks["a"]) / math.sqrt(3 * 4 / (6 * 4)) * math.sqrt(2)
    assert matrix.loc["a", "c"] == pytest.approx(stats.studentized_range.sf(q, 3, np.inf))
    friedman = stats.friedmanchisquare(*scores.to_numpy().T).pvalue
    assert matrix.attrs["friedman"] == pytest.approx(friedman)


def test_friedman_of_ties_and_of_too_little():
    same = table(a=[1.0, 2.0], b=[1.0, 2.0], c=[1.0, 2.0])
    assert statistics.nemenyi(same).attrs["friedman"] == 1.0
    assert math.isnan(statistics.nemenyi(same[["a", "b"]]).attrs["friedman"])
    assert statistics.nemenyi(same[:1]).isna().all(axis=None)


@pytest.mark.parametrize(
    ("pairs", "direction", "verdict"),
    [
        ([UP, UP], 1, "holds"),
        ([DOWN], -1, "holds"),
        ([UP, DOWN, NOISE], 1, "does not hold"),
        ([UP], -1, "does not hold"),
        ([UP, NOISE], 1, "undecided at this size"),
        ([UP, paired([1.0], [0.0])], 1, "undecided at this size"),
        ([], 1, "undecided at this size"),
    ],
)
def test_verdicts(pairs, direction, verdict):
    rows = compared({str(i): pair for i, pair in enumerate(pairs)})
    assert Claim("text", "abstract", rows, direction).verdict == verdict


def test_one_outlier_does_not_turn_a_verdict_around():
    difference = np.array([*np.linspace(0.01, 0.02, 19), -10.0])
    rows = compared({"diverged once": paired(difference, np.zeros(20))})
    assert rows["p_holm"].item() < 0.01
    assert rows["effect"].item() < 0 < rows["wins"].item() - rows["losses"].item()
    assert Claim("better", "abstract", rows).verdict == "undecided at this size"


def test_correction_is_over_the_comparisons_of_a_claim():
    p = (0.04, 0.01, 0.03, math.nan)
    rows = compared({str(i): Paired(10, x, 1.0, 0.5, 1.5, 10, 0) for i, x in enumerate(p)})
    # Sorted: 3 × 0.01, 2 × 0.03, and 1 × 0.04, which may not be below 0.06. NaN is no test.
    assert rows["p_holm"].tolist() == pytest.approx([0.06, 0.03, 0.06, math.nan], nan_ok=True)
    assert compared({}).empty


def test_claims_table():
    rows = compared({"x vs y": UP, "|x| vs z": paired([1.0], [0.0])})
    rows["p_holm"] *= 10
    claims = [Claim("x is best", "abstract", rows), Claim("later", "section 4", rows[:0])]
    low, high = f"{UP.low:+.3g}", f"{UP.high:+.3g}"
    assert statistics.claims_table(claims).splitlines() == [
        "| Claim | Test | n | p, corrected | Wins–losses | Effect [95% interval] | Verdict |",
        "|:--|:--|--:|--:|--:|:--|:--|",
        f"| x is best (abstract) | x vs y | 10 | 0.020 | 10–0 | +5.5 [{low}, {high}] "
        "| undecided at this size |",
        "|  | \\|x\\| vs z | 1 | – | 1–0 | +1 |  |",
        "| later (section 4) | – | 0 | – | – | – | undecided at this size |",
    ]
    more = [Claim("x is best", "abstract", rows.iloc[:1].assign(other=0.25))]
    lines = statistics.claims_table([*more, *claims[1:]]).splitlines()
    assert lines[0].endswith("| Effect [95% interval] | other | Verdict |")
    assert lines[2].endswith("| 0.250 | holds |")
    assert {line.count(" |") for line in lines[2:]} == {8}


def test_methods_look_different():
    looks = plots.look([str(i) for i in range(20)])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 20


def test_pictures_are_the_same_each_time(tmp_path):
    scores = np.random.default_rng(0).normal(size=(12, 6))
    methods = pd.DataFrame(scores, columns=list("abcdef"))
    long = methods.assign(size=[10, 100, 1000] * 4).melt("size", var_name="method")
    rows = against(methods, "a", list("bcdef"))
    rows.loc["one pair"] = rows.iloc[0].mul(math.nan)
    for name in ("1", "2"):
        plots.critical_difference(methods, tmp_path / name / "ranks.png", "t", better="lower")
        plots.lines(long, "size", "value", "method", tmp_path / name / "lines.png", log_x=True)
        plots.effects(rows, tmp_path / name / "effects.png", "t")
    written = sorted((tmp_path / "1").iterdir())
    assert len(written) == 3
    for path in written:
        data = path.read_bytes()
        assert data == (tmp_path / "2" / path.name).read_bytes()
        assert b"matplotlib" not in data.lower()


def test_the_best_method_ranks_first(monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: figure.axes[0])
    scores = table(low=[1.0] * 9, middle=[2.0] * 9, high=[3.0] * 9)
    for better, best, worst in (("higher", "high", "low"), ("lower", "low", "high")):
        axes = plots.critical_difference(scores, "unused", "title", better)
        texts = [text.get_text().strip() for text in axes.texts]
        assert texts == [f"{best}  1.00", "middle  2.00", f"3.00  {worst}"]
        assert "9 cells" in axes.get_title()


@pytest.mark.slow
def test_ranks_are_drawn_alike_whatever_the_hashes_of_names(tmp_path):
    program = """if True:
        import sys
        import pandas as pd
        from studies import plots
        frame = pd.DataFrame([[(i * j) % 7 for j in range(2, 8)] for i in range(1, 6)])
        frame.columns = ["ann", "bob", "cat", "dog", "eve", "fox"]
        plots.critical_difference(frame.astype(float), sys.argv[1], "t")
    """
    pictures = set()
    for seed in "123":
        path = tmp_path / f"{seed}.png"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        subprocess.run([sys.executable, "-c", program, path], env=environment, check=True)
        pictures.add(path.read_bytes())
    assert len(pictures) == 1


def test_pictures_refuse_what_they_would_draw_wrongly(tmp_path):
    frame = pd.DataFrame({"weight": [0.0, 1.0], "y": [1.0, 2.0], "method": ["a", "a"]})
    with pytest.raises(ValueError, match="log_x needs positive values of 'weight'"):
        plots.lines(frame, "weight", "y", "method", tmp_path / "a.png", log_x=True)
    with pytest.raises(ValueError, match="better must be"):
        plots.critical_difference(table(a=[1.0], b=[2.0]), tmp_path / "a.png", "t", better="up")
    with pytest.raises(ValueError, match="at least two cells"):
        plots.critical_difference(table(a=[1.0], b=[2.0]), tmp_path / "a.png", "t")
