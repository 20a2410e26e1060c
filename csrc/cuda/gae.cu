// Generalised advantage estimation as a scan of affine maps from the last step to the first.
//
// A block takes tiles of consecutive steps, from the end. Rows in time order (stride 1 along time):
// the threads of a block lie along one row. Rows side by side (stride 1 across rows, [T, N]): each
// lane is a row and the warps lie along time. In both, how the maps are combined depends on the
// number of steps alone.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/affine_scan.h"

namespace warpo::cuda {
namespace {

constexpr int kBackwardThreads = 64, kBackwardSteps = 8;

__device__ __forceinline__ bool load_end(const Gae& a, const View& flags, const View& last,
                                         int64_t row, int step) {
    if (!flags.data) return false;
    if (!a.starts_at_t) return load_flag(flags, row, step);
    if (step + 1 < a.steps) return load_flag(flags, row, step + 1);
    return last.data && load_flag(last, row, 0);
}

// GaeFlag bits of a step, 0 outside of the array.
__device__ __forceinline__ unsigned load_flags(const Gae& a, int64_t row, int step) {
    if (row >= a.rows || step >= a.steps) return 0;
    unsigned flags = kGaeInside;
    if (!a.mask.data || load_flag(a.mask, row, step)) flags |= kGaeKeep;
    if (load_end(a, a.terminated, a.last_terminated, row, step)) flags |= kGaeTerminated;
    if (load_end(a, a.truncated, a.last_truncated, row, step)) flags |= kGaeTruncated;
    return flags;
}

template <int kItems>
struct Steps {
    float rewards[kItems], values[kItems];  // 0 where masked
    unsigned flags[kItems];
};

// Four consecutive float32 steps at once where they are aligned.
__device__ __forceinline__ bool is_vector(const View& view, int64_t offset) {
    return view.stride1 == 1 && view.dtype == kFloat32 &&
           misalignment_of(static_cast<const float*>(view.data) + offset) == 0;
}

template <int kItems>
__device__ __forceinline__ void load_floats(float (&out)[kItems], const View& view, int64_t row,
                                            int first, int steps) {
    const int64_t offset = offset_of(view, row, first);
    if (kItems == 4 && first + kItems <= steps && is_vector(view, offset)) {
        const float4 v =
            *reinterpret_cast<const float4*>(static_cast<const float*>(view.data) + offset);
        out[0] = v.x, out[1] = v.y, out[2 % kItems] = v.z, out[3 % kItems] = v.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        out[i] = first + i < steps ? load_float(view, offset + i * view.stride1) : 0.0f;
    }
}

template <int kItems>
__device__ __forceinline__ void store_floats(const float (&values)[kItems], const View& view,
                                             int64_t row, int first, int steps) {
    const int64_t offset = offset_of(view, row, first);
    float* out = static_cast<float*>(view.data) + offset;
    if (kItems == 4 && first + kItems <= steps && is_vector(view, offset)) {
        *reinterpret_cast<float4*>(out) =
            make_float4(values[0], values[1], values[2 % kItems], values[3 % kItems]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (first + i < steps) out[i * view.stride1] = values[i];
    }
}

template <int kItems>
__device__ __forceinline__ Steps<kItems> load_steps(const Gae& a, int64_t row, int first) {
    Steps<kItems> s;
    const int steps = row < a.rows ? static_cast<int>(a.steps) : 0;
    load_floats(s.rewards, a.rewards, row, first, steps);
    load_floats(s.values, a.values, row, first, steps);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        s.flags[i] = load_flags(a, row, first + i);
        // Masked slots may hold NaN: they are replaced, never multiplied.
        s.rewards[i] = s.flags[i] & kGaeKeep ? s.rewards[i] : 0.0f;
        s.values[i] = s.flags[i] & kGaeKeep ? s.values[i] : 0.0f;
    }
    return s;
}

__device__ __forceinline__ AffineMap shuffle_down(const AffineMap& map, int lanes) {
    return {__shfl_down_sync(kAllLanes, map.slope, lanes),
            __shfl_down_sync(kAllLanes, map.offset, lanes)};
}

// Value of the first step of a run of steps that does not let the next value through.
struct FirstValue {
    float value;
    bool found;
};

template <int kItems>
__device__ __forceinline__ FirstValue first_value(const Steps<kItems>& s, bool carry) {
    FirstValue first = {0.0f, false};
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        if (!gae_is_transparent(s.flags[i], carry)) first = {s.values[i], true};
    }
    return first;
}

// The first value to the right of this lane within its warp, and that of the warp.
__device__ __forceinline__ FirstValue right_of_lane(FirstValue own, FirstValue& warp) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const unsigned found = __ballot_sync(kAllLanes, own.found);
    const unsigned right = found & (0xfffffffeu << lane);
    const float value =
        __shfl_sync(kAllLanes, own.value, right ? __ffs(static_cast<int>(right)) - 1 : lane);
    warp.value = __shfl_sync(kAllLanes, own.value, found ? __ffs(static_cast<int>(found)) - 1 : 0);
    warp.found = found != 0;
    return {value, right != 0};
}

