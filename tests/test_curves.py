"""What experiments/curves.py draws of a small run that is written here by hand, and what it says
where there is nothing to draw."""

import json
import sys

import pytest

from experiments import curves

pytest.importorskip("matplotlib")


def step(number, loss, source):
    return {"step": number, "loss": loss, "source": source, "accuracy": 0.5}


def evaluation(number, **ndcg):
    scores = {name: {"recall@1": 0.0, "ndcg@10": value} for name, value in ndcg.items()}
    mean = {"ndcg@10": sum(ndcg.values()) / len(ndcg)} if ndcg else {}
    return {"step": number, "evaluation": {"mean": mean, "sources": scores}}


RUN = [evaluation(0, tickets=0.25, wiki=0.5), step(1, 6.0, "wiki"), step(2, 5.0, "tickets"),
       step(3, 3.0, "wiki"), evaluation(3, tickets=0.5, wiki=0.75)]


@pytest.fixture
def write(tmp_path):
    """Writes a run's metrics.jsonl -> its folder."""
    def run(lines, end=""):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text + end)
        return tmp_path
    return run


def drawn(run):
    """The panels, and {label: (steps, values)} of the lines of the right one."""
    panels = curves.draw(*curves.read(run)).axes
    lines = {line.get_label(): tuple(map(list, line.get_data())) for line in panels[-1].lines}
    return panels, lines


def test_the_left_panel_has_a_point_a_step_in_its_sources_colour(write):
    (left, _), _ = drawn(write(RUN))
    points, = left.collections
    assert points.get_offsets().tolist() == [[1, 6], [2, 5], [3, 3]]
    first, second, third = points.get_facecolors().tolist()
    assert first == third != second


def test_the_right_panel_has_a_line_a_source_and_the_mean(write):
    """(.25 + .5) / 2 = .375 before, (.5 + .75) / 2 = .625 after."""
    (_, right), lines = drawn(write(RUN))
    assert lines == {"tickets": ([0, 3], [0.25, 0.5]), "wiki": ([0, 3], [0.5, 0.75]),
                     "mean": ([0, 3], [0.375, 0.625])}
    assert {text.get_text() for text in right.texts} == {"0.50 tickets", "0.75 wiki", "0.62 mean"}


def test_one_source_has_no_mean(write):
    _, lines = drawn(write([evaluation(0, wiki=0.5), step(1, 6.0, "wiki")]))
    assert lines == {"wiki": ([0], [0.5])}


def test_without_held_out_pairs_the_loss_is_drawn_alone(write):
    (panel,), _ = drawn(write([evaluation(0), step(1, 6.0, "wiki"), evaluation(1)]))
    assert panel.collections[0].get_offsets().tolist() == [[1, 6]]


def test_a_half_written_last_line_is_none(write):
    steps, _ = curves.read(write(RUN[:3], end='{"step": 3, "lo'))
    assert [number for number, _, _ in steps] == [1, 2]


def test_labels_are_a_gap_apart_and_below_the_top():
    """.5 and .6 are a gap apart, .61 and .62 are not and move up. The highest label fills 1.05 -
    .1 = .95 to 1.05, so those below it move down from .9, 1 and 1.1."""
    assert curves.spread([0.5, 0.6, 0.61, 0.62], 0.1, 1.05) == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert curves.spread([0.1, 0.9, 0.95, 1.0], 0.1, 1.05) == pytest.approx([0.1, 0.8, 0.9, 1.0])


def test_of_many_lines_the_first_the_last_and_some_between_are_drawn():
    assert curves.thinned(list(range(101)), 5) == [0, 25, 50, 75, 100]
    assert curves.thinned([1, 2], 5) == [1, 2]


def test_the_same_metrics_give_the_same_bytes_with_texts_as_texts(write, capsys):
    run = write(RUN)
    curves.main([str(run)])
    curves.main([str(run), "--out", str(run / "again.svg")])
    svg = (run / "curves.svg").read_text()
    assert svg == (run / "again.svg").read_text() and len(svg) < 60_000
    assert ">0.50 tickets</text>" in svg and "<dc:date>" not in svg


def test_without_matplotlib_one_line_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install -r experiments/requirements.txt"):
        curves.main([str(write(RUN))])


@pytest.mark.parametrize("lines, said", [
    (None, "metrics.jsonl: not there"),
    ([evaluation(0, wiki=0.5)], "metrics.jsonl: no step there yet"),
    ([*RUN, {"step": 4}], "metrics.jsonl, line 6: no line of train.py's"),
    ([*RUN, []], "metrics.jsonl, line 6: no line of train.py's"),
])
def test_where_nothing_can_be_drawn_one_line_says_why(write, tmp_path, lines, said):
    if lines is not None:
        write(lines)
    with pytest.raises(SystemExit) as stop:
        curves.main([str(tmp_path)])
    assert said in stop.value.code and "\n" not in stop.value.code
    assert not (tmp_path / "curves.svg").exists()
