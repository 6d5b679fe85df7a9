"""Metrics: how good an encoder's embeddings are on texts that it was not trained on.

Paper: §6 reports MTEB, whose main figures for retrieval, similarity and clustering are nDCG@10,
Spearman's correlation and V-measure. Ours: the same figures on your own files. train.py calls
`in_batch_accuracy` and `held_out_retrieval`.

Axis letters: M queries or texts, K targets or clusters, D width. A position is a place in a list of
search results, from 1 on. Nothing here knows about losses, optimizers or processes.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corpora.formats import Prompts, text_hash
from evaluation.embed import embed

TIE = 1e-6  # cosines closer than this are equal: fp32 rounding moves them by some 1e-7
SCORES_AT_ONCE = 2**24  # 64 MB of fp32 cosines, however many queries and targets there are


# retrieval

def positions(queries: Tensor, targets: Tensor, answers: Tensor | None = None) -> Tensor:
    """1-based position of each query's own target among all targets by cosine, ties counted against
    us.

    queries (M, D), targets (K, D), answers (M,) the row of `targets` that answers query i, by
    default row i -> (M,) int64

        position(i) = K - (number of j with cos(q_i, t_j) < cos(q_i, own target of i) - TIE)

    This is the pessimistic position: an encoder that has collapsed to one vector ties everything,
    and with ties in our favour it would score 1.0. NaN is never lower, so it ends last too.
    """
    queries = F.normalize(queries.detach().float(), dim=-1)
    targets = F.normalize(targets.detach().float(), dim=-1)
    if answers is None:
        answers = torch.arange(len(queries), device=queries.device)
    rows, found = max(1, SCORES_AT_ONCE // len(targets)), []
    for q, answer in zip(queries.split(rows), answers.split(rows)):
        cosine = q @ targets.T  # (rows, K)
        lower = cosine < cosine.gather(1, answer[:, None]) - TIE
        found.append(len(targets) - lower.sum(1))
    return torch.cat(found)


def recall_at(positions: Tensor, k: int) -> float:
    """Share of queries whose target is among the first k. positions (M,)."""
    return (positions <= k).double().mean().item()


def mean_reciprocal_rank(positions: Tensor) -> float:
    """Mean of 1 / position. positions (M,)."""
    return positions.double().reciprocal().mean().item()


def ndcg_at_10(positions: Tensor) -> float:
    """Mean of 1 / log2(1 + position), 0 beyond position 10. positions (M,). One relevant target:
    the ideal DCG is 1 / log2(2) = 1."""
    return torch.where(positions <= 10, 1 / torch.log2(1 + positions.double()), 0.0).mean().item()


def in_batch_accuracy(q: Tensor, p: Tensor, first_row: int = 0) -> float:
    """Share of queries whose own positive is the most similar of the batch. q (M, D), p (K, D), of
    which first_row + i is q[i]'s."""
    answers = torch.arange(first_row, first_row + len(q), device=q.device)
    return recall_at(positions(q, p, answers), 1)


def retrieval(encoder, tokenizer, pairs, max_length: int | None, micro_tokens: int,
              prompts: Prompts | None = None) -> dict:
    """Search for the positive of every query among the positives of all. pairs: rows with .query
    and .positive.

    Targets equal but for case and white space (`text_hash`) are one candidate, or a copy of the
    right answer would stand there as a wrong one. A query with several targets counts once for
    each, and the others count as wrong.
    """
    hashes = np.array([text_hash(pair.positive) for pair in pairs], "u8")
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    queries, targets = [pair.query for pair in pairs], [pairs[i].positive for i in first]
    query, document = prompts or Prompts()
    q = embed(encoder, tokenizer, queries, max_length, micro_tokens, query)
    t = embed(encoder, tokenizer, targets, max_length, micro_tokens, document)
    found = positions(q, t, torch.from_numpy(inverse))
    return {"recall@1": recall_at(found, 1), "recall@10": recall_at(found, 10),
            "mrr": mean_reciprocal_rank(found), "ndcg@10": ndcg_at_10(found), "targets": len(t)}


def held_out_retrieval(encoder, tokenizer, sources, max_length: int, micro_tokens: int) -> dict:
    """{"mean": metrics, "sources": {name: metrics}} of `retrieval` among each source's held-out
    pairs."""
    scores = {s.name: retrieval(encoder, tokenizer, s.held_out, max_length, micro_tokens, s.prompts)
              for s in sources if s.held_out}
    names = next(iter(scores.values()), {})
    mean = {name: sum(s[name] for s in scores.values()) / len(scores) for name in names}
    return {"mean": mean, "sources": scores}


# retrieval with graded judgements, as trec_eval counts, and BEIR with it

def dcg(grades: list[int]) -> float:
    """Sum of grade / log2(1 + position). A grade below 1 is not relevant and gains nothing."""
    return sum(max(grade, 0) / math.log2(1 + position) for position, grade in enumerate(grades, 1))


def graded_ndcg(found: list[int], judged: list[int], k: int) -> float:
    """DCG of a query's first k results over that of the best k there are. found: the results'
    grades in order, 0 where nobody judged; judged: all grades of the query, in any order, of
    results or not. trec_eval's ndcg_cut.k."""
    return dcg(found[:k]) / dcg(sorted(judged, reverse=True)[:k])


