// Count, mean and sum of squared deviations of a part of the data, and of two parts together.
// Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", eq. 1.5 and 2.1.
#pragma once

#include <cmath>

#include "math/exp.h"

namespace warpo {

template <class Real>
struct Moments {
    Real count, mean, squares;
};

template <class Real>
WARPO_HD Moments<Real> merge(const Moments<Real>& a, const Moments<Real>& b) {
    const Real count = a.count + b.count;
    if (count == 0) return {0, 0, 0};
    const Real difference = b.mean - a.mean, share = b.count / count;
    return {count, a.mean + difference * share,
            a.squares + b.squares + difference * difference * (a.count * share)};
}

// Of values whose sum of differences from a pivot near their mean, and of the squares of those,
// are given. Equal values have exactly their value as mean.
template <class Real>
WARPO_HD Moments<Real> moments_about(Real pivot, Real count, Real sum, Real squares) {
    if (count == 0) return {0, 0, 0};
    const Real shift = sum / count, centred = squares - sum * shift;
    return {count, pivot + shift, centred < 0 ? 0 : centred};
}

// 1 / sqrt(variance + eps) with the unbiased variance, which is 0 for one value; 0 where nothing
// is under the root.
template <class Real>
WARPO_HD Real inverse_std(const Moments<Real>& m, Real eps) {
    const Real variance = m.count > 1 ? m.squares / (m.count - 1) : 0;
    return variance + eps == 0 ? 0 : 1 / std::sqrt(variance + eps);
}

}  // namespace warpo
