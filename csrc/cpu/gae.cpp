// Generalised advantage estimation, https://arxiv.org/abs/1506.02438 eq. 16, and its exact adjoint:
//   A_t = r_t + gamma bootstrap_t - V_t + gamma lambda trace_t
#include "cpu/gae.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

struct Tiles {
    FloatTile rewards, values, final_values;
    IntTile flags;
};

struct State {
    Floats value, advantage;
};

// Walks the steps of the tile backwards; leaves the advantages in `rewards` and the returns in
// `values`.
template <bool kCarry>
State forward_tile(const Gae& a, int steps, Tiles& tile, State next) {
    const float gamma = a.gamma, decay = a.gamma * a.gae_lambda;
    const int32_t bootstrap_from_final = a.final_values.data ? kTruncated : 0;
    const Floats zero = {};
    for (int s = steps - 1; s >= 0; --s) {
        const Ints flags = tile.flags[s];
        const Ints keep = (flags & kKeep) != 0, terminated = (flags & kTerminated) != 0;
        const Floats value = keep ? tile.values[s] : zero;
        const Floats reward = keep ? tile.rewards[s] : zero;
        Floats bootstrap = (flags & bootstrap_from_final) != 0 ? tile.final_values[s] : next.value;
        bootstrap = terminated ? zero : bootstrap;
        const Floats trace = (flags & (kTerminated | kTruncated)) != 0 ? zero : next.advantage;
        const Floats advantage = (reward + gamma * bootstrap - value) + decay * trace;
        tile.rewards[s] = keep ? advantage : zero;
        tile.values[s] = keep ? advantage + value : zero;
        next.value = kCarry ? (keep ? value : next.value) : value;
        next.advantage = kCarry ? (keep ? advantage : next.advantage) : advantage;
    }
    return next;
}

void forward_rows(const Gae& a, int64_t row, int lanes) {
    Tiles tile = {};
    State next = {};
    if (a.last_values.data)
        for (int l = 0; l < lanes; ++l) next.value[l] = load_one(a.last_values, row + l, 0);
    for (int64_t end = a.steps; end > 0; end -= kTileSteps) {
        const int64_t begin = end > kTileSteps ? end - kTileSteps : 0;
        const TileAt at = {row, begin, lanes, (int)(end - begin)};
        load_tile(a.rewards, at, tile.rewards);
        load_tile(a.values, at, tile.values);
        load_tile(a.final_values, at, tile.final_values);
        load_flags(a, at, tile.flags);
        next = a.carry ? forward_tile<true>(a, at.steps, tile, next)
                       : forward_tile<false>(a, at.steps, tile, next);
        store_tile(a.advantages, at, tile.rewards);
        store_tile(a.returns, at, tile.values);
    }
}

struct GradTiles {
    FloatTile advantages, returns;  // in: gradients of the results
    FloatTile rewards, values, final_values;
    IntTile flags;
};

// Walks forwards with the adjoints of what step t hands to step t - 1.
template <bool kCarry>
State backward_tile(const Gae& a, int steps, GradTiles& tile, State grad) {
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

void backward_rows(const Gae& a, const GaeBackward& g, int64_t row, int lanes) {
    GradTiles tile = {};
    State grad = {};
    for (int64_t begin = 0; begin < a.steps; begin += kTileSteps) {
        const int64_t left = a.steps - begin;
        const TileAt at = {row, begin, lanes, left < kTileSteps ? (int)left : kTileSteps};
        load_tile(g.grad_advantages, at, tile.advantages);
        load_tile(g.grad_returns, at, tile.returns);
        load_flags(a, at, tile.flags);
        grad = a.carry ? backward_tile<true>(a, at.steps, tile, grad)
                       : backward_tile<false>(a, at.steps, tile, grad);
        store_tile(g.grad_rewards, at, tile.rewards);
        store_tile(g.grad_values, at, tile.values);
        store_tile(g.grad_final_values, at, tile.final_values);
    }
    if (g.grad_last_values.data)
        for (int l = 0; l < lanes; ++l)
            *address<float>(g.grad_last_values, row + l, 0) = grad.value[l];
}

int lanes_of(const Gae& a, int64_t row) {
    return a.rows - row < kLanes ? (int)(a.rows - row) : kLanes;
}

}  // namespace

void gae_forward(const Gae& a) {
#pragma omp parallel for if (a.rows * a.steps >= kParallelWork)
    for (int64_t row = 0; row < a.rows; row += kLanes) forward_rows(a, row, lanes_of(a, row));
}

void gae_backward(const GaeBackward& g) {
    const Gae& a = g.forward;
#pragma omp parallel for if (a.rows * a.steps >= kParallelWork)
    for (int64_t row = 0; row < a.rows; row += kLanes) backward_rows(a, g, row, lanes_of(a, row));
}

}  // namespace warpo::cpu::WARPO_ISA
