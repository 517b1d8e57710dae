"""What became faster or slower between two sets of records, beyond the noise.

Not times are compared but ratios within a run: of a contestant's time over plain's, which is the
step without penalty or torch's forward kernel (`Record.ratio`; in files without that column, the
ratio of medians). What slows the whole machine leaves them alone.

**Noise.** Of ``d = log(new / old)``, the standard deviation is taken as the largest of

* *rounds*: the standard errors of both medians, from the range p20 to p80 of the rounds, in
  quadrature (`fastjac.bench.measure.error_of_median`);
* *controls*: contestants that run no code of ours (eager, compiled, …) did not change between the
  commits. How far theirs moved is the noise between runs, which no run can see by itself (where
  memory and threads were placed, what else the machine did): the 90th percentile of their ``|d|``,
  steps and activations apart, over 1.645, so that nine in ten lie where they should, times
  ``1 + 2/n`` for n controls, since few may be close by chance (simulated, without it: 6 to 18%
  false alarms for up to 8 controls, with it 1 to 5%);
* *repeats*: where a side holds several runs of a case at one commit, the spread between them;
* ``FLOOR``, where all of that is small by chance.

A change counts if it is more than z of these, with z such that normal noise would report anything
at all in one comparison of a hundred, however many cases are compared (Bonferroni). It has to be so
many against plain *and* against each control of the same case: where all of them moved together,
what moved is plain.

**Groups.** What is too small for any one case may be plain in many: of the cases of a group (one
phase of the activations, the steps with one kind of penalty) the median change is held to the same
rule, its noise smaller by the square root of their number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy

from fastjac.bench.contestants import TORCHS
from fastjac.bench.measure import error_of_median
from fastjac.bench.records import Record
from fastjac.bench.report import place

#: a run's ratio had a spread of 0.4 to 1.7% in three runs of five steps (history.csv, db0c7c7), so
#: the difference of two up to 2.4%
FLOOR = 0.02
#: of a normal distribution: standard deviations that nine in ten values stay within
NINE_IN_TEN = statistics.NormalDist().inv_cdf(0.95)
#: probability of reporting anything where nothing changed
FALSE_ALARM = 0.01

#: cases that make a group
GROUP = 4
#: groups of steps, by penalty
_FAMILIES, FAMILY = {"dreg": "layerwise"}, "double-backward"

Environment = tuple[str, str, str, int, str]
Pair = tuple[str, str]
Key = tuple[Environment, str, str]


@dataclass(frozen=True)
class Change:
    """One contestant on one case, or on the cases of a group, old against new.

    Attributes:
        name: the case, or ``"all of GROUP (n)"``.
        contestant: as in `Record`.
        kind, group: the case is of.
        cases: the case, or those of the group.
        old, new: the ratios.
        noise: standard deviation of ``log(new / old)`` without a change.
        limit: what ``|log(new / old)|`` must exceed.
        beside: ``log(new / old)`` of the controls of the same case.
    """

    name: str
    contestant: str
    kind: str
    group: str
    cases: tuple[str, ...]
    old: float
    new: float
    noise: float
    limit: float = math.inf
    beside: tuple[float, ...] = ()

    @property
    def log_ratio(self) -> float:
        """``log(new / old)``."""
        return math.log(self.new / self.old)

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"`` or, within the noise, empty."""
        moved = [self.log_ratio - other for other in (0.0, *self.beside)]
        if min(moved) > self.limit:
            return "slower"
        return "faster" if max(moved) < -self.limit else ""


@dataclass
class Comparison:
    """The outcome.

    Attributes:
        changes: of contestants that run code of ours, within the noise or beyond.
        groups: the same, of groups of cases.
        controls: of the other contestants.
        left_out: why, and the records that it concerns.
        only_old, only_new: ``(case, contestant)`` on one side alone.
    """

    changes: list[Change] = field(default_factory=list)
    groups: list[Change] = field(default_factory=list)
    controls: list[Change] = field(default_factory=list)
    left_out: dict[str, list[Record]] = field(default_factory=dict)
    only_old: list[tuple[str, str]] = field(default_factory=list)
    only_new: list[tuple[str, str]] = field(default_factory=list)

    @property
    def beyond(self) -> list[Change]:
        """Changes beyond the noise: groups first, then the slower ones, the largest first."""
        found = [change for change in (*self.groups, *self.changes) if change.verdict]
        return sorted(found, key=lambda change: (len(change.cases) == 1, -change.log_ratio))

    @property
    def slower(self) -> bool:
        """Whether anything of ours became slower."""
        return any(change.verdict == "slower" for change in self.beyond)


def compare(old: Iterable[Record], new: Iterable[Record]) -> Comparison:
    """Compare two sets of records; see the module for how.

    Of a case that was run at several commits, each side's last commit counts. Records are
    comparable where machine, device, dtype, threads and torch are the same.
    """
    result = Comparison()
    before = _by_key(_usable("old", old, result))
    after = _by_key(_usable("new", new, result))
    for side, mine, other in (("old", before, after), ("new", after, before)):
        _drop_foreign(side, mine, {environment for environment, *_ in other}, result)
    result.only_old = [key[1:] for key in before if key not in after]
    result.only_new = [key[1:] for key in after if key not in before]
    found = {key: _change(before[key], after[key]) for key in after if key in before}
    for environment in dict.fromkeys(environment for environment, *_ in found):
        here = {key[1:]: change for key, change in found.items() if key[0] == environment}
        controls = {pair: change for pair, change in here.items() if pair[1] in TORCHS}
        ours = [
            _beside_controls(change, controls)
            for pair, change in here.items()
            if pair not in controls
        ]
        result.controls += controls.values()
        result.changes += ours
        result.groups += _groups(ours, controls)
    _set_limits(result)
    return result


