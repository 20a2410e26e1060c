// The reverse scans with a row in each lane, step by step:
//   A_t = r_t + gamma bootstrap_t - V_t + gamma lambda trace_t
// https://arxiv.org/abs/1506.02438 eq. 16, with V-trace, https://arxiv.org/abs/1802.01561 eq. 1.
#include "cpu/gae.h"
#include "cpu/gae_scans.h"
#include "math/policy_loss.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Tiles {
    FloatTile rewards, values, final_values, logprobs, old_logprobs;
    IntTile flags;
};

Floats smaller(Floats x, float bound) { return x > bound ? Floats{} + bound : x; }

struct State {
    Floats value, x;
    // What belongs to the reward of the last valid step, and whether that comes yet.
    Floats tail;
    Ints before_last_valid;
};

// Adds terminal rewards and, with kCompact, those behind the last valid step to its reward.
void add_tail(const Gae& a, int steps, Tiles& tile, State& state) {
    const Floats zero = {};
    const Ints compact = Ints{} - (a.mask_mode == kCompact);
    for (int s = steps - 1; s >= 0; --s) {
        const Ints keep = (tile.flags[s] & kKeep) != 0;
        const Ints behind = ~keep & state.before_last_valid & compact;
        state.tail += behind ? tile.rewards[s] : zero;
        tile.rewards[s] += (keep & state.before_last_valid) ? state.tail : zero;
        state.before_last_valid &= ~keep;
    }
}

// Walks the steps of the tile backwards; leaves the advantages in `rewards` and the returns in
// `values`.
template <bool kCarry, bool kVtrace>
State forward_tile(const Gae& a, const Vtrace* vtrace, int steps, Tiles& tile, State next) {
    const float gamma = a.gamma, decay = a.gamma * a.gae_lambda;
    const int32_t bootstrap_from_final = a.final_values.data ? kTruncated : 0;
    const Floats zero = {}, one = zero + 1.0f;
    for (int s = steps - 1; s >= 0; --s) {
        const Ints flags = tile.flags[s];
        const Ints keep = (flags & kKeep) != 0, terminated = (flags & kTerminated) != 0;
        const Floats value = keep ? tile.values[s] : zero;
        const Floats reward = keep ? tile.rewards[s] : zero;
        Floats bootstrap = (flags & bootstrap_from_final) != 0 ? tile.final_values[s] : next.value;
        bootstrap = terminated ? zero : bootstrap;
        const Floats trace = (flags & (kTerminated | kTruncated)) != 0 ? zero : next.x;
        Floats x, advantage;
        if constexpr (kVtrace) {
            const Floats ratio = keep ? tile.logprobs[s] : one;
            const Floats rho = smaller(ratio, vtrace->rho_max), c = smaller(ratio, vtrace->c_max);
            x = rho * (reward + gamma * bootstrap - value) + decay * c * trace;
            advantage = reward + gamma * (bootstrap + trace) - value;
            if (vtrace->weighs_advantages) advantage *= smaller(ratio, vtrace->pg_rho_max);
        } else {
            x = (reward + gamma * bootstrap - value) + decay * trace;
            advantage = x;
        }
        tile.rewards[s] = keep ? advantage : zero;
        tile.values[s] = keep ? x + value : zero;
        next.value = kCarry ? (keep ? value : next.value) : value;
        next.x = kCarry ? (keep ? x : next.x) : x;
    }
    return next;
}

// Leaves the ratios in `logprobs`.
void load_ratios(const Vtrace& v, const TileAt& at, Tiles& tile) {
    load_tile(v.logprobs, at, tile.logprobs);
    load_tile(v.old_logprobs, at, tile.old_logprobs);
    for (int s = 0; s < at.steps; ++s)
#pragma omp simd
        for (int l = 0; l < kLanes; ++l)
            tile.logprobs[s][l] = exp_bounded(
                clamp_symmetric(tile.logprobs[s][l] - tile.old_logprobs[s][l], v.log_ratio_limit));
}

State forward_tile(const Gae& a, const Vtrace* vtrace, int steps, Tiles& tile, State next) {
    if (a.mask_mode == kZero)
        return vtrace ? forward_tile<false, true>(a, vtrace, steps, tile, next)
                      : forward_tile<false, false>(a, vtrace, steps, tile, next);
    return vtrace ? forward_tile<true, true>(a, vtrace, steps, tile, next)
                  : forward_tile<true, false>(a, vtrace, steps, tile, next);
}

