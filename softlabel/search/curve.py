"""Student mAP over the values that were tried: a Gaussian process that knows how much students vary with their seed.

Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), equations 2.22-2.30, with a Matern kernel
(nu = 5/2) and the constant mean integrated out (2.41). Length scale, height (amplitude) and noise are not fitted: each
combination on a small grid is a model, weighted by its marginal likelihood, and so is the model that mAP depends on
nothing that was varied (prior odds 1:1). All that is said about the curve is averaged over these models.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

# In units of the unit cube, of mAP and of mAP. Geometric grids, whose values are equally likely.
_LENGTHS = np.geomspace(0.1, 1.6, 7)
_HEIGHTS = np.geomspace(0.005, 0.32, 7)
_NOISES = np.geomspace(0.002, 0.128, 13)
_MEAN_SD = 1.0  # prior of the constant mean, around the data's: as good as unknown
_NEGLIGIBLE = 1e-3  # models together below this weight are left out


@dataclass(frozen=True)
class _Model:
    """One combination; a length of 0 means that mAP depends on nothing that was varied."""

    length: float
    height: float
    noise: float
    weight: float


class Curve:
    """What is known about mAP after some students.

    Args:
        x: (N, D) in the unit cube, the values they were trained with.
        y: (N,) mAP50 of each, 0..1.
        extra_covariance: (N, N) of those ``y`` that are estimates themselves, 0 where they were measured.
    """

    def __init__(self, x: Matrix, y: Vector, extra_covariance: Matrix | None = None) -> None:
        self._x, self._offset = np.asarray(x, np.float64), float(np.mean(y))
        self._y = np.asarray(y, np.float64) - self._offset
        self._extra = np.zeros((len(self._y),) * 2) if extra_covariance is None else np.asarray(extra_covariance)
        self._models = self._weighted(_squared_distances(self._x, self._x))

    @property
    def flat_probability(self) -> float:
        """The probability that mAP depends on nothing that was varied."""
        return sum(model.weight for model in self._models if not model.length)

    @property
    def noise(self) -> float:
        """Standard deviation of mAP between students that differ in nothing but the seed."""
        return float(np.sqrt(sum(model.weight * model.noise**2 for model in self._models)))

    def mean_and_sd(self, x: Matrix) -> tuple[Vector, Vector]:
        """(M,) each: the curve itself, without the noise of a student."""
        means, variances, weights = [], [], []
        for model in self._models:
            mean, covariance = self._posterior(model, x)
            means.append(mean)
            variances.append(np.diag(covariance))
            weights.append(model.weight)
        mean = np.average(means, axis=0, weights=weights)
        spread = np.average((np.array(means) - mean) ** 2, axis=0, weights=weights)
        return mean + self._offset, np.sqrt(np.average(variances, axis=0, weights=weights) + spread)

    def sample(self, x: Matrix, count: int, rng: np.random.Generator) -> Matrix:
        """(count, M): curves drawn from the posterior."""
        shares = rng.multinomial(count, [model.weight for model in self._models])
        drawn = []
        for model, share in zip(self._models, shares, strict=True):
            if share and not model.length:
                mean, covariance = self._posterior(model, x[:1])
                drawn.append(np.repeat(rng.normal(mean, np.sqrt(covariance[0]), (share, 1)), len(x), axis=1))
            elif share:
                mean, covariance = self._posterior(model, x)
                drawn.append(rng.multivariate_normal(mean, covariance, share, method="eigh"))
        return np.concatenate(drawn) + self._offset

    def _weighted(self, distances: Matrix) -> list[_Model]:
        level = [(0.0, 0.0, noise) for noise in _NOISES]
        combinations = np.array([*level, *itertools.product(_LENGTHS, _HEIGHTS, _NOISES)])
        kernels = {length: _matern(distances, length) for length in (0.0, *_LENGTHS)}
        logs = np.array([self._log_likelihood(kernels[length], h, noise) for length, h, noise in combinations])
        num_curves = len(_LENGTHS) * len(_HEIGHTS)
        logs -= [np.log(num_curves) if length else 0.0 for length, *_ in combinations]
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        order = np.argsort(-weights)
        kept = order[: 1 + int(np.searchsorted(np.cumsum(weights[order]), 1 - _NEGLIGIBLE))]
        total = weights[kept].sum()
        chosen = zip(combinations[kept].tolist(), (weights[kept] / total).tolist(), strict=True)
        return [_Model(length, height, noise, weight) for (length, height, noise), weight in chosen]

    def _covariance(self, kernel: Matrix, height: float, noise: float) -> Matrix:
        return height**2 * kernel + _MEAN_SD**2 + noise**2 * np.eye(len(kernel)) + self._extra

    def _log_likelihood(self, kernel: Matrix, height: float, noise: float) -> float:
        lower = np.linalg.cholesky(self._covariance(kernel, height, noise))
        whitened = np.linalg.solve(lower, self._y)
        return float(-0.5 * whitened @ whitened - np.log(np.diag(lower)).sum())

    def _posterior(self, model: _Model, x: Matrix) -> tuple[Vector, Matrix]:
        seen = _matern(_squared_distances(self._x, self._x), model.length)
        across = model.height**2 * _matern(_squared_distances(x, self._x), model.length) + _MEAN_SD**2
        prior = model.height**2 * _matern(_squared_distances(x, x), model.length) + _MEAN_SD**2
        solved = np.linalg.solve(
            self._covariance(seen, model.height, model.noise), np.column_stack([self._y, across.T])
        )
        return across @ solved[:, 0], prior - across @ solved[:, 1:]


def _squared_distances(a: Matrix, b: Matrix) -> Matrix:
    return ((a[:, None] - b[None]) ** 2).sum(axis=2)


def _matern(squared: Matrix, length: float) -> Matrix:
    """Matern, nu = 5/2 (4.17); all zero for length 0."""
    if not length:
        return np.zeros_like(squared)
    scaled = np.sqrt(5 * squared) / length
    return (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
