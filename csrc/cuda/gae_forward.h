// The reverse scans of the GAE family: one kernel, which knows its operation by its arguments.
//
// A block takes tiles of consecutive steps, from the end of its rows. A tile is scanned twice: for
// the value after each step, which a masked step passes on, and for the advantage.
#pragma once

#include "cuda/launch.h"
#include "cuda/scan.h"
#include "math/policy_loss.h"

namespace warpo::cuda {

__device__ __forceinline__ const Gae& gae_of(const Gae& a) { return a; }
__device__ __forceinline__ const Gae& gae_of(const ShapedGae& a) { return a.gae; }
__device__ __forceinline__ const Gae& gae_of(const Vtrace& a) { return a.gae; }

// The arrays of floats that a step needs: rewards, values, logprobs, those to compare them with.
__device__ __forceinline__ const View& input(const Gae& a, int k) {
    return k == 0 ? a.rewards : a.values;
}
__device__ __forceinline__ const View& input(const ShapedGae& a, int k) {
    return k < 2 ? input(a.gae, k) : k == 2 ? a.logprobs : a.ref_logprobs;
}
__device__ __forceinline__ const View& input(const Vtrace& a, int k) {
    return k < 2 ? input(a.gae, k) : k == 2 ? a.logprobs : a.old_logprobs;
}

template <class Arguments>
constexpr int kInputs = 4;
template <>
inline constexpr int kInputs<Gae> = 2;

// What is loaded ahead. A byte of `flags` an item: bit 0 the mask, 1 terminated, 2 truncated.
template <int kInputs>
struct Tile {
    float inputs[kInputs][kItems];
    uint32_t flags;
};

// Flags of ends; under starts_at_t that of the next step.
__device__ __forceinline__ uint32_t load_ends(const Gae& a, const View& flags, const View& last,
                                              const Row& row, Steps at) {
    if (!flags.data || !a.starts_at_t) return load_flags(flags, row, at);
    at.first += 1;
    uint32_t word = load_flags(flags, row, at);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const bool is_last = at.first + i * at.stride == row.length;
        if (is_last && last.data && load_flag(last, row.index, 0)) word |= 1u << (8 * i);
    }
    return word;
}

__device__ __forceinline__ uint32_t load_all_flags(const Gae& a, const Row& row, const Steps& at) {
    return load_flags(a.mask, row, at) |
           load_ends(a, a.terminated, a.last_terminated, row, at) << 1 |
           load_ends(a, a.truncated, a.last_truncated, row, at) << 2;
}

// GaeFlag bits, a byte for each of the consecutive steps from `first`.
__device__ __forceinline__ uint32_t gae_flags(const Gae& a, uint32_t loaded, int first,
                                              int length) {
    const int left = length - first;
    uint32_t inside = 0x01010101u;
    if (left < kItems) inside = left <= 0 ? 0 : inside >> (8 * (kItems - left));
    const uint32_t keep = a.mask.data ? inside & loaded : inside;
    return inside | keep << 1 | (loaded >> 1 & keep) << 2 | (loaded >> 2 & keep) << 3;
}

__device__ __forceinline__ unsigned flags_of(uint32_t flags, int item) {
    return flags >> (8 * item) & 15u;
}

__device__ __forceinline__ bool flags_are_vector(const Gae& a, const Row& row) {
    const bool shifted = a.starts_at_t && (a.terminated.data || a.truncated.data);
    return !shifted && is_vector(a.mask, row) && is_vector(a.terminated, row) &&
           is_vector(a.truncated, row);
}

// One of a block: the results of a packed row, as of `fill_rest`.
template <class B>
__device__ __forceinline__ bool fill_rest(const Gae& a, const Row& row) {
    return fill_rest<B>(a, row, a.advantages, a.returns);
}
template <class B>
__device__ __forceinline__ bool fill_rest(const Vtrace& a, const Row& row) {
    return fill_rest<B>(a.gae, row);
}
template <class B>
__device__ __forceinline__ bool fill_rest(const ShapedGae& a, const Row& row) {
    return fill_rest<B>(a.gae, row, a.gae.advantages, a.gae.returns, a.shaped_rewards);
}

