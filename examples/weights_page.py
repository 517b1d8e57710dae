"""The tables and the picture of docs/WEIGHT.md, from the records of ``examples/weights.py`` alone.

    python examples/weights_page.py docs/WEIGHT.md [--records DIR]

replaces the text between ``<!-- weights: TABLE -->`` and ``<!-- weights: end -->``, where TABLE is
a key of ``TABLES``, and writes weights.png next to the records.
"""

import csv
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from matplotlib.ticker import LogLocator
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
Rule = Callable[[Row], float]
# Each rule is a number of the training without a penalty. A share of, say, a tenth divided by that
# number is the weight.
RULES: dict[str, Rule] = {
    "value / loss, before training": lambda row: row["value_start"] / row["loss_start"],
    "value / loss, after a tenth of the steps": lambda row: row["value_later"] / row["loss_later"],
    "value after training / loss before it": lambda row: row["value_end"] / row["loss_start"],
    "gradient norms, before training": lambda row: row["gradients_start"],
    "gradient norms, after a tenth of the steps": lambda row: row["gradients_later"],
}
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)
TENTH = next(iter(RULES))
ORDER = ("DREG", "DREG, mean", "SpectReg", "DataGrad", "FrobReg")
PENALTIES = tuple(name for name in ORDER if name != "DREG, mean")
SIDES = ("digits, 8 px", "digits, 16 px", "digits, 32 px")
VARIED = {
    "inputs": "16, 64, 256 inputs",
    "width": "width 64, 256, 1024",
    "classes": "2, 10, 100 classes",
    "side": "8, 32, 64 pixels",
}
INK = "#22262b"
FOLDER = Path(__file__).parent / "pictures"
# The colours of Okabe and Ito, which the colour-blind can tell apart, and a marker for each.
LOOKS = {
    **{"digits": "#0072b2 o", "cancer": "#e69f00 s", "wine": "#cc79a7 D", "clusters": "#009e73 ^"},
    **{"moons": "#d55e00 v", "digits, 8 px": "#56b4e9 P", "digits, 16 px": "#000000 X"},
    "digits, 32 px": "#8a8a8a *",
}


def read(name: str, folder: Path = FOLDER) -> tuple[str, list[Row]]:
    """The note in the first line of a file of records, and the rows with their numbers."""
    note, *lines = (folder / name).read_text().splitlines()
    rows: list[Row] = [dict(row) for row in csv.DictReader(lines)]
    for row in rows:
        row.update({k: float(v) for k, v in row.items() if k not in ("data", "penalty", "varied")})
    return note.removeprefix("# "), rows


