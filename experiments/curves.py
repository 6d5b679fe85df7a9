"""A figure of one run, from its metrics.jsonl alone: the loss and the held-out retrieval, by step.

    pip install -r experiments/requirements.txt
    python -m experiments.curves runs/001          writes runs/001/curves.svg

The run may still go on. A step's batch comes from one source (§5.1), and sources differ in how
hard they are: each has one colour in both panels. The same metrics give the same bytes.
"""

import argparse
import json
import sys
from pathlib import Path

COLOURS = "#1f77b4 #c75000 #2a8a2a #b0203a #7a55c0 #7d4b3c #c2358f #6b7000 #007f8c #5a6170".split()
POINTS, EVALUATIONS = 200, 12  # drawn at most
ROWS, LETTERS = 18, 26  # of the labels: how many have room in a small figure, and how long they are

# text stays text; ids are no random numbers
SVG = {"svg.fonttype": "none", "svg.hashsalt": "curves", "font.sans-serif": ["DejaVu Sans"]}


def read(run: Path) -> tuple[list[tuple], list[tuple]]:
    """[(step, loss, source)] and, of the evaluations that have sources, [(step, {source or "mean":
    nDCG@10})]. Raises OSError or ValueError, one line each."""
    path, steps, evaluations = run / "metrics.jsonl", [], []
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; give the folder of a run, as in runs/001")
    whole_lines = path.read_text().split("\n")[:-1]  # the last may be half written
    for number, text in enumerate(whole_lines, 1):
        try:
            line = json.loads(text)
            if "loss" in line:
                steps.append((line["step"], line["loss"], line["source"]))
            elif line["evaluation"]["sources"]:
                scores = {**line["evaluation"]["sources"], "mean": line["evaluation"]["mean"]}
                ndcg = {name: found["ndcg@10"] for name, found in scores.items()}
                evaluations.append((line["step"], ndcg))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no line of train.py's ({error!r})") from None
    if not steps:
        raise ValueError(f"{path}: no step there yet")
    return steps, evaluations


def thinned(lines: list, most: int) -> list:
    """The first, the last and evenly between them, `most` in all."""
    if len(lines) <= most:
        return lines
    return [lines[i * (len(lines) - 1) // (most - 1)] for i in range(most)]


def spread(values: list[float], gap: float, top: float) -> list[float]:
    """Heights of labels for these rising values: moved up until they are `gap` apart, and down
    again where they would not end below the top."""
    heights = values[:1]
    for value in values[1:]:
        heights.append(max(value, heights[-1] + gap))
    below = [top - gap * (i + 0.5) for i in reversed(range(len(values)))]
    return [min(pair) for pair in zip(heights, below)]


def draw(steps: list[tuple], evaluations: list[tuple]):
    """-> a matplotlib Figure; without evaluations, of the loss alone."""
    from matplotlib.figure import Figure
    evaluated = set(evaluations[-1][1]) - {"mean"} if evaluations else set()
    sources = sorted({source for _, _, source in steps} | evaluated)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sources)}
    rows = max(ROWS, len(evaluated) + 2)
    figure = Figure(figsize=(8.3, 1 + rows / 6), layout="constrained", facecolor="white")
    figure.suptitle(f"steps: {len(steps):,}, sources: {len(sources)}, each in its colour")
    panels = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]

    points = thinned(steps, POINTS)
    x, y, names = zip(*points)
    panels[0].plot(x, y, color="0.8", linewidth=0.8)
    panels[0].scatter(x, y, s=18, linewidth=0,
                      color=[colours[name] for name in names], zorder=2)
    panels[0].set(title="loss of each step's batch", ylabel="loss (nats)")
    if evaluations:
        draw_retrieval(panels[1], thinned(evaluations, EVALUATIONS), colours, rows)
    for axes in panels:
        axes.set(xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    if len(points) < len(steps):
        panels[0].set(xlabel=f"step ({len(points)} of {len(steps):,} shown)")
    return figure


def draw_retrieval(axes, evaluations: list[tuple], colours: dict[str, str], rows: int) -> None:
    """A line a source, and the mean, each labelled where it ends; `rows` labels have room."""
    x, last = [step for step, _ in evaluations], evaluations[-1][1]
    names = sorted(last, key=last.get)
    if len(names) == 2:
        names.remove("mean")  # of one source it is that source
    colours, marker = {**colours, "mean": "black"}, "." if len(x) <= 5 else ""
    for name in names:
        wide = 2.5 if name == "mean" else 1.5
        axes.plot(x, [ndcg[name] for _, ndcg in evaluations], marker=marker, label=name,
                  color=colours[name], linewidth=wide, zorder=1 + wide)
    axes.set(title="retrieval of held-out pairs", ylabel="nDCG@10 (1 is perfect)")
    bottom, top = axes.get_ylim()
    heights = spread([last[name] for name in names], (top - bottom) / rows, top)
    for name, height in zip(names, heights):
        short = name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"
        axes.annotate(f"{last[name]:.2f} {short}", (x[-1], last[name]), (1.06, height),
                      textcoords=axes.get_yaxis_transform(), va="center", size=9,
                      color=colours[name], weight="bold" if name == "mean" else "normal",
                      arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5,
                                  "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 2})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m experiments.curves", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder, as runs/001")
    parser.add_argument("--out", type=Path, metavar="FILE", help="unset: RUN/curves.svg")
    args = parser.parse_args(argv)
    out = args.out or args.run / "curves.svg"
    try:
        import matplotlib
        with matplotlib.rc_context(SVG):
            draw(*read(args.run)).savefig(out, format="svg", metadata={"Date": None})
    except ImportError:
        sys.exit("curves: needs matplotlib: pip install -r experiments/requirements.txt")
    except (OSError, ValueError) as error:
        sys.exit(f"curves: {error}")
    print(f"{out} is written")


if __name__ == "__main__":
    main()
