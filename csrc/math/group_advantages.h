// The standard deviation of the other members of a group, for host and device. In double: it is
// what is left of the sum of squares of the group without the member, which may be almost all.
#pragma once

#include <cmath>

#include "arguments/group_advantages.h"
#include "math/exp.h"

namespace warpo {

// Of a group whose rewards are not all equal.
struct GroupMoments {
    double count, mean, squares;       // squares: sum of squared differences from the mean
    float smallest, largest;           // rewards
    double num_smallest, num_largest;  // members that have them
};

// sqrt((squares - n / (n - 1) c^2) / (n - 2)) with c = reward - mean; 0 where fewer than two others
// are left or all of them are equal, which is told exactly: a residue of the difference would do as
// a divisor.
WARPO_HD double std_of_others(const GroupMoments& m, float reward) {
    const bool alone = (reward == m.smallest && m.num_smallest == 1) ||
                       (reward == m.largest && m.num_largest == 1);
    if (m.count < 3 || (alone && m.num_smallest + m.num_largest == m.count)) return 0;
    const double c = reward - m.mean;
    const double rest = m.squares - m.count / (m.count - 1) * c * c;
    return rest <= 0 ? 0 : std::sqrt(rest / (m.count - 2));
}

// The advantage of a member and, times the gradient with respect to it, what the gradients with
// respect to all rewards are made of: with the std s_i of the others, A_i = f c_i / (s_i + eps),
//     q_i = g_i f / (s_i + eps),   p_i = g_i A_i / ((s_i + eps) s_i (n - 2)),
//     dr_j = q_j - sum q / n - c_j sum p + n / (n - 1) (p_j c_j - sum p c / n)
// Where s_i is 0 the advantage is not divided.
struct OthersTerms {
    double advantage, q, p;
};

WARPO_HD OthersTerms others_terms(const GroupAdvantages& a, const GroupMoments& m, float reward,
                                  float grad) {
    const double std = std_of_others(m, reward);
    const double factor = a.leave_one_out ? m.count / (m.count - 1) : 1.0;
    const double scale = std == 0 ? factor : factor / (std + (double)a.eps);
    const double advantage = scale * (reward - m.mean);
    const double p = grad * advantage / ((std + (double)a.eps) * std * (m.count - 2));
    return {advantage, grad * scale, std == 0 ? 0.0 : p};
}

struct OthersSums {
    double q, p, pc;
};

WARPO_HD double others_gradient(const GroupMoments& m, const OthersSums& sums,
                                const OthersTerms& own, float reward) {
    const double c = reward - m.mean;
    const double through_mean = own.q - sums.q / m.count - c * sums.p;
    return through_mean + m.count / (m.count - 1) * (own.p * c - sums.pc / m.count);
}

}  // namespace warpo