class Curve:
    """The trainings of one data set with one penalty.

    Attributes:
        weights: The weights of the sweep, without 0.
        plain: The records of the weight 0, one for each seed.
        base, test: The test accuracies of the weight 0, ``[seeds]``, and of the others,
            ``[weights, seeds]``.
        best: The index of the weight with the best mean accuracy.
        low, high: The indices of the smallest and the largest weight that are as good as the best:
            the mean of the differences, paired by seed, is at most its standard error, and the same
            holds for all weights from there to the best one.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = sorted(rows, key=lambda row: (row["weight"], row["seed"]))
        self.weights = sorted({row["weight"] for row in rows} - {0.0})
        self.plain = [row for row in self.rows if row["weight"] == 0]
        values = self.of("test")
        self.base, self.test = values[0], values[1:]
        self.best = self.low = self.high = int(self.test.mean(1).argmax())
        while self.low > 0 and self.as_good(self.low - 1):
            self.low -= 1
        while self.high < len(self.weights) - 1 and self.as_good(self.high + 1):
            self.high += 1
        self.gain, self.error = mean_and_error(self.test[self.best] - self.base)

    def of(self, column: str) -> Tensor:
        """A column of the records, ``[1 + weights, seeds]``; the first row is that of weight 0."""
        column_ = torch.tensor([row[column] for row in self.rows], dtype=torch.float64)
        return column_.view(1 + len(self.weights), -1)

    def as_good(self, index: int) -> bool:
        mean, error = mean_and_error(self.test[self.best] - self.test[index])
        return mean <= error

    def factor(self, weight: float) -> float:
        """How far a weight is from the best one, at least 1."""
        return math.exp(abs(math.log(weight / self.weights[self.best])))

    def lands(self, weight: float) -> bool:
        """Whether it is within three of the best weight, rounded as the sweep is, or as good."""
        within = self.weights[self.low] <= weight <= self.weights[self.high]
        return within or self.factor(weight) < 3.4

    def harm(self, points: float) -> float:
        """The weight above the best one at which the accuracy is so far below the plain one."""
        logs, mean = [math.log(w) for w in self.weights], (self.test.mean(1) - self.base.mean())
        for i in range(self.best, len(logs) - 1):
            if mean[i + 1] <= -points:
                part = (mean[i] + points) / (mean[i] - mean[i + 1])
                return math.exp(logs[i] + part.item() * (logs[i + 1] - logs[i]))
        return math.inf

    def lost(self, weight: float) -> float:
        """Percentage points below the best mean, interpolated between the weights of the sweep."""
        mean, logs = self.test.mean(1).tolist(), [math.log(w) for w in self.weights]
        at = min(max(math.log(weight), logs[0]), logs[-1])
        i = max(i for i, left in enumerate(logs[:-1]) if left <= at)
        part = (at - logs[i]) / (logs[i + 1] - logs[i])
        return max(mean) - (1 - part) * mean[i] - part * mean[i + 1]

    def start(self, rule: str, share: float) -> float:
        """The weight that a rule gives: the geometric mean over the seeds."""
        logs = [math.log(share / max(RULES[rule](row), 1e-30)) for row in self.plain]
        return math.exp(sum(logs) / len(logs))


Curves = dict[tuple[str, str], Curve]


def curves_of(rows: list[Row]) -> Curves:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["penalty"], row["data"]), []).append(row)
    return {key: Curve(group) for key, group in groups.items()}


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over the seeds, and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def number(value: float) -> str:
    """Two digits, without an exponent down to 0.00001, and with commas."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value < 1e-6:
        return f"{value:.0e}"
    text = f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}".replace("-", "−")


def gain_of(curve: Curve) -> str:
    return f"{signed(curve.gain)} ± {curve.error:.1f}"


def weights_of(curve: Curve) -> tuple[str, str]:
    """The best weight, and those that are as good."""
    low, high = (number(curve.weights[i]) for i in (curve.low, curve.high))
    return number(curve.weights[curve.best]), low if low == high else f"{low} to {high}"


# ---- tables: each returns its lines