__device__ __forceinline__ const View& shaped_rewards_of(const Gae& a) { return a.rewards; }
__device__ __forceinline__ const View& shaped_rewards_of(const Vtrace& a) { return a.gae.rewards; }
__device__ __forceinline__ const View& shaped_rewards_of(const ShapedGae& a) {
    return a.shaped_rewards;
}

// Whether the row of a lane lets all of its arrays move in vectors; a warp decides as one.
template <class B, class Arguments>
__device__ __forceinline__ bool is_vector_row(const Arguments& arguments, const Row& row) {
    if (B::kLanes == 1) return false;
    const Gae& a = gae_of(arguments);
    bool vector = flags_are_vector(a, row) && is_vector(a.advantages, row) &&
                  is_vector(a.returns, row) && is_vector(shaped_rewards_of(arguments), row);
#pragma unroll
    for (int k = 0; k < kInputs<Arguments>; ++k) vector &= is_vector(input(arguments, k), row);
    return !__any_sync(kAllLanes, !vector);
}

template <class Arguments>
__device__ __forceinline__ Tile<kInputs<Arguments>> load_tile(const Arguments& arguments,
                                                              const Row& row, const Steps& at) {
    Tile<kInputs<Arguments>> tile;
#pragma unroll
    for (int k = 0; k < kInputs<Arguments>; ++k) {
        load_items(tile.inputs[k], input(arguments, k), row, at);
    }
    tile.flags = load_all_flags(gae_of(arguments), row, at);
    return tile;
}

// Weights of a step: of its temporal difference, of the trace behind it and, for V-trace, of its
// advantage. All 1 but for V-trace.
struct Weights {
    float rho, trace, advantage;
};

__device__ __forceinline__ Weights weights_of(const Gae&, const float (&)[2][kItems], int, bool) {
    return {1.0f, 1.0f, 1.0f};
}
__device__ __forceinline__ Weights weights_of(const ShapedGae&, const float (&)[4][kItems], int,
                                              bool) {
    return {1.0f, 1.0f, 1.0f};
}
__device__ __forceinline__ Weights weights_of(const Vtrace& a, const float (&inputs)[4][kItems],
                                              int i, bool keep) {
    // A masked step that counts zeros has ratio 1.
    const float log_ratio = keep ? inputs[2][i] - inputs[3][i] : 0.0f;
    const float ratio = exp_f32(clamp_symmetric(log_ratio, a.log_ratio_limit));
    // fminf would drop a NaN
    return {ratio > a.rho_max ? a.rho_max : ratio, ratio > a.c_max ? a.c_max : ratio,
            !a.weighs_advantages       ? 1.0f
            : ratio > a.pg_rho_max ? a.pg_rho_max
                                   : ratio};
}

// What the KL to the reference and the entropy take off the reward of a valid step.
__device__ __forceinline__ float reward_cost(const Gae&, const float (&)[2][kItems], int, float) {
    return 0.0f;
}
__device__ __forceinline__ float reward_cost(const Vtrace&, const float (&)[4][kItems], int, float) {
    return 0.0f;
}
__device__ __forceinline__ float reward_cost(const ShapedGae& a, const float (&inputs)[4][kItems],
                                         int i, float kl_coef) {
    const float logp = inputs[2][i];
    const float kl = kl_estimate(logp, inputs[3][i], a.kl, false, a.log_ratio_limit).value;
    // 0 times a logprob of -inf would be NaN
    return kl_coef * kl + (a.entropy_coef == 0.0f ? 0.0f : a.entropy_coef * logp);
}

__device__ __forceinline__ float kl_coef_of(const Gae&) { return 0.0f; }
__device__ __forceinline__ float kl_coef_of(const Vtrace&) { return 0.0f; }
__device__ __forceinline__ float kl_coef_of(const ShapedGae& a) {
    return a.adaptive_kl_coef ? *a.adaptive_kl_coef : a.kl_coef;
}