def _beside_controls(change: Change, controls: Mapping[Pair, Change]) -> Change:
    """With the noise between the runs, and the controls of the same case."""
    noise = max(change.noise, _between_runs(change.kind, controls.values()), FLOOR)
    beside = tuple(c.log_ratio for c in controls.values() if c.cases == change.cases)
    return replace(change, noise=noise, beside=beside)


def _between_runs(kind: str, controls: Iterable[Change]) -> float:
    """Standard deviation between runs, by the contestants that did not change."""
    moved = [abs(change.log_ratio) for change in controls if change.kind == kind]
    if not moved:
        return 0.0
    return float(numpy.quantile(moved, 0.9)) / NINE_IN_TEN * (1 + 2 / len(moved))


def _groups(ours: Iterable[Change], controls: Mapping[Pair, Change]) -> list[Change]:
    members: dict[Pair, list[Change]] = {}
    for change in ours:
        members.setdefault((change.group, change.contestant), []).append(change)
    return [_group(mine, controls) for mine in members.values() if len(mine) >= GROUP]


def _group(members: Sequence[Change], controls: Mapping[Pair, Change]) -> Change:
    """The median change of a group, beside the median changes of its controls."""
    first, n = members[0], len(members)
    cases = tuple(case for change in members for case in change.cases)
    moved: dict[str, list[float]] = {}
    for (case, contestant), change in controls.items():
        if case in cases:
            moved.setdefault(contestant, []).append(change.log_ratio)
    noise = statistics.median(change.noise for change in members)
    old = math.exp(statistics.fmean(math.log(change.old) for change in members))
    return replace(
        first,
        name=f"all of {first.group} ({n})",
        cases=cases,
        old=old,
        new=old * math.exp(statistics.median(change.log_ratio for change in members)),
        noise=max(math.sqrt(math.pi / 2 / n) * noise, FLOOR),
        beside=tuple(statistics.median(m) for m in moved.values() if 2 * len(m) >= n),
    )


def _set_limits(result: Comparison) -> None:
    n = max(1, len(result.changes) + len(result.groups))
    z = statistics.NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * n))
    for changes in (result.changes, result.groups):
        changes[:] = [replace(change, limit=z * change.noise) for change in changes]


def environment_of(record: Record) -> Environment:
    """What two records must share to be compared."""
    return record.machine, record.device, record.dtype, record.threads, record.torch


def _usable(side: str, records: Iterable[Record], result: Comparison) -> list[Record]:
    """Those with a ratio to compare; the others are left out, with the reason."""
    kept = []
    for record in records:
        if record.status != "ok":
            reason = f"{record.status}, so not timed"
        elif record.overhead is None:
            reason = "plain was not timed beside it"
        else:
            if record.contestant != "plain":  # what the others are divided by
                kept.append(record)
            continue
        result.left_out.setdefault(f"{side}: {reason}", []).append(record)
    return kept


def _by_key(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """Runs of each contestant on each case, of the last commit that has it."""
    runs: dict[Key, list[Record]] = {}
    for record in records:
        runs.setdefault((environment_of(record), record.case, record.contestant), []).append(record)
    return {key: [r for r in mine if r.commit == mine[-1].commit] for key, mine in runs.items()}


def _drop_foreign(
    side: str, runs: dict[Key, list[Record]], others: set[Environment], result: Comparison
) -> None:
    """Take out what was measured where the other side has nothing."""
    for key in [key for key in runs if key[0] not in others]:
        mine = runs.pop(key)
        where = f"{place(mine[0])}, {mine[0].dtype}, torch {mine[0].torch}"
        reason = f"{side}: {where}, where the other side has nothing"
        result.left_out.setdefault(reason, []).extend(mine)


def _change(old: Sequence[Record], new: Sequence[Record]) -> Change:
    """Ratios of both sides, and the noise that these runs show by themselves."""
    paired = all(r.ratio and r.ratio_se is not None for r in (*old, *new))
    sides = [[_log_ratio(r, paired) for r in side] for side in (old, new)]
    means = [statistics.fmean(value for value, _ in side) for side in sides]
    rounds = math.sqrt(sum(sum(se**2 for _, se in side) / len(side) ** 2 for side in sides))
    first = new[0]
    before, after = map(math.exp, means)
    noise = max(rounds, _repeats(sides, means))
    group = f"act-*-{first.phase}" if first.phase else _FAMILIES.get(first.penalty, FAMILY)
    return Change(
        *(first.case, first.contestant, first.kind, group, (first.case,)),
        *(before, after, noise),
    )


def _repeats(sides: Sequence[Sequence[tuple[float, float]]], means: Sequence[float]) -> float:
    """Standard deviation of the difference of the means, from the spread of repeated runs."""
    freedom = sum(len(side) - 1 for side in sides)
    if freedom == 0:
        return 0.0
    squares = sum(
        (value - mean) ** 2 for side, mean in zip(sides, means, strict=True) for value, _ in side
    )
    return math.sqrt(squares / freedom * sum(1 / len(side) for side in sides))


def _log_ratio(record: Record, paired: bool) -> tuple[float, float]:
    """Logarithm of the ratio, and its standard error."""
    if paired:
        assert record.ratio is not None and record.ratio_se is not None
        return math.log(record.ratio), record.ratio_se
    assert record.overhead is not None
    if not (record.p20_ms and record.p80_ms and record.n_rounds):
        return math.log(record.overhead), 0.0
    own = error_of_median(math.log(record.p20_ms), math.log(record.p80_ms), record.n_rounds)
    return math.log(record.overhead), math.sqrt(2) * own  # as if plain were as uncertain
