"""What experiments/starts.py reads of a run, and when experiments/miners.py reports no time."""

import re

import pytest

from experiments import miners, starts

TRAIN = """
import sys, time
print("installed_docs: building here", flush=True)
time.sleep(.4)
print("training a WordPiece tokenizer", "tiny: mean pooling", "runs/001: peak lr 1", sep="\\n")
sys.stderr.write("  0%|  | 0/1 [00:00<?, ?step/s]")
sys.stderr.flush()
time.sleep(60)
"""


def test_what_goes_by_before_the_first_step_ends_with_the_bar_of_steps(tmp_path):
    """The 60 seconds after it are not waited for."""
    (tmp_path / "train.py").write_text(TRAIN)
    found = starts.before(tmp_path)
    assert list(found) == list(starts.PARTS)
    assert 0.3 < found["corpus, index, hold-out"] and sum(found.values()) < 30


def test_a_run_that_ends_before_its_first_step_is_said_with_its_last_line(tmp_path):
    (tmp_path / "train.py").write_text("print('tiny: mean')\nraise SystemExit('train.py: no')")
    with pytest.raises(SystemExit, match=re.escape("ended with 1: train.py: no")):
        starts.before(tmp_path)


ONE = {"q": {"a": 0.1, "b": 0.4}}


def test_two_miners_that_agree_are_compared():
    said = miners.agree(ONE, {"q": {"a": 0.11, "b": 0.4}})
    assert said == "2 of 2 negatives are both sides', scores within 1e-02"


@pytest.mark.parametrize("other, words", [
    ({"q": {"a": 0.2, "b": 0.4}}, "scores differ by 1.0e-01"),
    ({"q": {"a": 0.1}}, "1 of 2 negatives"),
    ({"p": {"a": 0.1, "b": 0.4}}, "0 of 4 negatives"),
])
def test_of_two_miners_that_do_not_agree_no_time_is_reported(other, words):
    with pytest.raises(SystemExit, match=f"{words}.*no time is reported"):
        miners.agree(ONE, other)


def test_of_two_miners_that_found_nothing_no_time_is_reported():
    with pytest.raises(SystemExit, match="no time"):
        miners.agree({"q": {}}, {"q": {}})
