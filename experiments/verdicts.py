"""What was seen of claims: verdicts, a table and a figure, of results by arm and seed.

A verdict is of differences paired by seed. Nothing here knows what an arm is.
"""

import math
import statistics
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.curves import SVG


class Claim(NamedTuple):
    """says: what the paper says. choice: the label of its arm. arms: {label: arm}. score: where in
    an arm's scores. axis: what that measures. lower: less is better. aside: an arm that is shown
    and not compared. optional: only if named."""

    says: str
    choice: str
    arms: dict[str, str]
    score: tuple
    axis: str
    lower: bool = False
    aside: str = ""
    optional: bool = False


class Room(NamedTuple):
    """Of §5.3: GB of a step; measured: or else by arithmetic."""

    gigabytes: float
    measured: bool


Rooms = dict[str, dict[int, Room]]  # by what makes room, and batch size


def values(results: dict, claim: Claim, label: str) -> dict[str, float]:
    """{seed: score} of an arm, of the seeds that all arms have which have any."""
    found = {label: {} for label in claim.arms}
    for key, result in results.items():
        arm, _, seed = key.rpartition("/")
        for each in found:
            if claim.arms[each] == arm:
                score = result["scores"]
                for name in claim.score:
                    score = score[name]
                found[each][seed] = score
    shared = set.intersection(*[set(scores) for scores in found.values() if scores] or [set()])
    return {seed: score for seed, score in found[label].items() if seed in shared}


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


THAN = {"seen": ": better than", "the opposite": ": worse than", "not told apart": " from",
        "one seed": ", no verdict: beside"}


def in_words(results: dict, claim: Claim, whole: bool = False) -> str:
    """A claim's verdicts, each with the arms that the paper's was compared with. whole: in
    Markdown, and with the smallest mean difference that would have been seen."""
    chosen, found = values(results, claim, claim.choice), {}
    sign = -1 if claim.lower else 1
    for label in claim.arms:
        other = values(results, claim, label)
        both = chosen.keys() & other.keys()
        if label not in (claim.choice, claim.aside) and both:
            word, bound = verdict([sign * (chosen[seed] - other[seed]) for seed in both])
            if whole and word == "not told apart":
                label += f" ({bound:.3f} would have been seen)"
            found.setdefault(word, []).append(label)
    mark = "**" if whole else ""
    return "; ".join(f"{mark}{word}{mark}{THAN[word]} {', '.join(labels)}"
                     for word, labels in found.items())


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
    rows = ["| the paper says | measured | arms, the paper's in bold: mean ± deviation | "
            "verdict |",
            "| --- | --- | --- | --- |"]
    for claim in with_results(results, claims):
        arms = [f"{f'**{label}**' if label == claim.choice else label}: "
                f"{shown(results, claim, label)}" for label in claim.arms]
        rows.append(f"| {claim.says} | {claim.axis} | {'<br>'.join(arms)} | "
                    f"{in_words(results, claim, whole=True)} |")
    if rooms:
        batches = sorted(set().union(*rooms.values()))
        rows += ["", f"| GB of a step, pairs | {' | '.join(f'{batch:,}' for batch in batches)} |",
                 "| --- |" + " ---: |" * len(batches)]
        for way, found in rooms.items():
            cells = ["" if not room else
                     f"{room.gigabytes:.1f}" if room.measured else f"*{room.gigabytes:.1f}*"
                     for room in map(found.get, batches)]
            rows.append(f"| {way} | {' | '.join(cells)} |")
        rows += ["", "In italics: the plan's arithmetic, not tried."]
    return "\n".join(rows)


# the figure

# inches
WIDTH, LABELS, AXES = 6.25, 1.2, 1.75  # of it; in a half of it, of the arms' names and of the axes
LINE, ARM, BELOW, ROOMS = 0.14, 0.19, 0.45, 1.4  # heights


