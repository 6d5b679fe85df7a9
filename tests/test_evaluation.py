"""Metrics against values worked out by hand, and the command on good and bad files."""

import json
import math
from collections import namedtuple

import pytest
import torch

import model
from evaluation import __main__ as evaluation
from evaluation import metrics
from evaluation.embed import embed
from tests.conftest import COMPASS, Compass, python

Pair = namedtuple("Pair", "query positive")
SIZES = dict(max_length=16, micro_tokens=8)


def unit(*degrees):
    """2-D unit vectors: the cosine of two of them is the cosine of the angle between."""
    angle = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


class Collapsed(Compass):
    """Every text has one vector, (1, ..., 1), but for fp32 rounding."""

    def forward(self, input_ids, attention_mask):
        return 1 + 1e-7 * torch.randn(len(input_ids), 300)


# positions, and what is made of them

def test_the_position_counts_the_targets_that_are_at_least_as_close():
    """Targets at 0, 90, 180 degrees. The query at 10 is nearest to its own, the one at 30 has 0
    before its own 90, and the one at 60 has 90 and 0 before its own 180."""
    assert metrics.positions(unit(10, 30, 60), unit(0, 90, 180)).tolist() == [1, 2, 3]


def test_lengths_do_not_matter_to_the_position():
    """The cosine forgets lengths: the scaled vectors give the positions of the test above."""
    length = torch.tensor([[100.0], [0.01], [1.0]])
    queries, targets = unit(10, 30, 60) * length, unit(0, 90, 180) / length
    assert metrics.positions(queries, targets).tolist() == [1, 2, 3]


def test_ties_count_against_us():
    """A query at 45 degrees is as close to 0 as to 90: its own is second, whichever of the two it
    is."""
    assert metrics.positions(unit(45, 45), unit(0, 90)).tolist() == [2, 2]


def test_a_collapsed_encoder_is_last_everywhere():
    """Seven equal vectors tie: every position is 7 and no query is a hit. So it is where each is
    moved by fp32 rounding."""
    rounding = 1 + 1e-7 * torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    assert metrics.positions(torch.ones(7, 300), rounding).tolist() == [7] * 7
    assert metrics.in_batch_accuracy(torch.ones(7, 300), rounding) == 0.0


def test_an_embedding_that_is_not_a_number_is_last():
    """No comparison with NaN is true, so no target is lower: position 3 of 3."""
    assert metrics.positions(torch.full((3, 2), math.nan), unit(0, 90, 180)).tolist() == [3, 3, 3]


def test_more_cosines_than_are_held_at_once_change_no_position():
    """5,000 queries x 4,000 targets are 20 million cosines, of which 17 million are held at once;
    two halves of the queries are below that."""
    generator = torch.Generator().manual_seed(0)
    q, t = (torch.randn(count, 8, generator=generator) for count in (5000, 4000))
    answers = torch.arange(5000) % 4000
    halves = [metrics.positions(q[half], t, answers[half])
              for half in (slice(0, 2500), slice(2500, 5000))]
    assert torch.equal(metrics.positions(q, t, answers), torch.cat(halves))


def test_two_queries_may_share_a_target():
    """Both queries answer to the target at 0: first for the one at 10 degrees, second for the one
    at 80."""
    answers = torch.tensor([0, 0])
    assert metrics.positions(unit(10, 80), unit(0, 90), answers).tolist() == [1, 2]


def test_recall_and_reciprocal_rank():
    """Positions 1, 2, 4, 20: one of four is first, three are in the first ten; (1 + 1/2 + 1/4 +
    1/20) / 4 = 1.8 / 4."""
    found = torch.tensor([1, 2, 4, 20])
    assert metrics.recall_at(found, 1) == 0.25
    assert metrics.recall_at(found, 10) == 0.75
    assert metrics.mean_reciprocal_rank(found) == pytest.approx(0.45)


@pytest.mark.parametrize("position, value", [
    (1, 1.0), (3, 0.5), (7, 1 / 3), (10, 0.28906), (11, 0.0)])
def test_ndcg_of_one_relevant_target(position, value):
    """1 / log2(1 + position): 1 / 1, 1 / log2(4) = 1/2, 1 / log2(8) = 1/3, 1 / log2(11) = 1 /
    3.45943, and 0 beyond 10."""
    assert metrics.ndcg_at_10(torch.tensor([position])) == pytest.approx(value, abs=1e-5)


def test_in_batch_accuracy_is_the_share_of_first_positions():
    """Positions 1, 2, 3 as above: one of three. It takes a graph and half precision, as a training
    step has them."""
    q = unit(10, 30, 60).bfloat16().requires_grad_()
    assert metrics.in_batch_accuracy(q, unit(0, 90, 180)) == pytest.approx(1 / 3)


# Spearman