// Maps of the steps, first to last, given the value after them; returns their composition.
template <int kItems>
__device__ __forceinline__ AffineMap step_maps(AffineMap (&maps)[kItems], const Gae& a,
                                               const Steps<kItems>& s, int64_t row, int first,
                                               float next_value) {
    AffineMap total = affine_identity();
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        constexpr unsigned kCut = kGaeKeep | kGaeTruncated;
        float bootstrap = next_value;
        if ((s.flags[i] & kCut) == kCut && a.final_values.data) {
            bootstrap = load_float(a.final_values, row, first + i);
        }
        maps[i] = gae_step(s.flags[i], a.carry, a.gamma, a.gamma * a.gae_lambda, s.rewards[i],
                           s.values[i], bootstrap);
        if (!gae_is_transparent(s.flags[i], a.carry)) next_value = s.values[i];
        total = affine_compose(maps[i], total);
    }
    return total;
}

// kRowPerLane: rows side by side, warps along time; else all threads along the time of one row.
template <int kWarps, int kItems, bool kRowPerLane>
__global__ __launch_bounds__(32 * kWarps, 32 / kWarps) void forward_kernel(const Gae a) {
    constexpr int kRows = kRowPerLane ? 32 : 1, kTile = kItems * kWarps * (kRowPerLane ? 1 : 32);
    __shared__ AffineMap tile_maps[kWarps][kRows];
    __shared__ FirstValue tile_values[kWarps][kRows];
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int column = kRowPerLane ? lane : 0;
    const bool writes_warp = kRowPerLane || lane == 0;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + column;
    const int own = (kRowPerLane ? warp : static_cast<int>(threadIdx.x)) * kItems;
    float next_value =
        row < a.rows && a.last_values.data ? load_float(a.last_values, row, 0) : 0.0f;
    float next_advantage = 0.0f;

    int tile = static_cast<int>(a.steps - 1) / kTile * kTile;
    Steps<kItems> ahead = load_steps<kItems>(a, row, tile + own);
    for (; tile >= 0; tile -= kTile) {
        const int first = tile + own;
        const Steps<kItems> s = ahead;
        if (tile > 0) ahead = load_steps<kItems>(a, row, first - kTile);

        const FirstValue own_value = first_value(s, a.carry);
        FirstValue warp_value = own_value, right = {0.0f, false};
        if (!kRowPerLane) right = right_of_lane(own_value, warp_value);
        if (writes_warp) tile_values[warp][column] = warp_value;
        __syncthreads();
        float value_after = next_value;
        for (int w = kWarps - 1; w >= 0; --w) {
            const FirstValue value = tile_values[w][column];
            if (w == warp) value_after = right.found ? right.value : next_value;
            if (value.found) next_value = value.value;
        }

        AffineMap maps[kItems];
        AffineMap scan = step_maps(maps, a, s, row, first, value_after), after = affine_identity();
        if (!kRowPerLane) {
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes <<= 1) {
                const AffineMap later = shuffle_down(scan, lanes);
                if (lane + lanes < 32) scan = affine_compose(scan, later);
            }
            after = shuffle_down(scan, 1);
            if (lane == 31) after = affine_identity();
        }
        // tile_values is written again only after this barrier, and tile_maps only after the one
        // above
        if (writes_warp) tile_maps[warp][column] = scan;
        __syncthreads();
        float advantage = 0.0f;
        for (int w = kWarps - 1; w >= 0; --w) {
            if (w == warp) advantage = affine_apply(after, next_advantage);
            next_advantage = affine_apply(tile_maps[w][column], next_advantage);
        }

        float advantages[kItems], returns[kItems];
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
            advantage = affine_apply(maps[i], advantage);
            const bool keep = s.flags[i] & kGaeKeep;
            advantages[i] = keep ? advantage : 0.0f;
            returns[i] = keep ? advantage + s.values[i] : 0.0f;
        }
        const int steps = row < a.rows ? static_cast<int>(a.steps) : 0;
        store_floats(advantages, a.advantages, row, first, steps);
        store_floats(returns, a.returns, row, first, steps);
    }
}

