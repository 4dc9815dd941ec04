"""Matrices known as a product of thin factors, ``X @ Y`` with X (d, R) and Y (R, k): never formed. All in float64."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

F64: TypeAlias = NDArray[np.float64]
Factorization: TypeAlias = Literal["balanced", "procrustes"]
"""How a product is split into B and A: half of each singular value to either; or that, turned towards the mean factors."""

_ZERO = 1e-7  # of the largest singular value: below what float32 factors can tell from nothing


def product_norm(x: F64, y: F64) -> float:
    """Frobenius norm of ``x @ y``, x (d, R), y (R, k), without forming the (d, k) product: O((d + k) R^2)."""
    return math.sqrt(max(float(np.sum((x.T @ x) * (y @ y.T).T)), 0.0))


def svd_factored(x: F64, y: F64) -> tuple[F64, F64, F64]:
    """Thin singular value decomposition of ``x @ y`` by two QR decompositions and one small one: O((d + k) R^2 + R^3).

    Args:
        x: (d, R).
        y: (R, k).

    Returns:
        U (d, m), singular values (m,) in falling order, V^T (m, k), with m = min(d, R, k). Signs are fixed: the entry of largest
        size in each column of U is positive.
    """
    qx, rx = np.linalg.qr(x)
    qy, ry = np.linalg.qr(y.T)
    u, values, vt = np.linalg.svd(rx @ ry.T, full_matrices=False)
    u = qx @ u
    del qx
    vt = vt @ qy.T
    for j in range(values.size):
        if u[np.argmax(np.abs(u[:, j])), j] < 0:
            u[:, j] *= -1
            vt[j] *= -1
    return u, values, vt


def rank_for(values: F64, *, energy: float) -> int:
    """Least rank that keeps this share of the sum of squared singular values; 1.0: all that are not zero. At least 1."""
    if not values.size or values[0] == 0:
        return 1
    if energy >= 1:
        return int(np.count_nonzero(values > _ZERO * values[0]))
    kept = np.cumsum(values * values)
    return min(int(np.searchsorted(kept, energy * kept[-1])) + 1, values.size)


def balanced(u: F64, values: F64, vt: F64, *, rank: int, spare: F64) -> tuple[F64, F64]:
    """The best pair of this rank (Eckart and Young, 1936), half of each singular value to either factor.

    Args:
        spare: rows (any, k) from which A is completed where the product has fewer than ``rank`` singular values: a component
            whose A and B are both zero would never learn again.

    Returns:
        B (d, rank), A (rank, k). Columns of B that only complete are zero.
    """
    live = min(int(np.count_nonzero(values > _ZERO * values[0])) if values.size and values[0] > 0 else 0, rank)
    root = np.sqrt(values[:live])
    b = np.zeros((u.shape[0], rank))
    a = np.zeros((rank, vt.shape[1]))
    b[:, :live], a[:live] = u[:, :live] * root, root[:, None] * vt[:live]
    if live < rank:
        size = float(np.sqrt(np.mean(np.sum(spare * spare, axis=1)))) if spare.size else 0.0
        a[live:] = size * _completion(vt[:live], spare, rank - live)
    return b, a


def orthonormal_rows(u: F64, values: F64, vt: F64, *, rank: int, spare: F64) -> tuple[F64, F64]:
    """As :func:`balanced` with every singular value in B: A has orthonormal rows."""
    live = min(int(np.count_nonzero(values > _ZERO * values[0])) if values.size and values[0] > 0 else 0, rank)
    b = np.zeros((u.shape[0], rank))
    b[:, :live] = u[:, :live] * values[:live]
    a = np.concatenate([vt[:live], _completion(vt[:live], spare, rank - live)])
    return b, a


def _completion(rows: F64, spare: F64, wanted: int) -> F64:
    """(wanted, k) orthonormal rows, orthogonal to ``rows`` (orthonormal), from the span of ``spare``; zeros beyond it."""
    out = np.zeros((wanted, rows.shape[1]))
    if not wanted or not spare.size:
        return out
    rest = spare - (spare @ rows.T) @ rows
    rest -= (rest @ rows.T) @ rows  # twice is enough (Kahan; Parlett, The Symmetric Eigenvalue Problem, 1980)
    _, values, vt = np.linalg.svd(rest, full_matrices=False)
    found = min(int(np.count_nonzero(values > _ZERO * max(float(np.linalg.norm(spare)), 1e-300))), wanted)
    out[:found] = vt[:found]
    return out


def aligned(b: F64, a: F64, towards_b: F64, towards_a: F64) -> tuple[F64, F64]:
    """The pair ``(b @ O.T, O @ a)`` of the same product that is nearest to another pair: the orthogonal Procrustes problem.

    Source: Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966.
    """
    u, _, vt = np.linalg.svd(a @ towards_a.T + b.T @ towards_b)
    turn = vt.T @ u.T
    return b @ turn.T, turn @ a
