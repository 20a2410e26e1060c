// Group-relative advantages: (r - mean) f / (std + eps) within each group, f = n / (n - 1) with
// leave-one-out, else 1; std of the group, or for each member that of the others; the mean may be
// weighted with lengths.
#include "math/group_advantages.h"

#include <math.h>

#include <vector>

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Group {
    const int64_t* order;  // nullptr: the members are first, first + 1, ...
    int64_t first, count;

    int64_t member(int64_t i) const { return order ? order[first + i] : first + i; }
};

Group group_of(const GroupAdvantages& a, int64_t group) {
    if (!a.order) return {nullptr, group * a.group_size, a.group_size};
    return {a.order, a.offsets[group], a.offsets[group + 1] - a.offsets[group]};
}

struct Stats {
    double mean = 0, std = 0;
    double squares = 0;  // sum of squared differences from the mean
    double degrees = 1;  // the variance is squares over this
    double baseline = 0;      // what the rewards are compared with
    double total_length = 1;  // of all members, with lengths
    bool all_equal = true;
};

// The rewards of a group in a row: where they lie, or gathered.
class Rewards {
public:
    const float* load(const GroupAdvantages& a, const Group& group) {
        if (!group.order && a.rewards.dtype == kFloat32 && a.rewards.stride1 == 1)
            return address<float>(a.rewards, 0, group.first);
        gathered_.resize(group.count);
        for (int64_t i = 0; i < group.count; ++i)
            gathered_[i] = load_one(a.rewards, 0, group.member(i));
        return gathered_.data();
    }

private:
    std::vector<float> gathered_;
};

double length_of(const GroupAdvantages& a, const Group& group, int64_t i) {
    return load_one(a.lengths, 0, group.member(i));
}

void add_lengths(const GroupAdvantages& a, const Group& group, const float* rewards,
                 Stats& stats) {
    double total = 0, weighted = 0;
    for (int64_t i = 0; i < group.count; ++i) {
        const double length = length_of(a, group, i);
        total += length;
        weighted += length * (rewards[i] - stats.mean);
    }
    stats.total_length = total;
    stats.baseline = stats.mean + weighted / total;
}

// Two passes: E[x^2] - E[x]^2 would lose all digits where the mean is large beside the spread.
Stats stats_of(const GroupAdvantages& a, const Group& group, const float* rewards) {
    Stats stats;
    if (group.count == 0) return stats;
    const float first = rewards[0];
    double sum = 0, squares = 0;
    int64_t different = 0;
#pragma omp simd reduction(+ : sum, different)
    for (int64_t i = 0; i < group.count; ++i) {
        sum += rewards[i];
        different += !(rewards[i] == first);  // NaN is
    }
    stats.all_equal = different == 0;
    const double mean = stats.all_equal ? first : sum / (double)group.count;
    stats.mean = stats.baseline = mean;
    if (a.lengths.data) add_lengths(a, group, rewards, stats);
    if (stats.all_equal || a.std_mode == kNoStd) return stats;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < group.count; ++i) {
        const double centred = rewards[i] - mean;
        squares += centred * centred;
    }
    stats.squares = squares;
    stats.degrees = (double)(a.std_mode == kPopulationStd ? group.count : group.count - 1);
    stats.std = sqrt(squares / stats.degrees);
    return stats;
}

// What (r - mean) is multiplied with; not for all-equal groups.
double factor_of(const GroupAdvantages& a, const Group& group, const Stats& stats) {
    const double factor = a.leave_one_out ? (double)group.count / (double)(group.count - 1) : 1.0;
    return a.std_mode == kNoStd ? factor : factor / (stats.std + a.eps);
}

GroupMoments moments_of(const Group& group, const float* rewards, const Stats& stats) {
    float smallest = rewards[0], largest = rewards[0];
    for (int64_t i = 1; i < group.count; ++i) {
        smallest = rewards[i] < smallest ? rewards[i] : smallest;
        largest = rewards[i] > largest ? rewards[i] : largest;
    }
    int64_t num_smallest = 0, num_largest = 0;
    for (int64_t i = 0; i < group.count; ++i) {
        num_smallest += rewards[i] == smallest;
        num_largest += rewards[i] == largest;
    }
    return {(double)group.count, stats.mean,          stats.squares,      smallest,
            largest,             (double)num_smallest, (double)num_largest};
}

void forward_others(const GroupAdvantages& a, const Group& group, const float* rewards,
                    const Stats& stats) {
    const GroupMoments moments = moments_of(group, rewards, stats);
    for (int64_t i = 0; i < group.count; ++i)
        a.advantages[group.member(i)] =
            (float)others_terms(a, moments, rewards[i], 0.0f).advantage;
}