// Adds to the last valid step of the row its terminal reward and, in compact mode, the rewards
// behind it.
template <class B>
__device__ __forceinline__ void add_terminal(float (&rewards)[kItems], uint32_t flags, const Gae& a,
                                             const Row& row, Pending& state, Pending* shared,
                                             const Place& p) {
    Pending own = {0.0f, 0};
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        own.ended |= (flags_of(flags, i) & kGaeKeep) != 0;
        if (!own.ended && a.mask_mode == kCompact) own.sum += rewards[i];
    }
    const Pending before = scan_block<B>(own, state, shared, p);
    bool is_last = own.ended && !before.ended;
    float extra = before.sum + own.sum;
    if (is_last && a.terminal_rewards.data) extra += load_float(a.terminal_rewards, row.index, 0);
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {
        const bool here = is_last && (flags_of(flags, i) & kGaeKeep);
        if (here) rewards[i] += extra;
        is_last = is_last && !here;
    }
}

template <class B>
struct Output {
    const Exchange<B>& exchange;
    const Row& row;
    const Steps& at;

    __device__ __forceinline__ void store(float (&values)[kItems], const View& view) const {
        if (!view.data) return;
        if (B::kLanes > 1 && !at.vector) exchange.to_striped(values);
        store_items(values, view, row, at);
    }
};

// With 64 registers a thread an SM holds 1024 threads: 36 KB of float32 rewards, values and a mask
// on their way in, and it takes 23 KB to keep the memory of an H200 busy.
template <class Arguments>
constexpr int kThreadsPerSm = kInputs<Arguments> == 2 ? 1024 : 512;

template <class B, class Arguments>
__global__ __launch_bounds__(B::kThreads,
                             kThreadsPerSm<Arguments> /
                                 B::kThreads) void forward_kernel(const Arguments arguments) {
    __shared__ float4 memory[B::kLanes == 1 ? 1 : B::kThreads];
    __shared__ Latest<float> values_of_warps[B::kWarps * B::kColumns];
    __shared__ AffineMap maps_of_warps[B::kWarps * B::kColumns];
    __shared__ Pending pending_of_warps[B::kWarps * B::kColumns];
    const Gae& a = gae_of(arguments);
    const bool carry = a.mask_mode != kZero;
    const bool moves_tail = a.mask_mode == kCompact && a.mask.data;
    const float decay = a.gamma * a.gae_lambda, kl_coef = kl_coef_of(arguments);
    const Place p = find_place<B>();
    Row row = find_row<B>(a, p);
    if (fill_rest<B>(arguments, row)) return;
    const Exchange<B> exchange(memory, p);
    const bool vector = is_vector_row<B>(arguments, row);
    const int own = vector ? p.first : p.striped, stride = vector ? 1 : B::kLanes;

    Latest<float> next_value = {0.0f, 1};
    if (row.exists && a.last_values.data) {
        next_value.payload = load_float(a.last_values, row.index, 0);
    }
    AffineMap next = {0.0f, 0.0f};  // slope 0: a state
    Pending pending = {0.0f, 0};
    // lanes past the last row go along
    const int length = a.cu_seqlens ? row.length : static_cast<int>(a.steps);
    int tile = length > 0 ? (length - 1) / B::kTile * B::kTile : -1;
    if (tile < 0) return;
    Tile<kInputs<Arguments>> ahead = load_tile(arguments, row, Steps{tile + own, stride, vector});
    for (; tile >= 0; tile -= B::kTile) {
        Tile<kInputs<Arguments>> s = ahead;
        compute_anew(row.index);
        compute_anew(row.start);
        const Steps at = {tile + own, stride, vector};
        if (tile > 0) {
            ahead = load_tile(arguments, row, Steps{at.first - B::kTile, stride, vector});
        }
        if (B::kLanes > 1 && !vector) {
#pragma unroll
            for (int k = 0; k < kInputs<Arguments>; ++k) exchange.to_consecutive(s.inputs[k]);
            s.flags = exchange.to_consecutive(s.flags);
        }
        const int first = tile + p.first;
        const uint32_t flags = gae_flags(a, s.flags, first, row.length);
        float (&rewards)[kItems] = s.inputs[0], (&values)[kItems] = s.inputs[1];
        if (moves_tail || a.terminal_rewards.data) {
            add_terminal<B>(rewards, flags, a, row, pending, pending_of_warps, p);
        }
        Latest<float> first_value = {0.0f, 0};
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
            // Masked slots may hold NaN: they are replaced, never multiplied.
            const bool keep = flags_of(flags, i) & kGaeKeep;
            rewards[i] = keep ? rewards[i] - reward_cost(arguments, s.inputs, i, kl_coef) : 0.0f;
            values[i] = keep ? values[i] : 0.0f;
            if (!gae_is_transparent(flags_of(flags, i), carry)) first_value = {values[i], 1};
        }
        float value = scan_block<B>(first_value, next_value, values_of_warps, p).payload;

        float deltas[kItems];
        AffineMap maps[kItems], all = affine_identity();
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
            const unsigned f = flags_of(flags, i);
            const Weights w = weights_of(arguments, s.inputs, i, f & kGaeKeep);
            float bootstrap = value;
            if ((f & kGaeTruncated) && a.final_values.data) {
                bootstrap = load_float(a.final_values, row.index, row.start + first + i);
            }
            deltas[i] = gae_delta(f, a.gamma, rewards[i], values[i], bootstrap);
            maps[i] = {f & kGaeCut ? 0.0f : decay * w.trace, w.rho * deltas[i]};
            if (gae_is_transparent(f, carry)) {
                maps[i] = affine_identity();
            } else {
                value = values[i];
            }
            all = then(all, maps[i]);
        }
        float trace = scan_block<B>(all, next, maps_of_warps, p).offset;

        float advantages[kItems], returns[kItems];
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
            const unsigned f = flags_of(flags, i);
            const float after = f & kGaeCut ? 0.0f : trace;
            trace = affine_apply(maps[i], trace);
            float advantage = trace;
            if constexpr (std::is_same_v<Arguments, Vtrace>) {
                const Weights w = weights_of(arguments, s.inputs, i, f & kGaeKeep);
                advantage = w.advantage * fmaf(a.gamma, after, deltas[i]);
            }
            advantages[i] = f & kGaeKeep ? advantage : 0.0f;
            returns[i] = f & kGaeKeep ? trace + values[i] : 0.0f;
        }
        const Output<B> output = {exchange, row, at};
        output.store(advantages, a.advantages);
        output.store(returns, a.returns);
        if constexpr (std::is_same_v<Arguments, ShapedGae>) {
            output.store(rewards, arguments.shaped_rewards);
        }
    }
}