def table(head: str, rows: list[list[str]]) -> list[str]:
    """A table whose first column is text and whose other columns are numbers."""
    rule = "|---|" + "---:|" * head.count("|")
    return [f"| {head} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)]


def made(curves: Curves, note: str) -> list[str]:
    seeds = next(iter(curves.values())).test.shape[1]
    trainings = sum(len(curve.rows) for curve in curves.values())
    return [f"The records are of {trainings:,} trainings, {seeds} seeds each: {note}."]


def starts(curves: Curves) -> list[str]:
    """For each penalty: the best weights, a tenth, the best of all rules, one weight for all."""
    rows = []
    for penalty in PENALTIES:
        mine = {data: curve for (name, data), curve in curves.items() if name == penalty}

        def judged(weights: list[float], mine: dict[str, Curve] = mine) -> tuple[float, list[str]]:
            pairs = list(zip(mine.values(), weights, strict=True))
            lost = [curve.lost(weight) for curve, weight in pairs]
            gain = sum(c.gain - less for (c, _), less in zip(pairs, lost, strict=True)) / len(pairs)
            worst = max(curve.factor(weight) for curve, weight in pairs)
            hits = f"{sum(curve.lands(weight) for curve, weight in pairs)} of {len(pairs)}"
            return gain, [signed(gain), f"{max(lost):.1f}", number(worst), hits]

        every = list(mine.values())
        by_rule = {
            (rule, share): judged([curve.start(rule, share) for curve in every])
            for rule, share in product(RULES, SHARES)
        }
        rule, share = max(by_rule, key=lambda key: by_rule[key][0])
        common = sorted(set.intersection(*(set(curve.weights) for curve in every)))
        fixed = max(common, key=lambda weight: judged([weight] * len(every))[0])
        best = judged([curve.weights[curve.best] for curve in every])
        rows += [
            [penalty, "the best weight of each data set", *best[1]],
            ["", f"0.1: {TENTH}", *by_rule[TENTH, 0.1][1]],
            ["", f"{share:g}: {rule}", *by_rule[rule, share][1]],
            ["", f"the weight {number(fixed)} for all", *judged([fixed] * len(every))[1]],
        ]
    return table("penalty | start | mean gain | most lost | worst factor | within three", rows)


def rules(curves: Curves) -> list[str]:
    rows = []
    for rule in RULES:
        cells = []
        for share in SHARES:
            pairs = [(curve, curve.start(rule, share)) for curve in curves.values()]
            hits = sum(curve.lands(weight) for curve, weight in pairs)
            cells.append(f"{hits}; {number(max(curve.factor(weight) for curve, weight in pairs))}")
        rows.append([rule, *cells])
    return table(" | ".join(["share of", *(f"{share:g}" for share in SHARES)]), rows)


def best(curves: Curves) -> list[str]:
    rows = []
    for (penalty, data), curve in sorted(curves.items(), key=lambda item: ORDER.index(item[0][0])):
        tenth = curve.start(TENTH, 0.1)
        factor = number(curve.factor(tenth))
        shares = [curve.of(f"share_{when}")[1 + curve.best].mean() for when in ("start", "end")]
        row = [penalty, data, f"{curve.base.mean():.1f}", gain_of(curve), *weights_of(curve)]
        row += [number(tenth), f"**{factor}**" if curve.lands(tenth) else factor]
        rows.append(
            [*row, f"{curve.lost(tenth):.1f}", " → ".join(number(s.item()) for s in shares)]
        )
    head = "penalty | data | plain, % | gain, ± s.e. | best weight | as good | a tenth | factor"
    return table(f"{head} | lost | share of the loss at the best weight", rows)


def ends(curves: Curves) -> list[str]:
    """What is seen at the smallest and at the largest weight of each sweep, and between."""
    rows = []
    for penalty in PENALTIES:
        mine = [curve for (name, _), curve in curves.items() if name == penalty]
        small = [(curve.test[0].mean() - curve.base.mean()).item() for curve in mine]
        cells = [f"{signed(min(small))} to {signed(max(small))}"]
        for step in (10, 100):
            lost = [curve.lost(step * curve.weights[curve.best]) for curve in mine]
            cells.append(f"{min(lost):.1f} to {max(lost):.1f}")
        for column in ("test", "train", "loss_end", "spread"):
            values = [curve.of(column).mean(1) for curve in mine]
            plain, last = (sum(v[i].item() for v in values) / len(values) for i in (0, -1))
            cells.append(f"{number(plain)} → {number(last)}")
        rows.append([penalty, *cells])
    head = "penalty | smallest weight: gain | 10 × best: lost | 100 × best: lost"
    return table(f"{head} | test, % | train, % | training loss | spread of the outputs", rows)


def scale(rows: list[Row]) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["penalty"], row["varied"]), []).append(row)
    cells = []
    for penalty in ORDER:
        line = [penalty]
        for varied in VARIED:
            values = [number(row["value"]) for row in groups.get((penalty, varied), ())]
            line.append(", ".join(v.replace(",", "") for v in values) or "as DREG")
        cells.append(line)
    return table(" | ".join(["penalty", *VARIED.values()]), cells)