def draw(results: dict, claims: list[Claim], rooms: Rooms, path: Path) -> None:
    """An SVG, 600 pixels wide: a panel a claim, two beside each other."""
    import matplotlib
    from matplotlib.figure import Figure
    panels = [(ARM * len(claim.arms), textwrap.wrap(claim.says, 48), in_words(results, claim),
               partial(draw_claim, results=results, claim=claim))
              for claim in with_results(results, claims)]
    if rooms:
        panels.append((ROOMS, ["room for large batches"], "hollow: by arithmetic, not tried",
                       partial(draw_rooms, rooms=rooms)))
    panels = [(height, says, textwrap.wrap(caption, 54), draw_axes)
              for height, says, caption, draw_axes in panels]
    pairs = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heads = [LINE * (1 + max(len(says + caption) for _, says, caption, _ in pair))
             for pair in pairs]
    heights = [max(height for height, *_ in pair) for pair in pairs]
    whole = 2 * LINE + sum(heads) + sum(heights) + BELOW * len(pairs)
    with matplotlib.rc_context(SVG | {
            "font.size": 7.5, "axes.labelsize": 6.5, "xtick.labelsize": 6.5, "ytick.left": False,
            "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(WIDTH, whole), facecolor="white")
        figure.text(0.1 / WIDTH, 1 - LINE / whole, style="italic",
                    s="black: the paper's choice; a dot is a seed, a bar their mean")
        y = 2 * LINE
        for pair, head, row in zip(pairs, heads, heights):
            for column, (height, says, caption, draw_axes) in enumerate(pair):
                x = column * WIDTH / 2
                axes = figure.add_axes(((x + LABELS) / WIDTH, 1 - (y + head + height) / whole,
                                        AXES / WIDTH, height / whole))
                draw_axes(axes)
                for i, line in enumerate(says + caption):
                    figure.text((x + 0.1) / WIDTH, 1 - (y + LINE * (i + 1)) / whole, line,
                                weight="bold" if i < len(says) else "normal")
            y += head + row + BELOW
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_claim(axes, results: dict, claim: Claim) -> None:
    """A line an arm: a dot a seed and a bar at their mean; the dots of the paper's are black."""
    labels = list(claim.arms)
    numbers = [list(values(results, claim, label).values()) for label in labels]
    x, y, colours = zip(*((x, y, "black" if labels[y] == claim.choice else "white")
                          for y, row in enumerate(numbers) for x in row))
    axes.scatter(x, y, s=16, color=colours, edgecolor="black", linewidth=0.8, zorder=3)
    for y, row in enumerate(numbers):
        axes.vlines(statistics.mean(row), y - 0.35, y + 0.35, color="black", linewidth=1.6)
    axes.set(ylim=(len(labels) - 0.4, -0.6), yticks=range(len(labels)))
    axes.set_xlabel(claim.axis + (" (less is better)" if claim.lower else ""), loc="right")
    for tick in axes.set_yticklabels(labels):
        tick.set_fontweight("bold" if tick.get_text() == claim.choice else "normal")
    axes.xaxis.get_major_locator().set_params(nbins=4)


def draw_rooms(axes, rooms: Rooms) -> None:
    """A line a way; hollow: arithmetic."""
    for (way, found), style in zip(rooms.items(), (":", "-.", "--", "-")):
        gigabytes = [room.gigabytes for room in found.values()]
        axes.plot(list(found), gigabytes, style, color="black", linewidth=1, label=way)
        axes.scatter(list(found), gigabytes, s=12, edgecolor="black", linewidth=0.8, zorder=3,
                     color=["black" if room.measured else "white" for room in found.values()])
    batches = list(next(iter(rooms.values())))
    most = max(room.gigabytes for found in rooms.values() for room in found.values())
    axes.set(xscale="log", yscale="log", xlabel="pairs in a batch", ylabel="GB of a step")
    axes.set_ylim(top=20 * most)  # room for the legend
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.legend(fontsize=6, frameon=False, loc="upper left", borderpad=0)