void forward_rows(const Gae& a, const Vtrace* vtrace, int64_t row, int lanes) {
    Tiles tile = {};
    State next = {};
    next.before_last_valid -= 1;
    for (int l = 0; a.last_values.data && l < lanes; ++l)
        next.value[l] = load_one(a.last_values, row + l, 0);
    for (int l = 0; a.terminal_rewards.data && l < lanes; ++l)
        next.tail[l] = load_one(a.terminal_rewards, row + l, 0);
    const bool has_tail = a.terminal_rewards.data || (a.mask_mode == kCompact && a.mask.data);
    for (int64_t end = a.steps; end > 0; end -= kTileSteps) {
        const int64_t begin = end > kTileSteps ? end - kTileSteps : 0;
        const TileAt at = {row, begin, lanes, (int)(end - begin)};
        load_tile(a.rewards, at, tile.rewards);
        // the returns of the steps behind lie there
        if (!a.values.data) memset(tile.values, 0, sizeof tile.values);
        load_tile(a.values, at, tile.values);
        load_tile(a.final_values, at, tile.final_values);
        load_flags(a, at, tile.flags);
        if (vtrace) load_ratios(*vtrace, at, tile);
        if (has_tail) add_tail(a, at.steps, tile, next);
        next = forward_tile(a, vtrace, at.steps, tile, next);
        store_tile(a.advantages, at, tile.rewards);
        store_tile(a.returns, at, tile.values);
    }
}

struct GradTiles {
    FloatTile advantages, returns;  // in: gradients of the results
    FloatTile rewards, values, final_values;
    IntTile flags;
};

struct Adjoint {
    Floats value, advantage;
    // Total gradient at the last valid step so far; with kCompact that of the rewards behind it.
    Floats last;
};

// Walks forwards with the adjoints of what step t hands to step t - 1.
template <bool kCarry>
Adjoint backward_tile(const Gae& a, int steps, GradTiles& tile, Adjoint grad) {
    const float gamma = a.gamma, decay = a.gamma * a.gae_lambda;
    const int32_t bootstrap_from_final = a.final_values.data ? kTruncated : 0;
    const Floats zero = {};
    for (int s = 0; s < steps; ++s) {
        const Ints flags = tile.flags[s];
        const Ints keep = (flags & kKeep) != 0, terminated = (flags & kTerminated) != 0;
        const Ints from_final = (flags & bootstrap_from_final) != 0;
        const Floats of_returns = keep ? tile.returns[s] : zero;
        const Floats of_advantages = keep ? tile.advantages[s] : zero;
        const Floats total = grad.advantage + (of_advantages + of_returns);
        grad.last = keep ? total : grad.last;
        tile.rewards[s] = keep ? total : zero;
        tile.values[s] = keep ? grad.value + of_returns - total : zero;
        const Floats to_bootstrap = terminated ? zero : gamma * total;
        tile.final_values[s] = from_final ? to_bootstrap : zero;
        const Floats to_value = from_final ? zero : to_bootstrap;
        const Floats to_trace = (flags & (kTerminated | kTruncated)) != 0 ? zero : decay * total;
        grad.value = kCarry ? (keep ? to_value : grad.value) : to_value;
        grad.advantage = kCarry ? (keep ? to_trace : grad.advantage) : to_trace;
    }
    return grad;
}

// The gradients of rewards behind the last valid step of a row.
void store_tail(const Gae& a, const View& grad_rewards, int64_t row, float grad) {
    for (int64_t t = a.steps - 1; t >= 0 && !element<uint8_t>(a.mask, row, t, 1); --t)
        *address<float>(grad_rewards, row, t) = grad;
}

void backward_rows(const Gae& a, const GaeBackward& g, int64_t row, int lanes) {
    GradTiles tile = {};
    Adjoint grad = {};
    for (int64_t begin = 0; begin < a.steps; begin += kTileSteps) {
        const int64_t left = a.steps - begin;
        const TileAt at = {row, begin, lanes, left < kTileSteps ? (int)left : kTileSteps};
        load_tile(g.grad_advantages, at, tile.advantages);
        load_tile(g.grad_returns, at, tile.returns);
        load_flags(a, at, tile.flags);
        grad = a.mask_mode == kZero ? backward_tile<false>(a, at.steps, tile, grad)
                                    : backward_tile<true>(a, at.steps, tile, grad);
        store_tile(g.grad_rewards, at, tile.rewards);
        store_tile(g.grad_values, at, tile.values);
        store_tile(g.grad_final_values, at, tile.final_values);
    }
    for (int l = 0; l < lanes; ++l) {
        if (a.mask_mode == kCompact && g.grad_rewards.data)
            store_tail(a, g.grad_rewards, row + l, grad.last[l]);
        if (g.grad_last_values.data)
            *address<float>(g.grad_last_values, row + l, 0) = grad.value[l];
    }
}

int lanes_of(const Gae& a, int64_t row) {
    return a.rows - row < kLanes ? (int)(a.rows - row) : kLanes;
}

}  // namespace

void forward_across_rows(const Gae& a, const Vtrace* vtrace) {
#pragma omp parallel for if (a.rows * a.steps >= kParallelWork)
    for (int64_t row = 0; row < a.rows; row += kLanes)
        forward_rows(a, vtrace, row, lanes_of(a, row));
}

void backward_across_rows(const GaeBackward& g) {
    const Gae& a = g.forward;
#pragma omp parallel for if (a.rows * a.steps >= kParallelWork)
    for (int64_t row = 0; row < a.rows; row += kLanes) backward_rows(a, g, row, lanes_of(a, row));
}

}  // namespace warpo::cpu::WARPO_ISA
