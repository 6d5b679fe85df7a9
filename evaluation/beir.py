"""Retrieval in a collection of BEIR's (Thakur et al. 2021): a directory of documents, queries and
graded judgements, as corpora/convert.py reads it.

Documents are read as they are embedded, and searched at once: of their texts and vectors a chunk is
held, of all of them the ids. Axis letters: M queries, K documents, k of a chunk, D width. Nothing
here knows how an encoder was trained.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from tqdm import tqdm

from corpora.convert import beir_file, check_known, read_judgements, read_texts
from corpora.formats import Prompts
from evaluation import search
from evaluation.embed import embed
from evaluation.metrics import graded_ndcg, graded_recall, reciprocal_rank

CHUNK = 2048  # ours: documents embedded and searched at a time, for memory only
RESULTS = 100  # of a query


class Collection(NamedTuple):
    """The queries of a split that have a relevant document. A document is its number in the
    file."""

    corpus: Path
    split: str
    queries: list[str]  # M
    grades: list[dict[int, int]]  # M, {document: grade}
    excluded: search.Cells  # queries and the documents that have their ids, which are no results
    order: np.ndarray  # (K,) position of each document's id among all ids, sorted


def read(directory: str, split: str) -> Collection:
    """Reads queries and judgements, and checks the documents. Says what does not count. Raises
    OSError or ValueError, one line each."""
    folder = Path(directory)
    qrels, corpus = folder / "qrels" / f"{split}.tsv", beir_file(folder, "corpus")
    scores = read_judgements(qrels)
    documents = {id: i for i, (id, _) in enumerate(read_texts(corpus, may_be_empty=True))}
    texts = dict(read_texts(beir_file(folder, "queries"), may_be_empty=False))
    judged = {}
    for (query, document), (number, grade) in scores.items():
        check_known(qrels, number, "query-id", query, texts)
        check_known(qrels, number, "corpus-id", document, documents)
        judged.setdefault(query, {})[documents[document]] = grade
    relevant = {id: grades for id, grades in judged.items() if max(grades.values()) > 0}
    if not relevant:
        raise ValueError(f"{qrels}: no score is above 0, so no query has a relevant document; "
                         f"there is nothing to measure")
    if len(relevant) < len(texts):
        print(f"{qrels}: {len(texts) - len(relevant)} of {len(texts)} queries have no relevant "
              f"document here and are left out", file=sys.stderr)
    same = [(i, documents[id]) for i, id in enumerate(relevant) if id in documents]
    if same:  # as BEIR does
        print(f"{corpus}: the results of {len(same)} queries are without a document that has the "
              f"query's id", file=sys.stderr)
    order = np.empty(len(documents), int)
    order[[documents[id] for id in sorted(documents)]] = np.arange(len(documents))
    return Collection(corpus, split, [texts[id] for id in relevant], list(relevant.values()),
                      tuple(np.array(same, int).reshape(-1, 2).T), order)


def retrieval(encoder, tokenizer, collection: Collection, max_length: int | None,
              micro_tokens: int, prompts: Prompts | None = None) -> dict:
    """trec_eval's figures of exact search by cosine, over all documents.

    trec_eval takes scores as they are, and of equal ones the document first whose id sorts last.
    Ours: cosines are rounded to TIE before, for fp32 rounding must not make an order.
    """
    query, document = prompts or Prompts()
    sizes = dict(max_length=max_length, micro_tokens=micro_tokens)
    q = F.normalize(embed(encoder, tokenizer, collection.queries, **sizes, prompt=query), dim=-1)
    chunks = embed_corpus(
        collection, partial(embed, encoder, tokenizer, **sizes, prompt=document))
    index, cosines = search.nearest(q.to(next(encoder.parameters()).device), chunks, RESULTS,
                                    collection.excluded, collection.order)
    judged = [list(grades.values()) for grades in collection.grades]
    found = [[grades.get(i, 0) for i in row[np.isfinite(cosine)].tolist()]  # -inf is no result
             for grades, row, cosine in zip(collection.grades, index, cosines)]
    return {"split": collection.split,
            "ndcg@10": fmean(graded_ndcg(f, j, 10) for f, j in zip(found, judged)),
            "recall@100": fmean(graded_recall(f, j, 100) for f, j in zip(found, judged)),
            "mrr@10": fmean(reciprocal_rank(f, 10) for f in found),
            "queries": len(q), "documents": len(collection.order)}


def embed_corpus(collection: Collection, embed_texts: Callable) -> Iterator[np.ndarray]:
    """The documents' vectors (k, D) of length 1."""
    texts = (text for _, text in read_texts(collection.corpus, may_be_empty=True))
    with tqdm(total=len(collection.order), unit="document") as bar:
        while chunk := list(islice(texts, CHUNK)):
            yield F.normalize(embed_texts(chunk), dim=-1).numpy()
            bar.update(len(chunk))
