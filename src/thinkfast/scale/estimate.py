"""What n samples a problem say about k of them, and how sure that is.

pass@k and maj@k are expectations over all subsets of size k, not over one choice of k samples. Intervals come from a
bootstrap over problems whose resamples are shared by everything that is compared.
"""

from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thinkfast.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_EXACT_SAMPLES = 1000  # binomials scaled by 2^-n leave float64 beyond this
_SURE = 1e-9
_EXACT_WORK = 1e6  # multiplications a problem and k above which drawing subsets is cheaper
_BLOCK = 2**15  # float64 values in one intermediate array: it stays in the cache


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Floats: ...
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> Any:
    """Probability that a random size-k subset of n samples, c of them right, holds a right one.

    The unbiased estimator 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1), as a product that neither overflows nor
    cancels. Scalars give a float, arrays broadcast. Raises BadInput unless 0 <= c <= n and 1 <= k <= n.
    """
    total, right, size = np.broadcast_arrays(*(np.asarray(value, dtype=np.int64) for value in (n, c, k)))
    for name, value, low, high in (("c", right, 0, total), ("k", size, 1, total)):
        wrong = (value < low) | (value > high)
        if wrong.any():
            raise BadInput(f"{name} = {value[wrong][0]}: expected {low} <= {name} <= n = {total[wrong][0]}")
    missed = np.ones(total.shape)
    for drawn in range(int(size.max(initial=0))):
        left = np.maximum(total - right - drawn, 0) / np.maximum(total - drawn, 1)
        missed = np.where(drawn < size, missed * left, missed)
    return (1.0 - missed)[()]


def majority_at_k(classes: ArrayLike, correct_class: int, k: ArrayLike, seed: int = 0) -> Floats:
    """Expected share of the vote that `correct_class` wins over all size-k subsets of one problem's samples.

    classes (n,): answer class of every sample, -1 for an answer that votes for nobody. Ties split evenly over the tied
    classes; a subset without votes wins nothing. Returns an array of the shape of k. Exact; see `majority_shares` for
    when it draws subsets instead. Raises BadInput unless 1 <= k <= n.
    """
    votes = np.asarray(classes, dtype=np.int64)
    sizes = np.asarray(k, dtype=np.int64)
    own = np.count_nonzero(votes == correct_class) if correct_class >= 0 else 0
    others = np.unique(votes[(votes >= 0) & (votes != correct_class)], return_counts=True)[1]
    silent = len(votes) - own - int(others.sum())
    shares = majority_shares(np.array([own]), others[None, :], np.array([silent]), sizes.ravel().tolist(), seed)
    return np.reshape(shares[0], sizes.shape)


def majority_shares(
    own: Ints, others: Ints, silent: Ints, ks: Sequence[int], seed: int = 0, resamples: int = 1000
) -> Floats:
    """`majority_at_k` for many problems at once, from vote counts.

    own (P,): votes of the class in question; others (P, C): votes of the other classes, zeros where there are fewer;
    silent (P,): samples that vote for nobody. Returns (P, len(ks)). Exact up to 1000 samples a problem for a k whose
    work is in proportion; else the mean over `resamples` subsets drawn with `seed`. Raises BadInput unless every k is
    between 1 and the samples of every problem.
    """
    total = own + others.sum(axis=1) + silent
    fewest = int(total.min(initial=np.iinfo(np.int64).max))
    for k in ks:
        if not 1 <= k <= fewest:
            raise BadInput(f"k = {k}: expected 1 <= k <= n = {fewest}")
    shares = np.zeros((len(own), len(ks)))
    if not shares.size:
        return shares
    others = -np.sort(-others, axis=1)
    keys, inverse = np.unique(np.column_stack([own, silent, others]), axis=0, return_inverse=True)
    own, silent, others = keys[:, 0], keys[:, 1], keys[:, 2:]
    sizes = np.array(ks)[None, :]
    rivals = np.minimum(own[:, None], others)[:, :, None]
    work = sizes * (np.minimum(rivals, sizes[:, None, :]).astype(float) ** 2).sum(axis=1)
    exact = (keys.sum(axis=1) <= _EXACT_SAMPLES)[:, None] & (work <= _EXACT_WORK)
    shares, sure = _sure_shares(own, others, keys.sum(axis=1), sizes)
    for able in np.unique(exact, axis=0):
        rows = np.flatnonzero((exact == able).all(axis=1))
        near = np.array(ks)[able].tolist()
        if near:
            shares[np.ix_(rows, able)] = _exact_shares(own[rows], others[rows], silent[rows], near)
        for row in rows:
            left = ~(able | sure[row])
            if left.any():
                rng, far = np.random.default_rng([seed, int(row)]), np.array(ks)[left].tolist()
                shares[row, left] = _drawn_shares(keys[row], far, rng, resamples)
    return shares[inverse.ravel()]


def _sure_shares(own: Ints, others: Ints, total: Ints, sizes: Ints) -> tuple[Floats, NDArray[np.bool_]]:
    """1 where the class in question leads all others by so much, and 0 where another leads it by so much, that the
    chance of anything else is below `_SURE`; and where that is so. Shapes (P, len(ks)).

    A vote for one class and against another, or against nobody, lies in [-1, 1], so the chance that k of n without
    replacement turn a mean lead of m is at most exp(-k m^2 / 2 / (1 - (k - 1) / n)) (Serfling, Annals of Statistics 2,
    1974, corollary 1.1).
    """
    lead = (own - others.max(axis=1, initial=0))[:, None] / total[:, None]
    chance = np.exp(-sizes * lead**2 / 2 / (1 - (sizes - 1) / total[:, None]))
    return (lead > 0).astype(float) * np.ones(sizes.shape), (others.shape[1] + 1) * chance < _SURE