def graded_recall(found: list[int], judged: list[int], k: int) -> float:
    """Share of all relevant documents that is among the first k results. trec_eval's recall.k."""
    return sum(grade > 0 for grade in found[:k]) / sum(grade > 0 for grade in judged)


def reciprocal_rank(found: list[int], k: int) -> float:
    """1 / position of the first relevant result, 0 beyond position k. trec_eval's recip_rank of k
    results."""
    return next((1 / i for i, grade in enumerate(found[:k], 1) if grade > 0), 0.0)


# similarity

def average_ranks(x) -> np.ndarray:
    """1-based ascending ranks, equal values sharing the mean of theirs: 5 7 7 9 -> 1 2.5 2.5 4. x
    (M,) -> (M,)."""
    _, inverse, count = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[inverse]


def spearman(a, b) -> float:
    """Spearman's correlation of a and b, both (M,): Pearson's r of their average ranks. The formula
    has no value where a or b is constant; we say 0, for no order was found."""
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else 0.0


def similarity(encoder, tokenizer, scored, max_length: int, micro_tokens: int,
               prompts: Prompts | None = None) -> dict:
    """Spearman's correlation of cosine and score. scored: (sentence1, sentence2, score) tuples,
    both sentences with the query's prompt."""
    first, second, score = map(list, zip(*scored))
    prompt = (prompts or Prompts()).query
    a = embed(encoder, tokenizer, first, max_length, micro_tokens, prompt)
    b = embed(encoder, tokenizer, second, max_length, micro_tokens, prompt)
    cosine = F.cosine_similarity(a, b).numpy().round(6)  # as TIE: rounding must not make an order
    return {"spearman": spearman(cosine, score), "sentence_pairs": len(score)}


# clustering

def entropy(x: np.ndarray) -> float:
    """H(X) = -sum_x share(x) ln share(x) of the values of x (M,)."""
    share = np.unique(x, return_counts=True)[1] / len(x)
    return -(share * np.log(share)).sum()


def v_measure(labels, clusters) -> float:
    """Harmonic mean of homogeneity h and completeness c (Rosenberg & Hirschberg 2007). labels C,
    clusters K, both (M,).

        h = 1 - H(C|K) / H(C), or 1 if H(C) = 0      H(C|K) = H(C,K) - H(K)
        c = 1 - H(K|C) / H(K), or 1 if H(K) = 0      H(K|C) = H(C,K) - H(C)
        V = 2 h c / (h + c), 0 if h = c = 0
    """
    _, C = np.unique(np.asarray(labels), return_inverse=True)
    _, K = np.unique(np.asarray(clusters), return_inverse=True)
    H_C, H_K, H_CK = entropy(C), entropy(K), entropy(C * (K.max() + 1) + K)
    h = max(0.0, 1 - (H_CK - H_K) / H_C) if H_C > 0 else 1.0  # max: rounding can leave -1e-16
    c = max(0.0, 1 - (H_CK - H_C) / H_K) if H_K > 0 else 1.0
    return float(2 * h * c / (h + c)) if h + c > 0 else 0.0


def k_means(x: Tensor, k: int, seed: int, restarts: int = 3) -> Tensor:
    """Clusters of the points x (M, D) -> (M,) in 0 .. k-1, the same for the same seed: of a few
    runs of k-means the one with the least squared distance. More clusters than distinct points
    leave some empty."""
    generator = torch.Generator().manual_seed(seed)
    x, k = x.detach().float().cpu(), min(k, len(x))
    runs = [lloyd(x, first_centres(x, k, generator)) for _ in range(restarts)]
    _, clusters = min(runs, key=lambda run: run[0])
    return clusters


def first_centres(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): each of the k centres (k, D) is a point of x (M, D)
    drawn by its squared distance to the nearest centre so far."""
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    nearest = torch.full((len(x),), math.inf)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, torch.cdist(x, centres[-1:])[:, 0].square())
        # 1e-30: all distances may be 0
        draw = torch.multinomial(nearest + 1e-30, 1, generator=generator)
        centres = torch.cat([centres, x[draw]])
    return centres


def lloyd(x: Tensor, centres: Tensor) -> tuple[float, Tensor]:
    """Lloyd's iteration until no point moves -> the squared distance of all points to their
    centres, and their clusters (M,). A cluster that loses its last point starts again at the point
    farthest from its centre."""
    clusters = torch.full((len(x),), -1)
    for _ in range(300):  # a few dozen are usual; the bound is for rounding that goes in circles
        distance, closest = torch.cdist(x, centres).min(1)
        if torch.equal(closest, clusters):
            break
        clusters, size = closest, torch.bincount(closest, minlength=len(centres))
        centres = torch.zeros_like(centres).index_add_(0, clusters, x)
        centres /= size.clamp(min=1)[:, None]
        empty = size == 0
        centres[empty] = x[distance.topk(int(empty.sum())).indices]
    return distance.square().sum().item(), clusters


def clustering(encoder, tokenizer, labelled, max_length: int, micro_tokens: int,
               prompts: Prompts | None = None, seed: int = 0) -> dict:
    """V-measure of k-means with as many clusters as labels, on unit vectors. labelled: (text,
    label) tuples."""
    texts, labels = map(list, zip(*labelled))
    k, prompt = len(set(labels)), (prompts or Prompts()).query
    x = F.normalize(embed(encoder, tokenizer, texts, max_length, micro_tokens, prompt), dim=-1)
    return {"v_measure": v_measure(labels, k_means(x, k, seed)), "texts": len(texts), "labels": k}