void backward_others(const GroupAdvantages& a, const GroupAdvantagesBackward& g, const Group& group,
                     const float* rewards, const Stats& stats) {
    const GroupMoments moments = moments_of(group, rewards, stats);
    const auto terms = [&](int64_t i) {
        const float grad = load_one(g.grad_advantages, 0, group.member(i));
        return others_terms(a, moments, rewards[i], grad);
    };
    OthersSums sums = {0, 0, 0};
    for (int64_t i = 0; i < group.count; ++i) {
        const OthersTerms own = terms(i);
        sums.q += own.q;
        sums.p += own.p;
        sums.pc += own.p * (rewards[i] - stats.mean);
    }
    for (int64_t i = 0; i < group.count; ++i)
        g.grad_rewards[group.member(i)] =
            (float)others_gradient(moments, sums, terms(i), rewards[i]);
}

bool forward_group(const GroupAdvantages& a, int64_t index, Rewards& storage) {
    const Group group = group_of(a, index);
    const float* const rewards = storage.load(a, group);
    const Stats stats = stats_of(a, group, rewards);
    a.mean[index] = (float)stats.mean;
    a.std[index] = (float)stats.std;
    if (a.std_mode == kLeaveOneOutStd && !stats.all_equal) {
        forward_others(a, group, rewards, stats);
        return false;
    }
    const double factor = stats.all_equal ? 0.0 : factor_of(a, group, stats);
    const double baseline = stats.baseline;
    const bool all_equal = stats.all_equal;
    if (!group.order) {
        float* const out = a.advantages + group.first;
#pragma omp simd
        for (int64_t i = 0; i < group.count; ++i)
            out[i] = all_equal ? 0.0f : (float)((rewards[i] - baseline) * factor);
    } else {
        for (int64_t i = 0; i < group.count; ++i)
            a.advantages[group.member(i)] =
                all_equal ? 0.0f : (float)((rewards[i] - baseline) * factor);
    }
    return all_equal && group.count > 0;
}

// With c = r - mean, a = (r - baseline) f / (std + eps) and the shares w_i of the rewards in the
// baseline, 1 / n without lengths:
//   dr_i = f / (std + eps) (g_i - w_i sum(g)) - sum(g (r - baseline)) f / (std + eps)^2 c_i /
//          (degrees std)
void backward_group(const GroupAdvantages& a, const GroupAdvantagesBackward& g, int64_t index,
                    Rewards& storage) {
    const Group group = group_of(a, index);
    const float* const rewards = storage.load(a, group);
    const Stats stats = stats_of(a, group, rewards);
    if (a.std_mode == kLeaveOneOutStd && !stats.all_equal)
        return backward_others(a, g, group, rewards, stats);
    double sum_grad = 0, grad_dot_centred = 0;
    for (int64_t i = 0; i < group.count; ++i) {
        const int64_t member = group.member(i);
        const double grad = load_one(g.grad_advantages, 0, member);
        sum_grad += grad;
        grad_dot_centred += grad * (rewards[i] - stats.baseline);
    }
    const double factor = stats.all_equal ? 0.0 : factor_of(a, group, stats);
    const double through_std =
        a.std_mode == kNoStd
            ? 0.0
            : grad_dot_centred * factor / ((stats.std + a.eps) * stats.degrees * stats.std);
    for (int64_t i = 0; i < group.count; ++i) {
        const int64_t member = group.member(i);
        const double share = a.lengths.data ? length_of(a, group, i) / stats.total_length
                                            : 1.0 / (double)group.count;
        const double grad = load_one(g.grad_advantages, 0, member) - share * sum_grad;
        const double centred = rewards[i] - stats.mean;
        g.grad_rewards[member] =
            stats.all_equal ? 0.0f : (float)(grad * factor - through_std * centred);
    }
}

int64_t work_of(const GroupAdvantages& a) {
    return a.offsets ? a.offsets[a.groups] : a.groups * a.group_size;
}

}  // namespace

void group_advantages_forward(const GroupAdvantages& a) {
    int32_t degenerate = 0;
#pragma omp parallel if (work_of(a) >= kParallelWork)
    {
        Rewards storage;
#pragma omp for reduction(+ : degenerate)
        for (int64_t group = 0; group < a.groups; ++group)
            degenerate += forward_group(a, group, storage);
    }
    *a.degenerate += degenerate;
}

void group_advantages_backward(const GroupAdvantagesBackward& g) {
    const GroupAdvantages& a = g.forward;
#pragma omp parallel if (work_of(a) >= kParallelWork)
    {
        Rewards storage;
#pragma omp for
        for (int64_t group = 0; group < a.groups; ++group) backward_group(a, g, group, storage);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