def _exact_shares(own: Ints, others: Ints, silent: Ints, ks: Sequence[int]) -> Floats:
    """Generating functions: the coefficient of x^k counts subsets of size k, a factor y marks a tie.

    With j votes drawn for the own class, another class of m votes contributes sum_{i<j} C(m,i) x^i + y C(m,j) x^j, and
    t ties pay 1/(1+t), the integral of y^t over [0, 1]: Gauss-Legendre nodes make it exact. All terms are positive.
    """
    largest = max(ks)
    total = own + others.sum(axis=1) + silent
    binomials = _scaled_binomials(int(total.max(initial=0)), largest)
    sums = np.zeros((len(own), largest + 1))
    for votes in range(1, min(int(own.max(initial=0)), largest) + 1):
        able = np.flatnonzero(own >= votes)
        rivals = (others[able] >= votes).sum(axis=1)
        able = able[np.argsort(-rivals, kind="stable")]
        width, length = int(rivals.max(initial=0)), largest + 1 - votes
        nodes, weights = _unit_nodes(min(width, (largest - votes) // votes) // 2 + 1)
        step = max(1, _BLOCK // (len(nodes) * length))
        for rows in (able[start : start + step] for start in range(0, len(able), step)):
            counts = np.where(others[rows] >= votes, others[rows], 0)
            rest = total[rows] - own[rows] - counts.sum(axis=1)
            series = np.repeat(binomials[rest, None, :length], len(nodes), axis=1)
            for rival in range(width):
                size = counts[: np.count_nonzero(counts[:, rival]), rival]
                series[: len(size)] = _times_rival(series[: len(size)], binomials[size], votes, nodes)
            gained = np.einsum("q,pqk->pk", weights, series)
            sums[rows, votes:] += binomials[own[rows], votes, None] * gained
    shares: Floats = sums[:, list(ks)] / binomials[total][:, list(ks)]
    return shares


def _times_rival(series: Floats, binomials: Floats, votes: int, nodes: Floats) -> Floats:
    """series (p, q, L) times the truncated polynomial of one rival class with binomials (p, K+1)."""
    length = series.shape[2]
    product = np.zeros_like(series)
    for drawn in range(min(votes, length - 1) + 1):
        factor = binomials[:, drawn, None, None]
        if drawn == votes:
            factor = factor * nodes[:, None]
        product[:, :, drawn:] += factor * series[:, :, : length - drawn]
    return product


def _scaled_binomials(n: int, k: int) -> Floats:
    """C(m, i) / 2^m for m <= n and i <= k, shape (n+1, k+1)."""
    table = np.zeros((n + 1, k + 1))
    table[0, 0] = 1.0
    for m in range(1, n + 1):
        table[m] = table[m - 1]
        table[m, 1:] += table[m - 1, :-1]
        table[m] /= 2
    return table


@lru_cache(maxsize=64)
def _unit_nodes(count: int) -> tuple[Floats, Floats]:
    """Gauss-Legendre nodes and weights on [0, 1]: exact for polynomials of degree below 2 * count."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def _drawn_shares(key: Ints, ks: Sequence[int], rng: np.random.Generator, resamples: int) -> list[float]:
    """The same expectation from drawn subsets; key is (own, silent, other classes)."""
    shares = []
    for k in ks:
        drawn = rng.multivariate_hypergeometric(key, k, size=resamples, method="marginals")
        votes = np.delete(drawn, 1, axis=1)
        top = votes.max(axis=1)
        tied = (votes == top[:, None]).sum(axis=1)
        shares.append(float(np.mean(np.where((votes[:, 0] == top) & (top > 0), 1.0 / tied, 0.0))))
    return shares


def bootstrap_weights(problems: int, replicates: int, seed: int) -> Floats:
    """Weights (replicates, problems) of problems drawn with replacement; every row sums to 1.

    `weights @ values` gives the replicates of a mean over problems. Using the same weights for two models makes the
    bootstrap of their difference a paired one.
    """
    draws = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), size=replicates)
    return draws / problems


def percentile_interval(values: Floats, weights: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Pointwise percentile interval (low, high) of the mean over problems of values (problems, points)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(weights @ values, [tail, 1 - tail], axis=0)
    return low, high


def simultaneous_band(differences: Floats, weights: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Band (low, high) that holds the mean of differences (problems, points) at all points at once.

    The half-width is q * sd with q the quantile, over replicates, of the largest |replicate - mean| / sd, and never
    below the normal quantile. Where two models differ on a handful of problems their sd says too little: one
    more discordant pair is added to the sum of squares, as in the adjusted interval of Agresti and Min
    (Statistics in Medicine 24, 2005). A point where no problem differs has zero width.
    """
    problems = len(differences)
    mean = differences.mean(axis=0)
    squares = ((differences - mean) ** 2).sum(axis=0)
    sd = np.sqrt((squares + 1) / (problems * max(problems - 1, 1)))
    sd[~differences.any(axis=0)] = 0.0
    live = sd > 0
    farthest = (np.abs(weights @ differences[:, live] - mean[live]) / sd[live]).max(axis=1, initial=0.0)
    quantile = float(np.quantile(farthest, confidence, method="higher"))
    width = max(quantile, NormalDist().inv_cdf((1 + confidence) / 2)) * sd
    return mean - width, mean + width
