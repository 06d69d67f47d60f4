"""Singular values of deltas, by the cheapest route that keeps the contract's accuracy.

In: one matrix, or the two factors of one. Out: singular values, largest first, and the energy measured on
the matrix itself. numpy alone at import; scipy and torch only in the functions that need them.

The contract: values accurate to 1e-4 relative above 1e-3 of the largest, energy to 1e-6.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.bands import gram_or_band_values
from rankwise.errors import DeviceError, MissingDependencyError
from rankwise.grids import row_blocks, widened

Array = NDArray[Any]

BLOCK_ENTRIES: Final = 1 << 21
"""Entries of a matrix that are turned to float64 at a time: 16 MiB."""

OVERSAMPLING: Final = 32
MAX_PASSES: Final = 6
VALUE_TOLERANCE: Final = 2e-5
"""Largest relative error allowed to a value of the randomised route, a fifth of the contract's."""


@dataclass(frozen=True, slots=True)
class Values:
    """Singular values of one matrix.

    Attributes:
        sigma: largest first, float64.
        energy: squared Frobenius norm, summed in float64 on the matrix itself.
        complete: whether every value that is not listed is zero.
    """

    sigma: Array
    energy: float
    complete: bool


def one_thread() -> Any:
    """Return a context in which BLAS uses one thread: for many small products, threads only wait for each other.

    A QR of 2048 x 8 takes 0.2 ms on one thread and 9 ms on two whose cores are shared with another program.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


def energy_of(matrix: Array) -> float:
    """Return the squared Frobenius norm, summed in float64 (a float32 sum may be 1e-3 off).

    Args:
        matrix: shape (rows, columns), any float dtype.
    """
    total = 0.0
    for rows in row_blocks(matrix.shape, BLOCK_ENTRIES):
        block = widened(matrix[rows], np.float64).ravel()
        total += float(block @ block)
    return total


def factored_values(a: Array, b: Array, scaling: float) -> Values:
    """Return the singular values of scaling * B @ A without forming it.

    B = Q_B R_B and A' = Q_A R_A, so B A has the singular values of the r x r core R_B R_A'. Cost
    O((in + out) r^2 + r^3); everything in float64.

    Args:
        a: shape (r, in_features).
        b: shape (out_features, r).
        scaling: the factor on B @ A; dimensionless.

    Returns:
        min(r, in_features, out_features) values; complete. No values and an infinite energy where float64
        factors overflow.
    """
    core_b = _triangle(b)  # (min(out, r), r)
    core_a = _triangle(a.T)  # (min(in, r), r)
    with np.errstate(over="ignore", invalid="ignore"):
        core = abs(scaling) * (core_b @ core_a.T)
        energy = float(np.vdot(core, core))
    if not np.isfinite(energy):  # only float64 factors can overflow
        return Values(np.zeros(0), energy, complete=False)
    return Values(np.linalg.svd(core, compute_uv=False), energy, complete=True)


def _triangle(tall: Array) -> Array:
    """Return R of the QR decomposition in float64."""
    triangle: Array = np.linalg.qr(tall.astype(np.float64), mode="r")  # type: ignore[assignment]
    return triangle


def matrix_values(matrix: Array, *, device: str = "cpu") -> Values:
    """Return all singular values of a dense matrix: float64 Gram matrix, symmetric eigenvalues.

    The Gram matrix squares the condition number, so it is formed in float64: the error of a value is
    about 1e-15 sigma_1^2 / sigma, 1e-9 relative at 1e-3 of the largest (float32 would leave nothing
    below 1e-3). `rankwise.bands` holds the route on the CPU.

    Args:
        matrix: shape (rows, columns), float32 or float64, finite, not empty.
        device: "cpu" or a torch device with float64, such as "cuda:0".

    Returns:
        min(shape) values; complete.

    Raises:
        DeviceError: the device is not there.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T  # (rows, n), n <= rows
    if device == "cpu":
        sigma = gram_or_band_values(tall)
    else:
        squares = _gram_eigenvalues_torch(tall, device)
        sigma = np.ascontiguousarray(np.sqrt(np.maximum(squares, 0.0))[::-1])
    return Values(sigma, energy_of(matrix), complete=True)


GPU_NODES: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, ROCm, WSL


def default_device() -> str:
    """Return "cuda" where torch is installed and sees a GPU, else "cpu"; without a GPU torch is not imported."""
    if importlib.util.find_spec("torch") is None or not any(Path(node).exists() for node in GPU_NODES):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(device: str) -> str:
    """Return the device asked for, once it is known to be there; see `torch_device` for the errors."""
    if device != "cpu":
        torch_device(device)
    return device


