"""The best candidates of each query: exact by blocks, by an approximate index, and re-ranked by a costlier scorer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vla_jax.errors import UserError
from vla_jax.evaluation.exact_ranks import BLOCK, checked, product


def exact_top(
    queries: np.ndarray, candidates: np.ndarray, k: int, *, block: tuple[int, int] = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates of each query, by blocks.

    Args:
        queries: float32 ``[queries, width]``.
        candidates: float32 ``[candidates, width]``.
        k: how many, from 1 to all.
        block: queries and candidates of which the products are held at once.

    Returns:
        Their places int64 ``[queries, k]``, the best first; and their scores float32 ``[queries, k]``. Which of equally
        good candidates is the last one is not defined.

    Raises:
        UserError: for shapes that do not fit, a k out of range, or a feature that is not finite.
    """
    queries, candidates = _checked_pair(queries, candidates, k)
    rows, columns = block
    places = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), rows):
        some = queries[start : start + rows]
        best_scores = np.empty((len(some), 0), np.float32)
        best_places = np.empty((len(some), 0), np.int64)
        for first in range(0, len(candidates), columns):
            found = np.asarray(product(some, candidates[first : first + columns]))
            keep = min(k, found.shape[1])
            chosen = np.argpartition(-found, keep - 1, axis=1)[:, :keep]
            best_scores = np.concatenate([best_scores, np.take_along_axis(found, chosen, axis=1)], axis=1)
            best_places = np.concatenate([best_places, chosen + first], axis=1)
            order = np.lexsort((best_places, -best_scores), axis=1)[:, :k]
            best_scores = np.take_along_axis(best_scores, order, axis=1)
            best_places = np.take_along_axis(best_places, order, axis=1)
        places[start : start + rows], scores[start : start + rows] = best_places, best_scores
    return places, scores


def approximate_top(
    queries: np.ndarray, candidates: np.ndarray, k: int, *, index: str = "HNSW32"
) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates of each query by an index of FAISS, some of which it may miss.

    Args:
        queries: float32 ``[queries, width]``.
        candidates: float32 ``[candidates, width]``.
        k: how many, from 1 to all.
        index: the index, as FAISS's factory names it, for inner products: such as ``HNSW32`` or ``IVF256,Flat``.

    Returns:
        As :func:`exact_top`; -1 and minus infinity where fewer were found.

    Raises:
        UserError: without FAISS, for a name that its factory does not know, or as :func:`exact_top`.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("an approximate index needs FAISS; pip install faiss-cpu, or use exact_top") from error
    queries, candidates = _checked_pair(queries, candidates, k)
    try:
        made = faiss.index_factory(candidates.shape[1], index, faiss.METRIC_INNER_PRODUCT)
        made.train(candidates)
    except RuntimeError as error:
        raise UserError(f"FAISS cannot make the index {index!r} of {len(candidates)} candidates: {error}") from error
    made.add(candidates)
    scores, places = made.search(queries, k)
    return places.astype(np.int64), np.where(places >= 0, scores, -np.inf).astype(np.float32)


def rerank(
    before: np.ndarray,
    top: np.ndarray,
    right: np.ndarray,
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Puts each query's best candidates in the order of a better, costlier scorer, such as a fusion adapter's.

    Candidates that are not among the best stay behind them; a tie stands before the right one.

    Args:
        before: int ``[queries]``, how many wrong candidates stand before each query's best right one at first; or
            ``[queries, right candidates]`` before each of them, the best first, -1 on unused places
            (:class:`vla_jax.evaluation.exact_ranks.Before`), from which mean average precision follows as well. It
            stays for right ones that are not among the best.
        top: int ``[queries, k]``, places of the best candidates, -1 for none.
        right: bool ``[queries, k]``, which of these belong to the query.
        score: ``(queries int [pairs], candidates int [pairs]) -> scores [pairs]``.

    Returns:
        int64, of the shape of ``before``: the same counts afterwards; :func:`vla_jax.evaluation.retrieval.judge` takes
        them.

    Raises:
        UserError: for shapes that do not fit, more right candidates among the best than ``before`` knows, or scores
            that are NaN or not one a pair.
    """
    before, top, right = np.asarray(before), np.asarray(top), np.asarray(right, bool)
    if before.ndim not in (1, 2) or before.shape[:1] != top.shape[:1] or right.shape != top.shape:
        raise UserError(
            "re-ranking needs [queries] or [queries, right candidates], and [queries, k] twice; given "
            f"{before.shape}, {top.shape}, {right.shape}"
        )
    right = right & (top >= 0)
    table = before[:, None] if before.ndim == 1 else before  # [queries, right candidates]
    if before.ndim == 2 and (query := np.flatnonzero(right.sum(1) > (table >= 0).sum(1))).size:
        raise UserError(
            f"query {query[0]} has {right[query[0]].sum()} right candidates among its best and "
            f"{(table[query[0]] >= 0).sum()} in all; both must count the same candidates"
        )
    # Where nothing right is among the best, the order within them does not matter.
    rows, ranks = np.nonzero((top >= 0) & right.any(1, keepdims=True))
    found = np.asarray(score(rows, top[rows, ranks]), np.float64)
    if found.shape != rows.shape or np.isnan(found).any():
        raise UserError(
            f"a pair scorer gives one number a pair, none of them NaN; it gave {found.shape} for {len(rows)}"
        )
    scores = np.full(top.shape, -np.inf)
    scores[rows, ranks] = found
    wrong = ~right & (top >= 0)
    of_right = -np.sort(-np.where(right, scores, -np.inf), axis=1)  # [queries, k], the best first
    after = table.astype(np.int64)
    for place in range(min(table.shape[1], top.shape[1])):
        passed = ((scores >= of_right[:, place, None]) & wrong).sum(1)
        after[:, place] = np.where(right.sum(1) > place, passed, after[:, place])
    return after.reshape(before.shape)


def _checked_pair(queries: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    queries, candidates = checked("queries", queries), checked("candidates", candidates)
    if queries.shape[1] != candidates.shape[1]:
        raise UserError(f"queries have features of width {queries.shape[1]} and candidates of {candidates.shape[1]}")
    if not 1 <= k <= len(candidates):
        raise UserError(f"the {k} best of {len(candidates)} candidates; k must lie between 1 and {len(candidates)}")
    return queries, candidates
