"""The answers in words: every sentence holds the figures it rests on, and says where nothing can be told.

In: answers. Out: sentences and findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rankwise.records import Estimate, Finding, RankEffect, RateExponent, Score, SweepBest, SweepPoint, SweepRun
from rankwise.sweeping.answers import Answers

RULES: Final = {"lora": "alpha / r", "rslora": "alpha / sqrt(r)", "unscaled": "alpha"}
SCORES: Final[dict[Score, str]] = {
    "bits": "recalled bits",
    "exact_share": "share of exact answers",
    "loss": "last training loss",
}

MOST_NAMED: Final = 6


def number(value: float | None, by: Score | None = None, *, sign: bool = False) -> str:
    """Write a figure; a share as a percentage.

    >>> number(1234.5), number(0.00123), number(0.5, "exact_share"), number(-0.5, sign=True)
    ('1,234', '0.00123', '50.0%', '-0.5')
    >>> number(-0.005, "exact_share", sign=True)  # a difference of shares
    '-0.5 points'
    """
    if value is None:
        return "unknown"
    plus = "+" if sign else ""
    if by == "exact_share":
        return f"{100 * value:+.1f} points" if sign else f"{value:.1%}"
    return f"{value:{plus},.0f}" if abs(value) >= 1000 else f"{value:{plus}.3g}"


def spread(found: Estimate, by: Score | None = None, *, sign: bool = False) -> str:
    """Write a mean with its interval and its number of seeds.

    >>> spread(Estimate(mean=2.0, ci=(1.0, 3.0), n=3))
    '2 (1 to 3, 3 seeds)'
    """
    mean = number(found.mean, by, sign=sign)
    if found.ci is None:
        return f"{mean} ({found.n} seed{'' if found.n == 1 else 's'}, no interval)"
    ends = " to ".join(number(end, by, sign=sign) for end in found.ci)
    return f"{mean} ({ends}, {found.n} seeds)"


def sentences(answers: Answers) -> tuple[str, ...]:
    """Return the answers, rule by rule, and then what is over all of them."""
    told = []
    for rule in sorted({point.scaling for point in answers.points}):
        best = [b for b in answers.best if b.scaling == rule]
        told.append(_rank_sentence(rule, [e for e in answers.effects if e.scaling == rule], best, answers.score))
        told.append(_rate_sentence(rule, best, answers.score))
        told += [_exponent_sentence(e) for e in answers.exponents if e.scaling == rule]
        told += _density_sentence(rule, best)
    told += _front_sentence(answers)
    return tuple(told)


def _rank_sentence(rule: str, effects: Sequence[RankEffect], best: Sequence[SweepBest], by: Score) -> str:
    """Answer: does raising the rank help?"""
    name = RULES.get(rule, rule)
    widest = next((e for e in effects if e.at == "best"), None)
    if widest is None:
        return (
            f"{name}: whether rank helps cannot be told: fewer than two ranks have a rate at which all seeds are done."
        )
    edges = [b.rank for b in best if b.on_edge and b.rank in (widest.low_rank, widest.high_rank)]
    verdicts = {
        "helps": "raising the rank helps",
        "hurts": "raising the rank hurts",
        "undecided": "whether raising the rank helps is undecided",
    }
    told = (
        f"{name}: each rank at its own best rate ({widest.low_learning_rate:g} and {widest.high_learning_rate:g}), "
        f"from rank {widest.low_rank} to {widest.high_rank} {verdicts[widest.verdict]}: {SCORES[by]} "
        f"{spread(widest.difference, by, sign=True)}"
    )
    if edges:
        which = "the best rate of rank {} lies" if len(edges) == 1 else "the best rates of ranks {} lie"
        told += f"; {which.format(_list(edges))} on the grid's edge, so that this may change with more rates"
    at_one: dict[str, list[float]] = {}
    for effect in effects:
        if effect.at == "rate" and (effect.low_rank, effect.high_rank) == (widest.low_rank, widest.high_rank):
            at_one.setdefault(effect.verdict, []).append(effect.low_learning_rate)
    parts = [f"{verdict} at {_list(rates)}" for verdict, rates in sorted(at_one.items())]
    return told + (f". At one rate for both: {'; '.join(parts)}." if parts else ".")


def _rate_sentence(rule: str, best: Sequence[SweepBest], by: Score) -> str:
    """Answer: which learning rate?"""
    parts = []
    for b in best:
        if b.learning_rate is None:
            parts.append(f"rank {b.rank}: none at which all seeds are done")
            continue
        notes = {"lowest": ", the lowest tried", "highest": ", the highest tried", "only": ", the only one tried"}
        note = notes[b.edge] if b.edge else ""
        tied = f"; not told apart from {_list(b.tied)}" if b.tied else ""
        parts.append(f"rank {b.rank}: {b.learning_rate:g}{note}, {spread(b.score, by)}{tied}")
    return f"{RULES.get(rule, rule)}: best learning rates by {SCORES[by]}: {'. '.join(_capitals(parts))}."


def _capitals(parts: Sequence[str]) -> list[str]:
    return [part if k == 0 else part[0].upper() + part[1:] for k, part in enumerate(parts)]


def _exponent_sentence(found: RateExponent) -> str:
    """Answer: how does the best rate go with the rank?"""
    name = RULES.get(found.scaling, found.scaling)
    out = "".join(f" Rank {rank} is left out: {why}." for rank, why in found.left_out.items())
    if found.exponent is None:
        return (
            f"{name}: how the best rate goes with the rank cannot be fitted; that takes three ranks whose best rate "
            f"lies inside the grid, and there are {len(found.ranks)}.{out}"
        )
    told = f"{name}: over ranks {_list(found.ranks)} the best rate goes like rank^{found.exponent:+.2f}"
    if found.ci is None:
        return f"{told}, from one seed and without an interval.{out}"
    low, high = found.ci
    trend = "it falls" if high < 0 else "it rises" if low > 0 else "no trend can be told"
    return f"{told} ({low:+.2f} to {high:+.2f}, {found.seeds} seeds, half a step of the grid included): {trend}.{out}"


def _density_sentence(rule: str, best: Sequence[SweepBest]) -> list[str]:
    """Answer: how many bits does a parameter hold?"""
    known = [b for b in best if b.bits_per_param.mean is not None]
    if not known:
        return []
    parts = [f"rank {b.rank} {spread(b.bits_per_param)}" for b in known]
    return [f"{RULES.get(rule, rule)}: bits a trainable parameter, each rank at its best rate: {'; '.join(parts)}."]


def _front_sentence(answers: Answers) -> list[str]:
    """Answer: what does recall cost in forgetting?"""
    front = sorted((p for p in answers.points if p.on_front), key=lambda p: p.forgetting.mean or 0.0)
    placed = [p for p in answers.points if p.eligible and p.score.mean is not None and p.forgetting.mean is not None]
    if len(placed) < 2:
        return []
    named = [
        f"{_setting(p)}: {spread(p.score, answers.score)}, forgetting {spread(p.forgetting, sign=True)}" for p in front
    ]
    return [
        f"Of {len(placed)} settings, {len(front)} are beaten by no other in both {SCORES[answers.score]} and "
        f"forgetting, by their means: {cut(named)}. Neighbours whose intervals overlap are not told apart."
    ]


def _setting(point: SweepPoint) -> str:
    return f"rank {point.rank}, {point.scaling}, {point.learning_rate:g}"


def _list(values: Sequence[float]) -> str:
    words = [f"{value:g}" for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def findings(answers: Answers, cells: Sequence[SweepRun], *, run_here: bool = True) -> tuple[Finding, ...]:
    """Return what a reader must know before believing the answers, and what to do where the runs are ours."""
    found = []
    edges = [b for b in answers.best if b.on_edge]
    if edges:
        named = [f"rank {b.rank}, {b.scaling}: {b.learning_rate:g} ({b.edge})" for b in edges]
        text = f"The best learning rate lies on the edge of the grid for {cut(named)}. A better one may lie outside" + (
            ": run the same sweep into the same folder with more --learning-rates; what is there is not run again."
            if run_here
            else "."
        )
        found.append(Finding(code="best-rate-on-edge", level="warning", text=text))
    for status, code, meaning in (
        ("diverged", "runs-diverged", "They are in no mean, and their rate is not called best."),
        ("failed", "runs-failed", "They are in no mean" + ("; the same command runs them again." if run_here else ".")),
        ("interrupted", "runs-stopped", "They were stopped before their end and are in no mean."),
    ):
        those = [cell for cell in cells if cell.status == status]
        if those:
            named = [f"rank {c.rank}, {c.scaling}, {c.learning_rate:g}, seed {c.seed}" for c in those]
            why = f" The first: {those[0].error}." if status == "failed" and those[0].error else ""
            text = f"{len(those)} of {len(cells)} runs {status}: {cut(named)}.{why} {meaning}"
            found.append(Finding(code=code, level="warning", text=text))
    seeds = max((point.done for point in answers.points), default=0)
    if seeds == 1:
        text = "There is one seed: no interval, and nothing can be told apart."
        text += " Run the same sweep with --seeds 3." if run_here else ""
        found.append(Finding(code="one-seed", level="warning", text=text))
    return tuple(found)


def cut(words: Sequence[str], between: str = "; ") -> str:
    """Name a few, and count the rest.

    >>> cut("abcdefgh", ", ")
    'a, b, c, d, e, f and 2 more'
    """
    more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
    return between.join(words[:MOST_NAMED]) + more