def test_spearman_sees_order_alone():
    """Any rising function of the scores has the same ranks: 1. Falling: -1."""
    assert metrics.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert metrics.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)


def test_spearman_gives_ties_their_average_rank():
    """Ranks of 1 2 2 3 are 1 2.5 2.5 4, centred -1.5 0 0 1.5; of 1 2 3 4, centred -1.5 -.5 .5 1.5.
    The products sum to 4.5, the squares to 4.5 and 5: 4.5 / sqrt(22.5) = 0.948683."""
    assert metrics.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.948683, abs=1e-6)


def test_spearman_of_a_constant_is_zero():
    """All ranks are 2, so all centred ranks are 0: no order."""
    assert metrics.spearman([0.5, 0.5, 0.5], [1, 2, 3]) == 0.0


# V-measure

def test_v_measure_of_a_perfect_clustering_is_one_whatever_the_names():
    """Every cluster holds one label, every label lies in one cluster: H(C|K) = H(K|C) = 0."""
    assert metrics.v_measure(["a", "a", "b", "c"], [2, 2, 0, 1]) == pytest.approx(1.0)


def test_v_measure_of_one_cluster_is_zero():
    """One cluster says nothing of the label: H(C|K) = H(C), h = 0. H(K) = 0, so c = 1 by
    definition; V = 0."""
    assert metrics.v_measure(["a", "a", "b", "b"], [0, 0, 0, 0]) == 0.0


def test_v_measure_where_labels_and_clusters_are_independent_is_zero():
    """Both clusters hold one a and one b: H(C|K) = H(C) and H(K|C) = H(K), so h = c = 0, and V is 0
    and not 0 / 0."""
    assert metrics.v_measure(["a", "a", "b", "b"], [0, 1, 0, 1]) == pytest.approx(0.0, abs=1e-12)


def test_v_measure_of_one_label_and_one_cluster_is_one():
    """H(C) = H(K) = 0: both are 1 by definition."""
    assert metrics.v_measure(["a", "a"], [0, 0]) == 1.0


def test_v_measure_of_one_label_in_two_clusters_is_zero():
    """H(C) = 0, so h = 1. H(K|C) = H(K), so c = 0; V = 0."""
    assert metrics.v_measure(["a", "a"], [0, 1]) == 0.0


def test_v_measure_of_a_label_cut_in_two():
    """Labels a a b b in clusters 0 0 1 2. Every cluster holds one label: h = 1. In units of ln 2:
    H(C) = 1, H(K) = H(C,K) = 1/2 * 1 + 2 * 1/4 * 2 = 1.5, H(K|C) = 1.5 - 1 = 0.5, c = 1 - 0.5 / 1.5
    = 2/3; V = 2 * 2/3 / (5/3) = 0.8."""
    assert metrics.v_measure(["a", "a", "b", "b"], [0, 0, 1, 2]) == pytest.approx(0.8)


# k-means

BLOBS = [0] * 50 + [1] * 50 + [2] * 50


