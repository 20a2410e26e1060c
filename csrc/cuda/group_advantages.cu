// Rewards minus the mean of their group, over its standard deviation: one warp a group, and the
// gradient.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/group_advantages.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
// 64 registers a thread, without which leave-one-out spills on sm_100.
constexpr int kBlocksPerSm = 8;

struct Group {
    int64_t index, first, size;
};

__device__ __forceinline__ Group own_group(const GroupAdvantages& a) {
    Group g;
    g.index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    g.first = g.index * a.group_size;
    g.size = a.group_size;
    if (a.offsets && g.index < a.groups) {
        g.first = a.offsets[g.index];
        g.size = a.offsets[g.index + 1] - g.first;
    }
    return g;
}

__device__ __forceinline__ int64_t member(const GroupAdvantages& a, const Group& g, int64_t i) {
    return a.order ? a.order[g.first + i] : g.first + i;
}

__device__ __forceinline__ float load_reward(const GroupAdvantages& a, const Group& g, int64_t i) {
    return load_float(a.rewards, 0, member(a, g, i));
}

__device__ __forceinline__ int own_lane() { return static_cast<int>(threadIdx.x % 32); }

struct Centre {
    float mean;
    float baseline;      // what the rewards are compared with
    float total_length;  // of all members, with lengths
    bool all_equal;
};

__device__ __forceinline__ float load_length(const GroupAdvantages& a, const Group& g, int64_t i) {
    return load_float(a.lengths, 0, member(a, g, i));
}

// Sums differences from the first reward, so that a common offset of the rewards costs the mean no
// digits.
__device__ __forceinline__ Centre find_centre(const GroupAdvantages& a, const Group& g) {
    const float first = load_reward(a, g, 0);
    float sum = 0.0f, weighted = 0.0f, total = 0.0f;
    bool differs = false;
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const float reward = load_reward(a, g, i);
        sum += reward - first;
        differs = differs || !(reward == first);
        if (a.lengths.data) {
            const float length = load_length(a, g, i);
            total += length;
            weighted = fmaf(length, reward - first, weighted);
        }
    }
    const bool all_equal = !__any_sync(kAllLanes, differs);
    sum = warp_sum(sum);
    const float mean = all_equal ? first : first + sum / static_cast<float>(g.size);
    if (!a.lengths.data) return {mean, mean, 1.0f, all_equal};
    total = warp_sum(total);
    return {mean, first + warp_sum(weighted) / total, total, all_equal};
}

__device__ __forceinline__ float degrees_of_freedom(const GroupAdvantages& a, const Group& g) {
    return static_cast<float>(a.std_mode == kPopulationStd ? g.size : g.size - 1);
}

// Of rewards that are not all equal; 0 with kNoStd.
__device__ __forceinline__ float find_std(const GroupAdvantages& a, const Group& g, float mean) {
    if (a.std_mode == kNoStd) return 0.0f;
    float squares = 0.0f;
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const float centred = load_reward(a, g, i) - mean;
        squares = fmaf(centred, centred, squares);
    }
    return sqrtf(warp_sum(squares) / degrees_of_freedom(a, g));
}

// What a centred reward is multiplied with.
__device__ __forceinline__ float find_scale(const GroupAdvantages& a, const Group& g, float std) {
    const float size = static_cast<float>(g.size);
    const float scale = a.leave_one_out ? size / (size - 1.0f) : 1.0f;
    return a.std_mode == kNoStd ? scale : scale / (std + a.eps);
}

__device__ __forceinline__ double warp_sum64(double value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1)
        value += __shfl_xor_sync(kAllLanes, value, lanes);
    return value;
}

// Of rewards that are not all equal.
__device__ __forceinline__ GroupMoments find_moments(const GroupAdvantages& a, const Group& g) {
    const float first = load_reward(a, g, 0);
    float smallest = first, largest = first;
    double sum = 0;
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const float reward = load_reward(a, g, i);
        sum += static_cast<double>(reward) - first;
        smallest = fminf(smallest, reward);
        largest = fmaxf(largest, reward);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes >>= 1) {
        smallest = fminf(smallest, __shfl_xor_sync(kAllLanes, smallest, lanes));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    }
    const double count = static_cast<double>(g.size), mean = first + warp_sum64(sum) / count;
    double squares = 0, num_smallest = 0, num_largest = 0;
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const float reward = load_reward(a, g, i);
        squares += (reward - mean) * (reward - mean);
        num_smallest += reward == smallest ? 1 : 0;
        num_largest += reward == largest ? 1 : 0;
    }
    return {count,   mean, warp_sum64(squares), smallest, largest, warp_sum64(num_smallest),
            warp_sum64(num_largest)};
}

