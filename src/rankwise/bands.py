"""All singular values of a dense matrix: Gram matrix, symmetric band, tridiagonal, values.

In: a tall finite matrix. Out: its singular values, largest first, float64. numpy and ctypes at import.

LAPACK's one-stage tridiagonalisation is held up by matrix-vector products. Two stages (dense to band with
matrix products, band to tridiagonal by bulge chasing: Bischof, Lang & Sun 2000, doi:10.1145/365723.365735)
are not. scipy wraps neither stage, but the LAPACK it has loaded holds the second, `dsytrd_sb2st` (Haidar,
Ltaief & Dongarra 2011, doi:10.1145/2063384.2063394); ctypes calls it there. Where it is missing, or does
not repeat numpy's values on a small matrix, scipy's `eigvalsh` does the whole.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BAND: Final = 64
"""Columns of a panel and subdiagonals of the band: wider panels multiply faster, a wider band chases slower."""
SMALLEST_TWO_STAGE: Final = 3072
"""Columns below which `eigvalsh` is faster: up to there most of the matrix stays in the cache."""
TRACE_TOLERANCE: Final = 1e-11
"""Largest drift of the trace of the Gram matrix; rounding leaves about 1e-14."""
LAPACK_NAMES: Final = ("dgemm", "dsymm", "dsyrk", "dsyr2k", "dgeqrt3", "dsytrd_sb2st")


def gram_or_band_values(tall: Array) -> NDArray[np.float64]:
    """Return all singular values of a matrix.

    The Gram matrix squares the condition number, so it is formed and reduced in float64: the error of a
    value is about 1e-15 sigma_1^2 / sigma, 1e-9 relative at 1e-3 of the largest. Beyond the matrix it
    needs the float64 Gram matrix (2 times the memory of a square float32 matrix) and a quarter more.

    Args:
        tall: shape (rows, n), rows >= n, float32 or float64, finite.

    Returns:
        n values, largest first. Values below 1e-7 of the largest are rounding.
    """
    n = tall.shape[1]
    exponent = _exponent(tall)
    if n == 0 or exponent is None:
        return np.zeros(n)
    squares = None
    lapack = _lapack() if n >= SMALLEST_TWO_STAGE and fast_route() else None
    if lapack is not None:
        with lapack.team() as team:
            gram = _gram(tall, exponent, size=-(-n // BAND) * BAND, add=team.add_gram)
            squares = _two_stage_values(gram, team)
        del gram
    if squares is None:
        from scipy.linalg import eigvalsh

        gram = _gram(tall, exponent, size=n, add=_add_gram)
        squares = eigvalsh(gram, driver="evd", lower=True, overwrite_a=True, check_finite=False)
    largest_first = np.sort(squares)[::-1][:n]  # rows that padded the Gram matrix are zeros at the end
    sigma: NDArray[np.float64] = np.ldexp(np.sqrt(np.maximum(largest_first, 0.0)), exponent)
    return sigma


@lru_cache(maxsize=1)
def fast_route() -> bool:
    """Whether the two-stage route works here: found, and right on a matrix of 5 panels; found out once a process."""
    try:
        lapack = _lapack()
        if lapack is None:
            return False
        size = 5 * BAND
        square = np.random.default_rng(0).standard_normal((size, size)) * np.geomspace(1, 1e-3, size)
        wanted = np.linalg.eigvalsh(square.T @ square)
        with lapack.team() as team:
            found = _two_stage_values(_gram(square, 0, size=size, add=team.add_gram), team)
    except Exception:  # of whatever kind: there is another route
        return False
    # backward stable both: n eps of the largest, 320 * 2.2e-16 = 7e-14
    return found is not None and bool(np.max(np.abs(np.sort(found) - wanted)) <= 1e-12 * wanted[-1])


def _exponent(tall: Array) -> int | None:
    """Return e with 2**(e - 1) <= max |entry| < 2**e, or None for a matrix of zeros."""
    largest = max(float(tall.max()), -float(tall.min())) if tall.size else 0.0
    return max(math.frexp(largest)[1], -1000) if largest else None


def _gram(tall: Array, exponent: int, *, size: int, add: Callable[[Array, Array], None]) -> Array:
    """Return the lower triangle (size, size) of the Gram matrix of 2**-exponent * tall, padded with zeros.

    A power of two is exact, and squares neither overflow nor vanish. The float64 copy is made an eighth of
    the rows at a time at most; products of float32 entries are exact in it. Columns are contiguous.
    """
    rows, n = tall.shape
    step = min(max(rows // 8, 1), 512)  # longer products than 512 are no faster
    gram = np.zeros((size, size), order="F")
    by_rows = tall.strides[1] <= tall.strides[0]
    for start in range(0, rows, step):
        part = tall[start : start + step]
        copy = np.zeros((size, len(part)), order="F" if by_rows else "C")
        np.multiply(part.T, 2.0**-exponent, out=copy[:n], dtype=np.float64)
        add(gram, copy)
    return gram


def _add_gram(gram: Array, copy: Array) -> None:
    """Add copy @ copy.T (size, size) to the lower triangle by scipy, in place."""
    from scipy.linalg.blas import dsyrk

    stored, op = _stored(copy)
    dsyrk(1.0, stored, trans=op == "T", beta=1.0, c=gram, lower=1, overwrite_c=1)


class _Lapack:
    """Fortran routines of one loaded library, called on column-major blocks of float64 arrays.

    Integers are passed as 8 bytes: on a little-endian machine, a library of 4-byte integers reads the same.
    """

    def __init__(self, library: Any, pattern: str) -> None:
        self._routines = {name: getattr(library, pattern.format(name)) for name in LAPACK_NAMES}
        control = pattern.replace("{}_", "{}")  # openblas_set_num_threads, or ...64_ where integers are long
        self._read_threads = getattr(library, control.format("openblas_get_num_threads"), None)
        self._set_threads = getattr(library, control.format("openblas_set_num_threads"), None)
        self._lock = Lock()
        self._inside = 0  # matrices under way
        self._usual_threads = 1

    def call(self, name: str, *arguments: str | int | float | Array) -> None:
        """Call a routine; raise ArithmeticError where it is one of LAPACK's and its `info` is not 0."""
        info = ctypes.c_int64(0)
        letters = sum(isinstance(argument, str) for argument in arguments)
        passed = [_pointer(argument) for argument in arguments]
        if name in ("dgeqrt3", "dsytrd_sb2st"):
            passed.append(ctypes.byref(info))
        # gfortran passes the length of every character argument at the end
        self._routines[name](*passed, *[ctypes.c_size_t(1)] * letters)
        if info.value:
            raise ArithmeticError(f"{name} gave info {ctypes.c_int32(info.value).value}")

    def multiply(self, a: Array, b: Array, c: Array, *, alpha: float = 1.0, beta: float = 0.0) -> None:
        """C = alpha A B + beta C in place; a and b may be transposed views of column-major blocks."""
        a_stored, op_a = _stored(a)
        b_stored, op_b = _stored(b)
        lda, ldb = _leading(a_stored), _leading(b_stored)
        m, n = c.shape
        inner = a.shape[1]
        self.call("dgemm", op_a, op_b, m, n, inner, alpha, a_stored, lda, b_stored, ldb, beta, c, _leading(c))

    @contextmanager
    def team(self) -> Iterator[_Team]:
        """Yield a team of as many threads as OpenBLAS uses, which itself is kept to one meanwhile.

        OpenBLAS threads wait for each other many times in a product: with another process on a core they
        took several times longer than threads of ours, and 3 to 12% less without. Other libraries keep theirs.
        """
        if self._read_threads is None or self._set_threads is None:
            yield _Team(self, None, 1)
            return
        with self._lock:
            if self._inside == 0:
                self._usual_threads = int(self._read_threads())
            self._inside += 1
            self._set_threads(1)
        try:
            with ThreadPoolExecutor(self._usual_threads) as pool:
                yield _Team(self, pool, self._usual_threads)
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._set_threads(self._usual_threads)