// The adjoint of the recursion, forward in time: what an advantage and a value owe to the steps
// before them. One thread a row.
__global__ __launch_bounds__(kBackwardThreads) void backward_kernel(const GaeBackward b) {
    const Gae& a = b.forward;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kBackwardThreads + threadIdx.x;
    if (row >= a.rows) return;
    float owed_value = 0.0f, owed_advantage = 0.0f;
    const int steps = static_cast<int>(a.steps);
    for (int first = 0; first < steps; first += kBackwardSteps) {
        float grad_advantages[kBackwardSteps] = {}, grad_returns[kBackwardSteps] = {};
        unsigned flags[kBackwardSteps];
        if (b.grad_advantages.data)
            load_floats(grad_advantages, b.grad_advantages, row, first, steps);
        if (b.grad_returns.data) load_floats(grad_returns, b.grad_returns, row, first, steps);
#pragma unroll
        for (int i = 0; i < kBackwardSteps; ++i) flags[i] = load_flags(a, row, first + i);
#pragma unroll
        for (int i = 0; i < kBackwardSteps; ++i) {
            const int step = first + i;
            if (step >= steps) break;
            const bool keep = flags[i] & kGaeKeep;
            const bool terminated = keep && (flags[i] & kGaeTerminated);
            const bool truncated = keep && (flags[i] & kGaeTruncated);
            float grad_reward = 0.0f, grad_value = 0.0f, grad_final = 0.0f;
            if (!gae_is_transparent(flags[i], a.carry)) {
                const float direct = keep ? grad_advantages[i] + grad_returns[i] : 0.0f;
                const float grad_advantage = direct + owed_advantage;
                const float grad_bootstrap = terminated ? 0.0f : a.gamma * grad_advantage;
                grad_reward = keep ? grad_advantage : 0.0f;
                grad_value = keep ? (grad_returns[i] - grad_advantage) + owed_value : 0.0f;
                const bool has_final = truncated && b.grad_final_values.data;
                grad_final = has_final ? grad_bootstrap : 0.0f;
                owed_value = has_final ? 0.0f : grad_bootstrap;
                owed_advantage =
                    terminated || truncated ? 0.0f : a.gamma * a.gae_lambda * grad_advantage;
            }
            store_float(b.grad_rewards, row, step, grad_reward);
            store_float(b.grad_values, row, step, grad_value);
            if (b.grad_final_values.data) store_float(b.grad_final_values, row, step, grad_final);
        }
    }
    if (b.grad_last_values.data) store_float(b.grad_last_values, row, 0, owed_value);
}

// Steps count in int32, past the end by less than a tile; offsets are int64.
void check_steps(const Gae& a, const char* operation) {
    const int64_t most = INT32_MAX - (1 << 16);
    if (a.steps > most) {
        throw std::runtime_error(std::string(operation) + ": " + std::to_string(a.steps) +
                                 " steps, at most " + std::to_string(most) +
                                 " are supported: split the rows");
    }
}

template <int kWarps, int kItems, bool kRowPerLane>
void forward(const Gae& a, Stream stream) {
    const int64_t blocks = kRowPerLane ? (a.rows + 31) / 32 : a.rows;
    launch("gae", stream, blocks, 32 * kWarps, forward_kernel<kWarps, kItems, kRowPerLane>, a);
}

}  // namespace

void gae_forward(const Gae& a, Stream stream) {
    DeviceGuard guard(stream.device, "gae");
    check_steps(a, "gae");
    if (a.rows == 0 || a.steps == 0) return;
    // Not by the number of rows: a row alone gives the bits that it gives in a batch.
    if (a.rewards.stride0 <= a.rewards.stride1) {
        return a.steps <= 16 ? forward<4, 4, true>(a, stream) : forward<16, 4, true>(a, stream);
    }
    if (a.steps <= 128) return forward<1, 4, false>(a, stream);
    return a.steps <= 512 ? forward<4, 4, false>(a, stream) : forward<16, 4, false>(a, stream);
}

void gae_backward(const GaeBackward& b, Stream stream) {
    const Gae& a = b.forward;
    DeviceGuard guard(stream.device, "gae_backward");
    check_steps(a, "gae_backward");
    if (a.rows == 0) return;
    const int64_t blocks = (a.rows + kBackwardThreads - 1) / kBackwardThreads;
    launch("gae_backward", stream, blocks, kBackwardThreads, backward_kernel, b);
}

}  // namespace warpo::cuda