__device__ __forceinline__ void forward_others(const GroupAdvantages& a, const Group& g) {
    const GroupMoments moments = find_moments(a, g);
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const OthersTerms own = others_terms(a, moments, load_reward(a, g, i), 0.0f);
        a.advantages[member(a, g, i)] = static_cast<float>(own.advantage);
    }
}

__device__ __forceinline__ void backward_others(const GroupAdvantagesBackward& b, const Group& g) {
    const GroupAdvantages& a = b.forward;
    const GroupMoments moments = find_moments(a, g);
    OthersSums sums = {0, 0, 0};
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const float reward = load_reward(a, g, i);
        const float grad = load_float(b.grad_advantages, 0, member(a, g, i));
        const OthersTerms own = others_terms(a, moments, reward, grad);
        sums.q += own.q;
        sums.p += own.p;
        sums.pc += own.p * (reward - moments.mean);
    }
    sums = {warp_sum64(sums.q), warp_sum64(sums.p), warp_sum64(sums.pc)};
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const int64_t j = member(a, g, i);
        const float reward = load_reward(a, g, i);
        const OthersTerms own =
            others_terms(a, moments, reward, load_float(b.grad_advantages, 0, j));
        b.grad_rewards[j] = static_cast<float>(others_gradient(moments, sums, own, reward));
    }
}

__global__ __launch_bounds__(kThreads, kBlocksPerSm) void forward_kernel(const GroupAdvantages a) {
    const Group g = own_group(a);
    if (g.index >= a.groups) return;
    Centre centre = {0.0f, 0.0f, 1.0f, true};
    float std = 0.0f;
    if (g.size > 0) centre = find_centre(a, g);
    if (!centre.all_equal) std = find_std(a, g, centre.mean);
    if (own_lane() == 0) {
        a.mean[g.index] = centre.mean;
        a.std[g.index] = std;
        if (g.size > 0 && centre.all_equal) atomicAdd(a.degenerate, 1);
    }
    if (a.std_mode == kLeaveOneOutStd && !centre.all_equal) return forward_others(a, g);
    const float scale = centre.all_equal ? 0.0f : find_scale(a, g, std);
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const float centred = load_reward(a, g, i) - centre.baseline;
        a.advantages[member(a, g, i)] = centre.all_equal ? 0.0f : centred * scale;
    }
}

// With centred c, scale k, std s and G = grad_advantages:
// grad_j = k (G_j - mean G) - k c_j (sum_i G_i c_i) / ((s + eps) s degrees_of_freedom)
__global__ __launch_bounds__(kThreads) void backward_kernel(const GroupAdvantagesBackward b) {
    const GroupAdvantages& a = b.forward;
    const Group g = own_group(a);
    if (g.index >= a.groups || g.size == 0) return;
    const Centre centre = find_centre(a, g);
    if (a.std_mode == kLeaveOneOutStd && !centre.all_equal) return backward_others(b, g);
    float grad_sum = 0.0f, moment = 0.0f;
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const float grad = load_float(b.grad_advantages, 0, member(a, g, i));
        grad_sum += grad;
        moment = fmaf(grad, load_reward(a, g, i) - centre.baseline, moment);
    }
    grad_sum = warp_sum(grad_sum);
    moment = warp_sum(moment);
    const float std = a.std[g.index], scale = find_scale(a, g, std);
    const float grad_mean = grad_sum / static_cast<float>(g.size);
    // The rewards differ, but the square of the difference may be below the smallest float.
    const bool has_std = a.std_mode != kNoStd && std != 0.0f;
    const float slope = has_std ? moment / ((std + a.eps) * std * degrees_of_freedom(a, g)) : 0.0f;
    for (int64_t i = own_lane(); i < g.size; i += 32) {
        const int64_t j = member(a, g, i);
        const float centred = load_reward(a, g, i) - centre.mean;
        float to_baseline = grad_mean;
        if (a.lengths.data) to_baseline = load_length(a, g, i) / centre.total_length * grad_sum;
        const float grad = load_float(b.grad_advantages, 0, j) - to_baseline - slope * centred;
        b.grad_rewards[j] = centre.all_equal ? 0.0f : scale * grad;
    }
}

}  // namespace

void group_advantages_forward(const GroupAdvantages& a, Stream stream) {
    DeviceGuard guard(stream.device, "group_advantages");
    if (a.groups == 0) return;
    launch("group_advantages", stream, (a.groups + kWarps - 1) / kWarps, kThreads, forward_kernel,
           a);
}

void group_advantages_backward(const GroupAdvantagesBackward& b, Stream stream) {
    const GroupAdvantages& a = b.forward;
    DeviceGuard guard(stream.device, "group_advantages_backward");
    if (a.groups == 0) return;
    launch("group_advantages_backward", stream, (a.groups + kWarps - 1) / kWarps, kThreads,
           backward_kernel, b);
}

}  // namespace warpo::cuda