// Steps count in int32, past the end by less than a tile; offsets are int64.
inline void check_steps(const Gae& a, const char* operation) {
    const int64_t most = INT32_MAX - (1 << 16);
    if (a.steps > most) {
        throw std::runtime_error(std::string(operation) + ": " + std::to_string(a.steps) +
                                 " steps, at most " + std::to_string(most) +
                                 " are supported: split the rows");
    }
}

// Calls launch_block with a Block, never by the number of rows: a row alone gives the bits that it
// gives in a batch. `layout` is an array as the rows lie. The length of a packed row is known on
// the device alone, so its block is the same for all: enough threads for a response of some
// thousands of tokens, few enough for many short ones at a time.
template <bool kFromEnd, class LaunchBlock>
void choose_block(const Gae& a, const View& layout, const LaunchBlock& launch_block) {
    if (a.cu_seqlens) return launch_block(Block<32, 8, kFromEnd>());
    if (layout.stride0 <= layout.stride1) {
        if (a.steps <= 16) return launch_block(Block<1, 4, kFromEnd>());
        return launch_block(Block<1, 16, kFromEnd>());
    }
    if (a.steps <= 16) return launch_block(Block<4, 1, kFromEnd>());
    if (a.steps <= 32) return launch_block(Block<8, 1, kFromEnd>());
    if (a.steps <= 128) return launch_block(Block<32, 1, kFromEnd>());
    if (a.steps <= 512) return launch_block(Block<32, 4, kFromEnd>());
    if (a.steps <= 1024) return launch_block(Block<32, 8, kFromEnd>());
    return launch_block(Block<32, 16, kFromEnd>());
}

template <class Arguments>
void launch_forward(const char* operation, const Arguments& arguments, const Gae& a,
                    Stream stream) {
    DeviceGuard guard(stream.device, operation);
    check_steps(a, operation);
    if (a.rows == 0 || a.steps == 0) return;
    const View& layout = a.advantages.data ? a.advantages : a.returns;
    choose_block<true>(a, layout, [&](auto block) {
        using B = decltype(block);
        launch(operation, stream, (a.rows + B::kRows - 1) / B::kRows, B::kThreads,
               forward_kernel<B, Arguments>, arguments);
    });
}

}  // namespace warpo::cuda
