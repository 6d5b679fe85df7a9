"""What was seen of claims: verdicts, a table and a figure, of results by arm and seed.

A verdict is of differences paired by seed. Nothing here knows what an arm is.
"""

import math
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

from experiments.curves import SVG


class Claim(NamedTuple):
    """says: what the paper says. choice: the label of its arm. arms: {label: arm}. score: where in
    an arm's scores. axis: what that measures. lower: less is better. optional: only if named."""

    says: str
    choice: str
    arms: dict[str, str]
    score: tuple
    axis: str
    lower: bool = False
    optional: bool = False


class Room(NamedTuple):
    """Of §5.3: GB of a step; measured: or else by arithmetic."""

    gigabytes: float
    measured: bool


Rooms = dict[str, dict[int, Room]]  # by what makes room, and batch size


def values(results: dict, claim: Claim, label: str) -> dict[str, float]:
    """{seed: score} of an arm."""
    found = {}
    for key, result in results.items():
        arm, _, seed = key.rpartition("/")
        if arm == claim.arms[label]:
            score = result["scores"]
            for name in claim.score:
                score = score[name]
            found[seed] = score
    return found


def verdict(differences: list[float]) -> tuple[str, float]:
    """Of what the paper's arm is better by, by seed: seen, or the opposite, if all have one sign
    and their mean is more than twice its standard error; and that bound."""
    if len(differences) < 2:
        return "one seed", math.nan
    mean = statistics.mean(differences)
    bound = 2 * statistics.stdev(differences) / math.sqrt(len(differences))
    one_sign = min(differences) > 0 or max(differences) < 0
    if not one_sign or abs(mean) <= bound:
        return "not told apart", bound
    return "seen" if mean > 0 else "the opposite", bound


def in_words(results: dict, claim: Claim, bold: str = "") -> str:
    """A claim's verdicts, each with the arms that the paper's was compared with."""
    chosen, found = values(results, claim, claim.choice), {}
    sign = -1 if claim.lower else 1
    for label in claim.arms:
        other = values(results, claim, label)
        both = chosen.keys() & other.keys()
        if label != claim.choice and both:
            word, bound = verdict([sign * (chosen[seed] - other[seed]) for seed in both])
            if word == "not told apart":
                label += f" ({bound:.3f} would have been)"
            found.setdefault(word, []).append(label)
    return "; ".join(f"{bold}{word}{bold} {'from' if word == 'not told apart' else 'against'} "
                     f"{', '.join(labels)}" for word, labels in found.items())


def shown(results: dict, claim: Claim, label: str) -> str:
    """The mean, the standard deviation over the seeds, and what was counted as wrong in its
    rows."""
    numbers = list(values(results, claim, label).values())
    text = f"{statistics.mean(numbers):.3f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.3f}"
    wrong = [result["wrong"] for key, result in results.items()
             if key.rpartition("/")[0] == claim.arms[label] and "wrong" in result]
    return text + (f" ({statistics.mean(wrong):.1%} wrong)" if wrong else "")


def with_results(results: dict, claims: list[Claim]) -> list[Claim]:
    """Those that have results of the paper's arm and another, with the arms that have some."""
    found = []
    for claim in claims:
        arms = {label: arm for label, arm in claim.arms.items() if values(results, claim, label)}
        if claim.choice in arms and len(arms) > 1:
            found.append(claim._replace(arms=arms))
    return found


def table(results: dict, claims: list[Claim], rooms: Rooms) -> str:
    """Markdown."""
    rows = ["| the paper says | measured | arms, the paper's in bold: mean ± deviation | verdict |",
            "| --- | --- | --- | --- |"]
    for claim in with_results(results, claims):
        arms = [f"{f'**{label}**' if label == claim.choice else label}: "
                f"{shown(results, claim, label)}" for label in claim.arms]
        rows.append(f"| {claim.says} | {claim.axis} | {'<br>'.join(arms)} | "
                    f"{in_words(results, claim, '**')} |")
    if rooms:
        batches = sorted(set().union(*rooms.values()))
        rows += ["", f"| GB of a step, pairs | {' | '.join(f'{batch:,}' for batch in batches)} |",
                 "| --- |" + " ---: |" * len(batches)]
        for way, found in rooms.items():
            cells = [f"{room.gigabytes:.1f}" if room.measured else f"*{room.gigabytes:.1f}*"
                     for room in map(found.get, batches) if room]
            rows.append(f"| {way} | {' | '.join(cells)} |")
        rows += ["", "In italics: the plan's arithmetic, not tried."]
    return "\n".join(rows)


# the figure

def draw(results: dict, claims: list[Claim], rooms: Rooms, path: Path) -> None:
    """An SVG, 600 pixels wide: a panel a claim."""
    import matplotlib
    from matplotlib.figure import Figure
    found = with_results(results, claims)
    arms = [len(claim.arms) for claim in found] + [6] * bool(rooms)
    heights = [1.05 + 0.17 * max(arms[i : i + 2]) for i in range(0, len(arms), 2)]
    with matplotlib.rc_context(SVG | {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 6.5,
                                      "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.25, sum(heights)), layout="constrained", facecolor="white")
        panels = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights).flatten()
        for axes, claim in zip(panels, found):
            draw_claim(axes, results, claim)
        if rooms:
            draw_rooms(panels[len(found)], rooms)
        for axes in panels[len(arms) :]:
            axes.set_axis_off()
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_claim(axes, results: dict, claim: Claim) -> None:
    """A line an arm: a dot a seed and a bar at their mean, the paper's in black."""
    for y, label in enumerate(claim.arms):
        numbers, paper = list(values(results, claim, label).values()), label == claim.choice
        colour = "black" if paper else "0.45"
        axes.scatter(numbers, [y] * len(numbers), s=16, color=colour if paper else "white",
                     edgecolor=colour, linewidth=0.9, zorder=3)
        axes.plot([statistics.mean(numbers)] * 2, [y - 0.35, y + 0.35], color=colour, linewidth=1.6)
    axes.set(ylim=(len(claim.arms) - 0.4, -0.6), yticks=range(len(claim.arms)),
             xlabel=claim.axis + (" (less is better)" if claim.lower else ""))
    for tick, label in zip(axes.set_yticklabels(claim.arms), claim.arms):
        tick.set_fontweight("bold" if label == claim.choice else "normal")
    set_title(axes, claim.says, in_words(results, claim))


def draw_rooms(axes, rooms: Rooms) -> None:
    """A line a way; hollow: arithmetic."""
    for (way, found), style in zip(rooms.items(), (":", "-.", "--", "-")):
        gigabytes = [room.gigabytes for room in found.values()]
        axes.plot(list(found), gigabytes, style, color="black", linewidth=1, label=way)
        axes.scatter(list(found), gigabytes, s=12, edgecolor="black", linewidth=0.8, zorder=3,
                     color=["black" if room.measured else "white" for room in found.values()])
    axes.set(xscale="log", yscale="log", xlabel="pairs in a batch", ylabel="GB")
    batches = list(next(iter(rooms.values())))
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches], size=6.5)
    axes.minorticks_off()
    axes.legend(fontsize=6, frameon=False)
    set_title(axes, "room for large batches", "hollow: by arithmetic, not tried")


def set_title(axes, says: str, caption: str) -> None:
    axes.set_title("\n".join(textwrap.wrap(says, 46) + textwrap.wrap(caption, 54)), loc="left")