def torch_device(device: str) -> Any:
    """Return (torch, device) for a device other than the CPU.

    Raises:
        DeviceError: torch sees no such device.
        MissingDependencyError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", "train", f"device {device!r}") from error
    try:
        found = torch.device(device)
        available = found.type == "cpu" or (
            found.type == "cuda" and torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()
        )
    except RuntimeError:
        available = False
    if not available:
        raise DeviceError(f"device {device!r} is not there; the devices are cpu, cuda and cuda:N as torch sees them")
    return torch, found


def _gram_eigenvalues_torch(tall: Array, device: str) -> Array:
    torch, found = torch_device(device)
    on_device = torch.from_numpy(np.ascontiguousarray(tall)).to(found)
    gram = torch.zeros((tall.shape[1], tall.shape[1]), dtype=torch.float64, device=found)
    step = max(64, 8 * BLOCK_ENTRIES // tall.shape[1])
    for start in range(0, tall.shape[0], step):
        block = on_device[start : start + step].double()
        gram.addmm_(block.T, block)
    squares: Array = torch.linalg.eigvalsh(gram).cpu().numpy()
    return squares


def leading_values(matrix: Array, count: int, *, seed: int = 0, device: str = "cpu") -> Values:
    """Return the `count` largest singular values, by a randomised subspace where that is cheaper.

    Subspace iteration with QR in every pass (Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm
    4.4) on count + 32 directions. It stops when each wanted value's residual bound, norm(A v - sigma u)
    squared over the distance to the next values or the norm itself, is below 2e-5 of the value (Parlett,
    The Symmetric Eigenvalue Problem, section 11.7), and gives the exact route of `matrix_values` cut to
    `count` where six passes will not bring it there, as on a flat spectrum. The energy of the rest is then
    known exactly all the same: `energy` less the squares of the values, norm(A)^2 - norm(QB)^2.

    Args:
        matrix: shape (rows, columns), float32 or float64, finite, not empty.
        count: number of values wanted, >= 1.
        seed: of the random start.
        device: as `matrix_values`; devices other than the CPU take the exact route.

    Returns:
        min(count, *shape) values; `complete` where these are all.
    """
    smaller = min(matrix.shape)
    count = min(count, smaller)
    width = count + OVERSAMPLING
    if device == "cpu" and width <= smaller // 4:
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        sigma = _subspace_values(tall, count, width, np.random.default_rng(seed))
        if sigma is not None:
            return Values(sigma, energy_of(matrix), complete=False)
    whole = matrix_values(matrix, device=device)
    return Values(whole.sigma[:count].copy(), whole.energy, complete=count == smaller)


def _subspace_values(tall: Array, count: int, width: int, rng: np.random.Generator) -> Array | None:
    """Return `count` converged values of a (rows, n) matrix, or None where `MAX_PASSES` passes will not do."""
    right = np.linalg.qr(rng.standard_normal((tall.shape[1], width), dtype=tall.dtype))[0]  # (n, width)
    before = float("inf")
    for done in range(1, MAX_PASSES + 1):
        left = np.linalg.qr(tall @ right)[0]  # (rows, width)
        projected = tall.T @ left  # (n, width): B', whose values are at most those of A
        if done >= 3:
            sigma, error = _ritz(tall, projected, left, count)
            if error <= VALUE_TOLERANCE:
                return sigma
            if error * (error / before) ** (MAX_PASSES - done) > VALUE_TOLERANCE and done >= 4:
                return None  # at this pace the last pass would not be there
            before = error
        right = np.linalg.qr(projected)[0]
    return None


def _ritz(tall: Array, projected: Array, left: Array, count: int) -> tuple[Array, float]:
    """Return the first `count` Ritz values and the largest relative bound on their errors."""
    v, sigma, turn = np.linalg.svd(projected.astype(np.float64), full_matrices=False)
    # A' u_i = sigma_i v_i holds exactly in the subspace; the other side's residual bounds the error
    wanted = turn[:count].T.astype(tall.dtype)  # (width, count)
    residual = tall @ v[:, :count].astype(tall.dtype) - (left @ wanted) * sigma[:count].astype(tall.dtype)
    norms = np.sqrt(np.einsum("ij,ij->j", residual, residual, dtype=np.float64))  # (count,)
    next_value = sigma[count:].max(initial=0.0)
    # Parlett's gap bound for the part outside the subspace, never worse than the plain residual
    gap = np.maximum(sigma[:count] - next_value, 1e-300)
    error = np.minimum(norms, norms**2 / gap)
    matters = sigma[:count] > 1e-3 * sigma[0]
    worst = float(np.max(error[matters] / sigma[:count][matters], initial=0.0))
    return np.ascontiguousarray(sigma[:count]), worst
