"""experiments/layouts.py: its examples are what they say, and a row that is read as another, or a
refusal that is none, ends it with status 1."""

import pytest

from corpora.convert import judgements, read_rows
from experiments import layouts


def test_every_example_is_read_or_refused_as_it_is_meant(capsys):
    layouts.main([])
    assert "| refused: a label | a.jsonl:" in capsys.readouterr().out


@pytest.mark.parametrize("table, example", [
    ("LAYOUTS", layouts.Example("swapped", layouts.lines('["p1", "q1"]'), "q1, p1")),
    ("LAYOUTS", layouts.Example("refused", layouts.lines('["q1"]'), "q1, p1")),
    ("REFUSED", layouts.Example("read", layouts.lines('["q1", "p1"]'))),
    ("SAID", layouts.Example("silent", layouts.lines('["q1", "p1"]')))])
def test_an_example_that_is_not_as_it_is_meant_is_an_error(monkeypatch, capsys, table, example):
    for name in ("LAYOUTS", "REFUSED", "SAID"):
        monkeypatch.setattr(layouts, name, [example] if name == table else [])
    with pytest.raises(SystemExit):
        layouts.main([])
    assert capsys.readouterr().out.count("WRONG") == 1


@pytest.mark.parametrize("name", layouts.KINDS)
def test_every_kind_of_file_holds_the_rows_of_the_formula(tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    layouts.KINDS[name](tmp_path / name, range(9))
    rows = read_rows(judgements(tmp_path / name, "train"))
    assert sorted(row[:2] for row in rows) == sorted(layouts.pairs(range(9)))


def test_what_opening_costs_has_a_row_for_each_kind_of_file(monkeypatch, capsys):
    monkeypatch.setattr(layouts, "in_a_process", layouts.open_once)
    layouts.main(["--rows", "20"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) - 2 == len(layouts.KINDS) - (not layouts.PYARROW)
