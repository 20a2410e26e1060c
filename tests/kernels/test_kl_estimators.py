"""Bias and standard deviation of k1, k2 and k3 in http://joschu.net/blog/kl-approx.html."""

import numpy as np
import pytest
import torch

from warpo.kernels.reference import kl_estimate

# policy N(0, 1), reference N(mean, 1): bias and standard deviation in units of the KL, mean^2 / 2
TABLE = {
    0.1: {"k1": (0.0, 20.0), "k2": (0.002, 1.42), "k3": (0.0, 1.42)},
    1.0: {"k1": (0.0, 2.0), "k2": (0.25, 1.73), "k3": (0.0, 1.7)},
}


@pytest.mark.parametrize("mean", list(TABLE))
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_bias_and_standard_deviation(mean, estimator):
    # Gauss-Hermite quadrature instead of samples: expectations to 12 digits
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    x, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    policy, reference = -(x**2) / 2, -((x - mean) ** 2) / 2
    values = kl_estimate(policy, reference, estimator, limit=40.0)
    kl = mean**2 / 2
    expectation = (weights * values).sum()
    deviation = (weights * (values - expectation) ** 2).sum().sqrt()
    bias, std = TABLE[mean][estimator]
    assert float((expectation - kl) / kl) == pytest.approx(bias, abs=6e-4)
    assert float(deviation / kl) == pytest.approx(std, rel=6e-3)