def blobs():
    """50 points each around (0, 0), (10, 0), (0, 10), with a deviation of 0.5."""
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])[BLOBS]
    return centres + 0.5 * torch.randn(150, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_blobs_that_lie_apart(seed):
    """Twenty deviations lie between two blobs: the clusters are the blobs, whatever the seed."""
    assert metrics.v_measure(BLOBS, metrics.k_means(blobs(), 3, seed)) == pytest.approx(1)


def test_k_means_repeats_itself_for_a_seed():
    """Eight clusters of three blobs have many local minima: only the seed can fix which is
    found."""
    first, again, other = (metrics.k_means(blobs(), 8, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_k_means_leaves_the_global_random_state_alone():
    """Evaluating during a run must not change the run: the next number drawn is the one drawn
    without it."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    metrics.k_means(blobs(), 3, seed=7)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_k_means_ends_with_more_clusters_than_distinct_points(k):
    """Two distinct points, three times each: two clusters hold them all, and the others stay
    empty."""
    clusters = metrics.k_means(unit(0, 90, 0, 90, 0, 90), k, seed=0).tolist()
    assert len(set(clusters)) == 2 and clusters == clusters[:2] * 3


def test_an_empty_cluster_starts_again():
    """Two of three centres start on one point, so that one of them gets no point; the blobs are
    found all the same, here moved by 20 lest a centre at the origin be a good one."""
    x = blobs() + 20
    _, clusters = metrics.lloyd(x, centres=x[[0, 0, 50]])
    assert metrics.v_measure(BLOBS, clusters) == pytest.approx(1)


def test_k_means_keeps_the_best_restart():
    """Five restarts begin with the one that restarts=1 makes: their squared distance is never
    larger, and for eight clusters of three blobs it is smaller for some seed."""
    def squared_distance(seed, restarts):
        x, clusters = blobs(), metrics.k_means(blobs(), 8, seed, restarts)
        groups = [x[clusters == c] for c in clusters.unique()]
        return sum((group - group.mean(0)).square().sum().item() for group in groups)

    one = [squared_distance(seed, restarts=1) for seed in range(4)]
    five = [squared_distance(seed, restarts=5) for seed in range(4)]
    assert all(b <= a + 1e-3 for a, b in zip(one, five)) and sum(five) < sum(one) - 1


# an encoder's embeddings

@pytest.mark.parametrize("training", [True, False])
def test_embed_keeps_the_order_drops_nothing_and_restores_the_mode(tokenizer, training):
    """Texts of 1, 3 and 2 words are embedded by length and come back in their order; 0.9 dropout
    would show."""
    encoder = Compass().train(training)
    vectors = embed(encoder, tokenizer, ["east", "north north west", "south south"], **SIZES)
    assert vectors.tolist() == [[1, 0], [-1, 2], [0, -2]]
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    assert encoder.training == encoder.dropout.training == training


def test_embed_refuses_what_is_not_a_number(tokenizer):
    """One NaN in the table, as after a diverged run."""
    encoder = Compass()
    encoder.table.weight[4] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        embed(encoder, tokenizer, ["east", "north"], **SIZES)


def test_retrieval_counts_equal_targets_once(tokenizer):
    """Candidates: north, east (there twice, once with a blank), south. "north north west", "east"
    and "south" find their own first. "west" is at cosine 0 to north and south, at -1 to its own
    east: position 3. Had both easts stayed, "east" would tie and be second. MRR (3 + 1/3) / 4 =
    10/12; nDCG (3 + 1 / log2(4)) / 4 = 3.5 / 4."""
    pairs = [Pair("north north west", "north"), Pair("east", "east"), Pair("west", " east"),
             Pair("south", "south")]
    assert metrics.retrieval(Compass(), tokenizer, pairs, **SIZES) == {
        "recall@1": 0.75, "recall@10": 1.0, "mrr": pytest.approx(10 / 12), "ndcg@10": 0.875,
        "targets": 3}


def test_similarity_finds_no_order_in_rounding(tokenizer):
    """A collapsed encoder: all cosines are 1 but for fp32 rounding, so all ranks are equal and the
    correlation is 0."""
    a, b = (embed(Collapsed(), tokenizer, ["north"] * 20, **SIZES) for _ in range(2))
    assert len(set(torch.cosine_similarity(a, b).tolist())) > 1
    scored = [("north", "east", score) for score in range(20)]
    assert metrics.similarity(Collapsed(), tokenizer, scored, **SIZES)["spearman"] == 0.0


# the command

def lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def printed(capsys, *argv):
    evaluation.main(list(argv))
    line, = capsys.readouterr().out.splitlines()
    return json.loads(line)


def refused(capsys, *argv):
    """Runs the command, which ends with status 2 -> the one line it said."""
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(list(argv))
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err


def test_pairs_print_retrieval(compass, tmp_path, capsys):
    """Both layouts of a pair; each query is its target's word, and the two targets are
    orthogonal."""
    file = lines(
        tmp_path / "pairs.jsonl", ["north", "north"], {"query": "east", "positive": "east"})
    assert printed(capsys, "M", "--pairs", file) == {
        "model": "M", "file": file, "recall@1": 1.0, "recall@10": 1.0, "mrr": 1.0, "ndcg@10": 1.0,
        "targets": 2}


def test_pairs_may_be_in_a_table_or_a_beir_directory(compass, tmp_path, capsys):
    """Of the directory those of the test split."""
    table = tmp_path / "pairs.csv"
    table.write_text("question,answer\nnorth,north\neast,east\n")
    assert printed(capsys, "M", "--pairs", str(table))["recall@1"] == 1.0
    (tmp_path / "b" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        texts = [{"_id": word, "text": word} for word in COMPASS[4:]]
        lines(tmp_path / "b" / f"{name}.jsonl", *texts)
    judged = "query-id\tcorpus-id\tscore\nnorth\tnorth\t1\neast\teast\t1\nwest\teast\t0\n"
    (tmp_path / "b" / "qrels" / "test.tsv").write_text(judged)
    found = printed(capsys, "M", "--pairs", str(tmp_path / "b"))
    assert (found["recall@1"], found["targets"]) == (1.0, 2)


def test_scored_prints_spearman(compass, tmp_path, capsys):
    """Cosines 1, 0, -1 against scores 5, 2.5, 0: the same order. A blank line is no line."""
    file = lines(tmp_path / "scored.jsonl", ["north", "north", 5], ["north", "east", 2.5])
    with open(file, "a") as more:
        more.write('\n{"sentence1": "north", "sentence2": "south", "score": 0, "genre": "maps"}\n')
    assert printed(capsys, "M", "--scored", file) == {
        "model": "M", "file": file, "spearman": pytest.approx(1.0), "sentence_pairs": 3}


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t")])
def test_scores_in_a_table_are_numbers(compass, tmp_path, capsys, name, separator):
    """In order of number, not of text: cosines -1, 0, 1 and 9, 10, 1e2."""
    rows = ("sentence1", "sentence2", "score"), ("north", "south", "9"), ("north", "east", "10"), (
        "north", "north", " 1e2")
    (tmp_path / name).write_text("".join(separator.join(row) + "\n" for row in rows))
    assert printed(capsys, "M", "--scored", str(tmp_path / name))["spearman"] == pytest.approx(1.0)


def test_labelled_prints_v_measure(compass, tmp_path, capsys):
    """Two directions, two labels; 7 and "7" are one label."""
    file = lines(tmp_path / "labelled.jsonl", ["north", 7], ["north north", "7"],
                 {"text": "east", "label": "sun"})
    assert printed(capsys, "M", "--labelled", file) == {
        "model": "M", "file": file, "v_measure": pytest.approx(1.0), "texts": 3, "labels": 2}


@pytest.mark.parametrize("flag, content, expected", [
    ("--pairs", '["a"]', 'line 1: field "positive"'),
    ("--pairs", "", "found no row"),
    ("--scored", "\n\n", "found no row"),
    ("--scored", '["a", "b", 1]\n{"a": ', "line 2: not JSON"),
    ("--scored", '["a", "b", 1]\n3', "line 2: found 3"),
    ("--scored", '["a", "b"]', 'line 1: field "score" is missing; found "sentence1", "sentence2"'),
    ("--scored", '["a", "b", NaN]', 'line 1: field "score": found NaN, expected a finite number'),
    ("--scored", '["a", "b", true]', 'line 1: field "score": found true, expected a finite number'),
    ("--scored", '["a", "b", "4,5"]', 'line 1: field "score": found "4,5", expected a finite'),
    ("--scored", '["a", "b", "nan"]', 'line 1: field "score": found NaN, expected a finite'),
    ("--scored", '["a", 2, 1]', 'line 1: field "sentence2": found 2, expected text'),
    ("--scored", '["a", "b", 1]\n["c", "d", 1]', "found 1 on every line"),
    ("--labelled", '{"text": "a", "label": 1.5}',
     'line 1: field "label": found 1.5, expected text or a whole number'),
    ("--labelled", '{"text": "", "label": 1}', 'line 1: field "text": the text is empty'),
    ("--labelled", '["a", "x"]\n["b", "x"]', "found 'x' on every line")])
def test_a_bad_file_ends_in_one_line_and_status_2(
        compass, tmp_path, capsys, flag, content, expected):
    """The line names the file, and the line and field where there is one."""
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    said = refused(capsys, "M", flag, str(file))
    assert said.startswith(f"evaluation: {file}") and expected in said


@pytest.mark.parametrize("flag", ["--pairs", "--scored", "--labelled"])
def test_a_missing_file_and_one_that_is_no_text_are_refused(compass, tmp_path, capsys, flag):
    """No traceback: the name of the file and the reason."""
    assert "nowhere.jsonl" in refused(capsys, "M", flag, str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b\x08\x00\xff")
    said = refused(capsys, "M", flag, str(tmp_path / "packed.jsonl"))
    assert "packed.jsonl, line 1" in said


def test_an_unknown_model_is_refused(tmp_path, capsys):
    """The real `model.load`, on a directory that is not there."""
    file = lines(tmp_path / "pairs.jsonl", ["north", "north"])
    assert "no-such-model" in refused(capsys, str(tmp_path / "no-such-model"), "--pairs", file)


def test_a_saved_encoder_is_measured_from_outside(tokenizer, tmp_path):
    """`python -m evaluation` on a JinaBERT with random weights: a text is nearest to itself."""
    config = model.JinaBertConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1,
                                  num_attention_heads=1, intermediate_size=64)
    encoder = model.PooledEncoder(model.JinaBertModel(config))
    model.save(encoder, tokenizer, tmp_path / "model")
    file = lines(tmp_path / "pairs.jsonl", ["north", "north"], ["east", "east"],
                 ["south west", "south west"])
    run = python("-m", "evaluation", tmp_path / "model", "--pairs", file)
    assert run.returncode == 0 and json.loads(run.stdout)["recall@1"] == 1.0, run.stderr


@pytest.mark.parametrize("flags", [
    ["--max-length", "2"], ["--micro-tokens", "0"], ["--scored", "b.jsonl"],
    ["--seed", "4294967296"]])
def test_flags_that_cannot_work_are_refused(capsys, flags):
    """Two tokens leave no room for a word; a forward pass needs a token; one file is measured at a
    time."""
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(["M", "--pairs", "a.jsonl", *flags])
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]
