"""The loss of a model as a law of its size and its training tokens, fitted to runs of small models.

L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, equation 2), with N parameters inside blocks and D tokens.
For given exponents the law is linear in E, A and B, so only the exponents are searched, on a grid (separable least
squares, Golub & Pereyra 1973): there are no starting values and no local minima.

Dimensions: R rungs (a size with a number of tokens), K seeds, S samples of a bootstrap, X pairs of exponents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dist_lm.errors import UserError

Array = NDArray[np.float64]

EXPONENTS = np.geomspace(0.05, 2.0, 48)
FREE = 5  # free numbers of the law: E, A, B, alpha, beta
SAMPLES = 1000  # samples of the bootstrap
LEVEL = 0.95  # probability of the prediction interval
SEED = 0


@dataclass(frozen=True)
class Expected:
    """A loss with its prediction interval of 95 %."""

    value: float
    low: float
    high: float
    without_law: float  # share of the samples of the bootstrap that determine no law, which the interval leaves out


@dataclass(frozen=True)
class ScalingLaw:
    """The law that fits rungs best; made by `fit`."""

    parameters_R: Array
    tokens_R: Array
    loss_RK: Array

    @classmethod
    def fit(
        cls, parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[Sequence[float]]
    ) -> "ScalingLaw":
        """Returns the law that fits rungs best: parameters, tokens, and the losses (any unit) of the seeds of each
        rung, as many for each.

        Raises:
            UserError: there are too few rungs, or their loss does not fall with size and tokens.
        """
        # A law of five numbers needs more rungs than that, and a trend along each axis.
        sizes, lengths = len({*parameters}), len({*tokens})
        if len(losses) <= FREE or min(sizes, lengths) < 3:
            raise UserError(
                f"{len(losses)} rungs of {sizes} sizes with {lengths} numbers of tokens do not determine a law of "
                f"{FREE} numbers: expected at least 3 sizes and 3 numbers of tokens"
            )

        law = cls(*(np.array(values, np.float64) for values in (parameters, tokens, losses)))
        if np.isnan(law._best).any():
            raise UserError(
                "the loss does not fall with size and tokens: expected runs that are further apart, or seeds"
            )
        return law

    def loss(self, parameters: float, tokens: float) -> float:
        """Returns the loss that the law gives for a size and a number of tokens."""
        return float(self._losses(self._best[None], parameters, tokens)[0])

    def expected(self, parameters: float, tokens: float) -> Expected:
        """Returns the loss of one more run of this size and number of tokens, with its interval, the same at every
        call.

        The interval has percentiles of the residual bootstrap (Efron 1979): laws of resampled rungs, the misfit of a
        rung, and the noise of a run. Seeds of a rung share its misfit, so more of them do not stand for more rungs.
        It held 92 to 98 % of new runs of made laws with misfit and noise (12 and 16 rungs, two seeds; six: 90 to 95 %).
        """
        fitted_R = np.array([self.loss(*rung) for rung in zip(self.parameters_R, self.tokens_R, strict=True)])

        # Residuals are smaller than the errors they stand for, by the degrees of freedom that the fit used up.
        rungs, seeds = self.loss_RK.shape
        misfit_R = (self._mean - fitted_R) * np.sqrt(rungs / (rungs - FREE))
        noise_RK = (self.loss_RK - self._mean[:, None]) * np.sqrt(seeds / max(1, seeds - 1))

        rng = np.random.default_rng(SEED)
        laws = self._laws(fitted_R + misfit_R[rng.integers(rungs, size=(SAMPLES, rungs))])
        loss_S = self._losses(laws, parameters, tokens)
        # One more run has the misfit of a rung and the noise of a seed.
        loss_S += rng.choice(misfit_R, SAMPLES) + rng.choice(noise_RK.ravel(), SAMPLES)
        low, high = np.nanquantile(loss_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Expected(self.loss(parameters, tokens), float(low), float(high), float(np.isnan(loss_S).mean()))

    @cached_property
    def _best(self) -> Array:
        return self._laws(self._mean[None])[0]

    @property
    def _mean(self) -> Array:
        return self.loss_RK.mean(axis=1)

    @cached_property
    def _unit(self) -> tuple[float, float]:
        """Geometric means of N and D. Both are divided by them, so that the terms of the law have like sizes."""
        return float(np.exp(np.log(self.parameters_R).mean())), float(np.exp(np.log(self.tokens_R).mean()))

    def _losses(self, laws: Array, parameters: float, tokens: float) -> Array:
        irreducible_S, of_size_S, of_tokens_S, alpha_S, beta_S = laws.T
        size, length = self._unit
        return irreducible_S + of_size_S * (parameters / size) ** -alpha_S + of_tokens_S * (tokens / length) ** -beta_S

    def _laws(self, loss_SR: Array) -> Array:
        """Returns the law (E, A, B, alpha, beta), of exponents in EXPONENTS, that fits each row of losses best, (S, 5);
        E may be 0. NaN where no law has terms of at least 0."""
        size, length = self._unit
        alpha_X, beta_X = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
        of_size_XR = (self.parameters_R / size) ** -alpha_X[:, None]
        of_tokens_XR = (self.tokens_R / length) ** -beta_X[:, None]
        columns_XR3 = np.stack([np.ones_like(of_size_XR), of_size_XR, of_tokens_XR], axis=-1)

        total_S = np.square(loss_SR).sum(axis=1)
        laws = np.full((len(loss_SR), FREE), np.nan)
        least_S = np.full(len(loss_SR), np.inf)
        # 1 leaves out E: nothing is irreducible.
        for first in (0, 1):
            # Least squares for all pairs of exponents at once; a law with a negative term is no law.
            used = columns_XR3[:, :, first:]
            terms_XCS = np.linalg.pinv(used) @ loss_SR.T
            explained_XS = (terms_XCS * (used.transpose(0, 2, 1) @ loss_SR.T)).sum(axis=1)
            error_XS = np.where((terms_XCS >= 0).all(axis=1), total_S - explained_XS, np.inf)

            best_S, samples = error_XS.argmin(axis=0), np.arange(len(loss_SR))
            better_S = error_XS[best_S, samples] < least_S
            least_S = np.where(better_S, error_XS[best_S, samples], least_S)

            terms_S3 = np.zeros((len(loss_SR), 3))
            terms_S3[:, first:] = terms_XCS[best_S, :, samples]
            candidates = np.column_stack([terms_S3, alpha_X[best_S], beta_X[best_S]])
            laws[better_S] = candidates[better_S]
        return laws