def positions(curves: Curves) -> list[str]:
    rows = []
    for setting, data in product(("DREG", "DREG, mean"), SIDES):
        curve = curves[setting, data]
        name = f'`"{"mean" if "mean" in setting else "sum"}"`'
        value = number(curve.of("value_start")[0].mean().item())
        at = signed(curve.gain - curve.lost(10**-2.5))
        row = [name, data, value, gain_of(curve), *weights_of(curve)]
        rows.append([*row, number(curve.harm(1.0)), at])
    head = "`positions` | data | value | gain, ± s.e. | best weight | as good | one point lost at"
    return table(f"{head} | gain at 0.0032", rows)


def update(text: str, folder: Path = FOLDER) -> str:
    """The text of the page with the tables between its markers renewed."""
    note, rows = read("weights.csv", folder)
    curves = curves_of(rows)
    tables: dict[str, Callable[[], list[str]]] = {
        "made": lambda: made(curves, note),
        "starts": lambda: starts(curves),
        "rules": lambda: rules(curves),
        "best": lambda: best(curves),
        "ends": lambda: ends(curves),
        "scale": lambda: scale(read("weights_scale.csv", folder)[1]),
        "positions": lambda: positions(curves),
    }

    def renewed(found: re.Match[str]) -> str:
        lines = tables.pop(found[1])()  # KeyError: a marker names no table, or one twice
        return "\n".join([f"<!-- weights: {found[1]} -->", *lines, "<!-- weights: end -->"])

    pattern = r"<!-- weights: (?!end -->)(\S+) -->.*?<!-- weights: end -->"
    page = re.sub(pattern, renewed, text, flags=re.DOTALL)
    if tables:
        raise ValueError(f"The page has no <!-- weights: TABLE --> for {', '.join(tables)}.")
    return page


def draw(curves: Curves, path: Path) -> None:
    """Draw the gain over no penalty, against the weight and against the share of the loss."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 6), sharey=True, layout="constrained")
    for (penalty, data), curve in curves.items():
        if penalty not in PENALTIES:
            continue
        colour, marker = LOOKS[data].split()
        gain = (curve.test.mean(1) - curve.base.mean()).clamp(min=-15)
        for line, unit in enumerate((1.0, curve.start(TENTH, 1.0))):
            axis = axes[line, PENALTIES.index(penalty)]
            places = [weight / unit for weight in curve.weights]
            axis.plot(places, gain, color=colour, lw=1, marker=marker, ms=3, mew=0)
            dot = {
                "color": colour,
                "marker": marker,
                "ms": 9,
                "mec": "white",
                "mew": 0.6,
                "ls": "none",
            }
            axis.plot(places[curve.best], gain[curve.best], label=data, zorder=3, **dot)
    for column, penalty in enumerate(PENALTIES):
        axes[0, column].set_title(penalty, fontsize=10, loc="left")
        axes[0, column].set_xlabel("weight", fontsize=9)
        axes[1, column].set_xlabel("weight × value / loss,\nbefore training", fontsize=9)
        axes[1, column].axvline(0.1, color=INK, lw=0.9, ls="--")
    for axis in axes.flat:
        axis.axhline(0, color=INK, lw=0.8, zorder=0)
        axis.set(xscale="log", ylim=(-16, 14))
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(LogLocator(numticks=5))
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eceef0")
    figure.supylabel("gain in test accuracy, percentage points", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    page: Annotated[Path, typer.Argument(help="The page whose tables are renewed.")],
    records: Annotated[Path, typer.Option(help="Folder of the records.")] = FOLDER,
) -> None:
    """Write the tables of a page and the picture weights.png from the records."""
    page.write_text(update(page.read_text(), records))
    draw(curves_of(read("weights.csv", records)[1]), records / "weights.png")


if __name__ == "__main__":
    typer.run(main)