@dataclass(frozen=True, slots=True)
class _Team:
    """Threads that share the products of one matrix."""

    lapack: _Lapack
    pool: ThreadPoolExecutor | None
    count: int

    def share(self, work: Callable[[int, int], None], bounds: list[int]) -> None:
        """Run work(first, last) for every two neighbouring bounds, and wait for all."""
        run: Callable[..., Iterable[None]] = map if self.pool is None else self.pool.map
        list(run(work, bounds[:-1], bounds[1:]))

    def parts(self, m: int) -> int:
        """Return the number of parts worth making of m rows."""
        return max(1, min(self.count, m // 128))

    def add_gram(self, gram: Array, copy: Array) -> None:
        """Add copy @ copy.T (size, size) to the lower triangle, in place."""

        def work(first: int, last: int) -> None:
            a, op = _stored(copy[first:last])
            corner = gram[first:last, first:last]
            lda = _leading(a)
            self.lapack.call("dsyrk", "L", op, last - first, copy.shape[1], 1.0, a, lda, 1.0, corner, len(gram))
            if last < len(gram):
                self.lapack.multiply(copy[last:], copy[first:last].T, gram[last:, first:last], beta=1.0)

        self.share(work, _equal_areas(len(gram), self.parts(len(gram))))

    def subtract_both(self, s: Array, v: Array, w: Array) -> None:
        """Subtract V W' + W V' from the lower triangle of s (m, m), in place, for v and w (m, BAND)."""
        m, ld = len(s), _leading(s)

        def work(first: int, last: int) -> None:
            k = last - first
            corner = s[first:last, first:last]
            self.lapack.call("dsyr2k", "L", "N", k, BAND, -1.0, v[first:], m, w[first:], m, 1.0, corner, ld)
            if last < m:
                below = s[last:, first:last]
                self.lapack.multiply(v[last:], w[first:last].T, below, alpha=-1.0, beta=1.0)
                self.lapack.multiply(w[last:], v[first:last].T, below, alpha=-1.0, beta=1.0)

        self.share(work, _equal_areas(m, self.parts(m)))

    def symmetric_product(self, s: Array, v: Array) -> Array:
        """Return s @ v (m, BAND) for s (m, m), of which the lower triangle is read, and v (m, BAND)."""
        m, ld = len(s), _leading(s)
        product = np.empty((m, BAND), order="F")

        def work(first: int, last: int) -> None:
            own, corner = product[first:last], s[first:last, first:last]
            self.lapack.call("dsymm", "L", "L", last - first, BAND, 1.0, corner, ld, v[first:], m, 0.0, own, m)
            if first:
                self.lapack.multiply(s[first:last, :first], v[:first], own, beta=1.0)
            if last < m:
                self.lapack.multiply(s[last:, first:last].T, v[last:], own, beta=1.0)

        parts = self.parts(m)
        self.share(work, [m * i // parts for i in range(parts + 1)])
        return product


def _equal_areas(m: int, parts: int) -> list[int]:
    """Return the bounds of block columns of a lower triangle (m, m) that hold as many entries each."""
    return [int(m * (1.0 - math.sqrt(1.0 - i / parts))) for i in range(parts + 1)]


def _pointer(argument: str | int | float | Array) -> Any:
    if isinstance(argument, str):
        return ctypes.c_char_p(argument.encode())
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    return ctypes.byref(ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_double(argument))


def _stored(block: Array) -> tuple[Array, str]:
    return (block, "N") if block.strides[0] == block.itemsize else (block.T, "T")


def _leading(block: Array) -> int:
    """Return the distance of two columns, in entries."""
    return max(int(block.strides[1] // block.itemsize), len(block))


def _two_stage_values(gram: Array, team: _Team) -> Array | None:
    """Return the eigenvalues of a symmetric matrix, ascending, or None where LAPACK or the trace says no.

    Of gram, shape (m `BAND`, m `BAND`), columns contiguous, the lower triangle is read; it is overwritten.
    """
    from scipy.linalg.lapack import dsterf

    trace = float(np.trace(gram))
    try:
        diagonal, beside = _tridiagonal(_to_band(gram, team), team.lapack)
    except ArithmeticError:
        return None
    values, info = dsterf(diagonal, beside)
    drift = abs(float(values.sum()) - trace)
    return np.asarray(values) if info == 0 and drift <= TRACE_TOLERANCE * abs(trace) else None


def _to_band(gram: Array, team: _Team) -> Array:
    """Return lower band storage (BAND + 1, size) with the eigenvalues of gram, which is overwritten.

    Panel by panel, Q = I - V T V' annihilates what lies below the band, and Q' S Q = S - V W' - W V' with
    X = S V T and W = X - V T' (V' X) / 2 (Dongarra, Sorensen & Hammarling 1989,
    doi:10.1016/0377-0427(89)90367-1). The team shares the two products with all of S.
    """
    size = len(gram)
    band = np.zeros((BAND + 1, size), order="F")
    t = np.zeros((BAND, BAND), order="F")
    for start in range(0, size, BAND):
        columns = gram[start:, start : start + BAND]  # (size - start, BAND)
        m = size - start - BAND
        if m:
            panel = columns[BAND:]  # (m, BAND)
            team.lapack.call("dgeqrt3", m, BAND, panel, size, t, BAND)
            v = np.asfortranarray(np.tril(panel, -1))
            np.fill_diagonal(v, 1.0)
            s = gram[start + BAND :, start + BAND :]  # (m, m)
            team.subtract_both(s, v, _second_factor(s, v, np.triu(t), team))
        for i in range(BAND):
            below = columns[i : i + BAND + 1, i]
            band[: len(below), start + i] = below
    return band


def _second_factor(s: Array, v: Array, t: Array, team: _Team) -> Array:
    """Return W (m, BAND) of Q' S Q = S - V W' - W V' for s (m, m), v (m, BAND) and t (BAND, BAND)."""
    lapack = team.lapack
    product = team.symmetric_product(s, v)
    x, small = np.empty((len(s), BAND), order="F"), np.empty((BAND, BAND), order="F")
    lapack.multiply(product, np.asfortranarray(t), x)
    lapack.multiply(v.T, x, small)
    lapack.multiply(v, np.asfortranarray(t.T @ small), x, alpha=-0.5, beta=1.0)
    return x


def _tridiagonal(band: Array, lapack: _Lapack) -> tuple[Array, Array]:
    """Return the diagonal (size,) and subdiagonal (size - 1,) of a tridiagonal matrix with the band's values."""
    size = band.shape[1]
    diagonal, beside = np.zeros(size), np.zeros(size - 1)
    lengths = np.zeros(2)
    head = ("Y", "N", "L", size, BAND, band, BAND + 1, diagonal, beside)
    lapack.call("dsytrd_sb2st", *head, lengths[:1], -1, lengths[1:], -1)  # asks for the lengths
    reflectors, work = (np.zeros(int(length)) for length in lengths)
    lapack.call("dsytrd_sb2st", *head, reflectors, len(reflectors), work, len(work))
    return diagonal, beside


@lru_cache(maxsize=1)
def _lapack() -> _Lapack | None:
    """Return the routines of the first loaded library that has them all, or None."""
    if sys.byteorder != "little":
        return None
    for path in _libraries():
        try:
            library: Any = ctypes.CDLL(path)
        except OSError:
            continue
        # scipy's wheels, numpy's (8-byte integers), a system's or conda's
        for pattern in ("scipy_{}_", "scipy_{}_64_", "{}_", "{}_64_"):
            try:
                return _Lapack(library, pattern)
            except AttributeError:
                continue
    return None


def _libraries() -> Iterator[str]:
    """Yield paths of libraries that may hold LAPACK, scipy's own first."""
    import scipy.linalg  # loads them

    for name in (scipy.__file__, np.__file__):
        home = Path(name).parent
        for folder in (home.parent / f"{home.name}.libs", home / ".dylibs"):
            yield from sorted(str(path) for path in folder.glob("*openblas*"))
    maps = Path("/proc/self/maps")  # what this process has loaded already; on Linux alone
    if maps.exists():
        words = {line.split()[-1] for line in maps.read_text().splitlines()}
        yield from sorted(word for word in words if re.search(r"/lib[^/]*(lapack|openblas|mkl_rt)[^/]*$", word))
