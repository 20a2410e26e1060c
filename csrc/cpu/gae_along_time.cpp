// The reverse scans for arrays whose steps are dense: one row at a time, chunk by chunk, valid
// steps packed together. Any strides and sequences of any lengths (cu_seqlens) are right, too.
//   GAE, https://arxiv.org/abs/1506.02438 eq. 16; V-trace, https://arxiv.org/abs/1802.01561 eq. 1
#include "cpu/chunk.h"
#include "cpu/gae_scans.h"
#include "cpu/scan.h"
#include "math/policy_loss.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

int64_t total_steps(const Gae& a) { return a.cu_seqlens ? a.steps : a.rows * a.steps; }

struct Span {
    int64_t begin, end;
};

Span steps_of(const Gae& a, int64_t row) {
    if (!a.cu_seqlens) return {0, a.steps};
    return {a.cu_seqlens[row], a.cu_seqlens[row + 1]};
}

// Results of this many steps do not stay in a cache until they are read.
bool streams(const Gae& a) { return total_steps(a) >= 1 << 20; }

struct Buffers {
    Buffer rewards, values, next_values, final_values, terminated, truncated, ended;
    Buffer slopes, ratios, x, advantages, returns, logprobs, other_logprobs;
};

// What a chunk hands to the one before it.
struct State {
    float value, x;
    // What belongs to the reward of the last valid step, which comes first.
    float tail;
    bool before_last_valid;
};

template <int kl>
void subtract_kl(const float* logp, const float* ref, float coef, float limit, int count,
                 float* rewards) {
#pragma omp simd
    for (int i = 0; i < count; ++i)
        rewards[i] -= coef * kl_estimate(logp[i], ref[i], kl, false, limit).value;
}

void shape(const ShapedGae& s, const Chunk& at, Buffers& b, float* rewards) {
    const float* const logp = load_chunk(s.logprobs, at, b.logprobs);
    const float* const ref = load_chunk(s.ref_logprobs, at, b.other_logprobs);
    const float coef = s.adaptive_kl_coef ? *s.adaptive_kl_coef : s.kl_coef;
    switch (s.kl) {
        case kNoKl: return;
        case kK1: return subtract_kl<kK1>(logp, ref, coef, s.log_ratio_limit, at.count, rewards);
        case kK2: return subtract_kl<kK2>(logp, ref, coef, s.log_ratio_limit, at.count, rewards);
        case kK3: return subtract_kl<kK3>(logp, ref, coef, s.log_ratio_limit, at.count, rewards);
        default:
            return subtract_kl<kReverseK3>(logp, ref, coef, s.log_ratio_limit, at.count, rewards);
    }
}

// The sum of the rewards of the chunk from its step `from` on.
float sum_rewards(const View& view, const Chunk& at, int from) {
    float sum = 0;
    for (int i = from; view.data && i < at.steps; ++i) sum += load_one(view, at.row, at.step + i);
    return sum;
}

const float* load_rewards(const Gae& a, const ShapedGae* shaped, const Chunk& at, Buffers& b,
                          State& state) {
    const bool has_tail =
        state.before_last_valid && (a.terminal_rewards.data || a.mask_mode == kCompact);
    if (!shaped && !has_tail) return load_chunk(a.rewards, at, b.rewards);
    float* const rewards = copy_chunk(a.rewards, at, b.rewards);
    if (shaped) shape(*shaped, at, b, rewards);
    if (!has_tail) return rewards;
    const int last = at.last_kept();
    if (a.mask_mode == kCompact) state.tail += sum_rewards(a.rewards, at, last + 1);
    if (last < 0) return rewards;
    rewards[at.packed ? at.count - 1 : last] += state.tail;
    state.before_last_valid = false;
    return rewards;
}

const float* load_ratios(const Vtrace& v, const Chunk& at, Buffers& b) {
    const float* const logp = load_chunk(v.logprobs, at, b.logprobs);
    const float* const old = load_chunk(v.old_logprobs, at, b.other_logprobs);
    float* const ratios = b.ratios.begin();
    const float limit = v.log_ratio_limit;
#pragma omp simd
    for (int i = 0; i < at.count; ++i)
        ratios[i] = exp_bounded(clamp_symmetric(logp[i] - old[i], limit));
    return ratios;
}

WARPO_HD float smaller(float x, float bound) { return x > bound ? bound : x; }

// The links of a chunk to the steps after it: what the value after each step counts, and if an
// episode may end here (returned) the slopes and where.
bool load_links(const Gae& a, const Chunk& at, int64_t row_end, const float* values,
                const State& state, Buffers& b) {
    float* const next = b.next_values.begin();
    memcpy(next, values + 1, (at.count - 1) * sizeof(float));
    next[at.count - 1] = state.value;
    if (!a.terminated.data && !a.truncated.data) return false;
    const float* const terminated =
        load_ends(a, a.terminated, a.last_terminated, row_end, at, b.terminated);
    const float* const truncated =
        load_ends(a, a.truncated, a.last_truncated, row_end, at, b.truncated);
    const float* const final_values = load_chunk(a.final_values, at, b.final_values);
    const bool has_final = a.final_values.data;
    const float decay = a.gamma * a.gae_lambda;
    float *const slopes = b.slopes.begin(), *const ended = b.ended.begin();
#pragma omp simd
    for (int i = 0; i < at.count; ++i) {
        const bool terminal = terminated[i] != 0.0f, cut = truncated[i] != 0.0f;
        const float bootstrap = cut && has_final ? final_values[i] : next[i];
        next[i] = terminal ? 0.0f : bootstrap;
        slopes[i] = terminal || cut ? 0.0f : decay;
        ended[i] = terminal || cut ? 1.0f : 0.0f;
    }
    return true;
}

// x_i = delta_i + slope_i x_i+1 over the chunk.
void scan_chunk(const Gae& a, const Vtrace* vtrace, const float* rewards, const float* values,
                const float* ratios, bool has_ends, const Chunk& at, float state, Buffers& b) {
    const float* const next = b.next_values.begin();
    float *const x = b.x.begin(), *const slopes = b.slopes.begin();
    const float gamma = a.gamma, decay = a.gamma * a.gae_lambda;
#pragma omp simd
    for (int i = 0; i < at.count; ++i) x[i] = rewards[i] + gamma * next[i] - values[i];
    if (vtrace) {
        const float rho_max = vtrace->rho_max, c_max = vtrace->c_max;
#pragma omp simd
        for (int i = 0; i < at.count; ++i) {
            x[i] *= smaller(ratios[i], rho_max);
            slopes[i] = (has_ends ? slopes[i] : decay) * smaller(ratios[i], c_max);
        }
    }
    if (vtrace || has_ends)
        scan<true>(slopes, x, at.count, state);
    else
        scan<true>(decay, x, at.count, state);
}

// min(pg_rho_max, ratio) (r + gamma (V' + x') - V), without x' where an episode ends.
const float* policy_advantages(const Vtrace& v, const float* rewards, const float* values,
                               const float* ratios, bool has_ends, const Chunk& at, float state,
                               Buffers& b) {
    const float gamma = v.gae.gamma, bound = v.pg_rho_max;
    const float *const x = b.x.begin(), *const next = b.next_values.begin();
    const float* const ended = has_ends ? b.ended.begin() : kZeros;
    float* const out = b.advantages.begin();
    for (int i = 0; i < at.count; ++i) {
        const float after = i + 1 < at.count ? x[i + 1] : state;
        const float target = next[i] + (ended[i] != 0.0f ? 0.0f : after);
        out[i] = smaller(ratios[i], bound) * (rewards[i] + gamma * target - values[i]);
    }
    return out;
}

void forward_chunk(const Gae& a, const ShapedGae* shaped, const Vtrace* vtrace, const Chunk& at,
                   const Span& span, Buffers& b, State& state) {
    float *const x = b.x.begin(), *const returns = b.returns.begin();
    const float* const rewards = load_rewards(a, shaped, at, b, state);
    if (shaped) store_chunk(shaped->shaped_rewards, at, rewards);
    const float* advantages = x;
    if (at.count > 0) {
        const float* const values = load_chunk(a.values, at, b.values);
        const float* const ratios = vtrace ? load_ratios(*vtrace, at, b) : nullptr;
        const bool has_ends = load_links(a, at, span.end, values, state, b);
        scan_chunk(a, vtrace, rewards, values, ratios, has_ends, at, state.x, b);
        if (vtrace)
            advantages =
                policy_advantages(*vtrace, rewards, values, ratios, has_ends, at, state.x, b);
        for (int i = 0; a.returns.data && i < at.count; ++i) returns[i] = x[i] + values[i];
        state.x = x[0];
        state.value = values[0];
    }
    store_chunk(a.advantages, at, advantages, streams(a));
    store_chunk(a.returns, at, returns, streams(a));
}

void forward_row(const Gae& a, const ShapedGae* shaped, const Vtrace* vtrace, int64_t row,
                 Buffers& b) {
    const Span span = steps_of(a, row);
    State state = {0, 0, 0, true};
    if (a.last_values.data) state.value = load_one(a.last_values, row, 0);
    if (a.terminal_rewards.data) state.tail = load_one(a.terminal_rewards, row, 0);
    for (int64_t end = span.end, begin; end > span.begin; end = begin) {
        begin = end - span.begin > kChunk ? end - kChunk : span.begin;
        const Chunk at = chunk_of(a, row, begin, (int)(end - begin));
        forward_chunk(a, shaped, vtrace, at, span, b, state);
    }
}

// What a chunk hands to the one after it: total, the gradient of the advantage at its last step,
// and how much of it reaches advantage and value of the step that follows.
struct Adjoint {
    float total, slope, to_value;
    int64_t last_valid;
    float tail;
};

// Slopes and shares of the value of the steps before, and the gradient of final_values.
void load_adjoint_links(const GaeBackward& g, const Chunk& at, int64_t row_end,
                        const Adjoint& state, Buffers& b) {
    const Gae& a = g.forward;
    const float gamma = a.gamma, decay = a.gamma * a.gae_lambda;
    const float* const terminated =
        load_ends(a, a.terminated, a.last_terminated, row_end, at, b.terminated);
    const float* const truncated =
        load_ends(a, a.truncated, a.last_truncated, row_end, at, b.truncated);
    const bool has_final = a.final_values.data;
    float *const slopes = b.slopes.begin(), *const to_value = b.next_values.begin();
    float* const to_final = b.final_values.begin();
    slopes[0] = state.slope;
    to_value[0] = state.to_value;
    for (int i = 0; i < at.count; ++i) {
        const bool terminal = terminated[i] != 0.0f, cut = truncated[i] != 0.0f;
        slopes[i + 1] = terminal || cut ? 0.0f : decay;
        to_value[i + 1] = terminal || (cut && has_final) ? 0.0f : gamma;
        to_final[i] = cut && !terminal ? gamma : 0.0f;
    }
}

void backward_chunk(const GaeBackward& g, const Chunk& at, int64_t row_end, Buffers& b,
                    Adjoint& state) {
    const Gae& a = g.forward;
    const bool has_ends = a.terminated.data || a.truncated.data;
    float *const total = b.x.begin(), *const of_values = b.values.begin();
    float *const to_value = b.next_values.begin(), *const of_final = b.final_values.begin();
    if (at.count > 0) {
        const float* const of_advantages = load_chunk(g.grad_advantages, at, b.advantages);
        const float* const of_returns = load_chunk(g.grad_returns, at, b.returns);
        for (int i = 0; i < at.count; ++i) total[i] = of_advantages[i] + of_returns[i];
        load_adjoint_links(g, at, row_end, state, b);
        if (has_ends)
            scan<false>(b.slopes.begin(), total, at.count, state.total);
        else
            scan<false>(a.gamma * a.gae_lambda, total, at.count, state.total);
        total[-1] = state.total;
        for (int i = 0; i < at.count; ++i) {
            const float before = to_value[i] == 0.0f ? 0.0f : to_value[i] * total[i - 1];
            of_values[i] = of_returns[i] - total[i] + before;
            of_final[i] = of_final[i] == 0.0f ? 0.0f : of_final[i] * total[i];
        }
        state.total = total[at.count - 1];
        state.slope = b.slopes.begin()[at.count];
        state.to_value = to_value[at.count];
    }
    const int last = at.last_kept();
    if (last >= 0) {
        state.last_valid = at.step + last;
        state.tail = state.total;
    }
    store_chunk(g.grad_rewards, at, total);
    store_chunk(g.grad_values, at, of_values);
    store_chunk(g.grad_final_values, at, of_final);
}

void backward_row(const GaeBackward& g, int64_t row, Buffers& b) {
    const Gae& a = g.forward;
    const Span span = steps_of(a, row);
    Adjoint state = {0, 0, 0, span.end, 0};
    for (int64_t begin = span.begin, end; begin < span.end; begin = end) {
        end = span.end - begin > kChunk ? begin + kChunk : span.end;
        const Chunk at = chunk_of(a, row, begin, (int)(end - begin));
        backward_chunk(g, at, span.end, b, state);
    }
    if (g.grad_rewards.data && a.mask_mode == kCompact)
        for (int64_t t = state.last_valid + 1; t < span.end; ++t)
            *address<float>(g.grad_rewards, row, t) = state.tail;
    if (g.grad_last_values.data)
        *address<float>(g.grad_last_values, row, 0) =
            state.to_value == 0.0f ? 0.0f : state.to_value * state.total;
}

bool is_parallel(const Gae& a) { return total_steps(a) >= kParallelWork; }

// Steps of no sequence, before the first and after the last.
void zero_outside(const Gae& a, const View& out) {
    if (!a.cu_seqlens || !out.data) return;
    for (int64_t t = 0; t < a.cu_seqlens[0]; ++t) *address<float>(out, 0, t) = 0;
    for (int64_t t = a.cu_seqlens[a.rows]; t < a.steps; ++t) *address<float>(out, 0, t) = 0;
}

}  // namespace

void forward_along_time(const Gae& a, const ShapedGae* shaped, const Vtrace* vtrace) {
    zero_outside(a, a.advantages);
    zero_outside(a, a.returns);
    if (shaped) zero_outside(a, shaped->shaped_rewards);
#pragma omp parallel if (is_parallel(a))
    {
        Buffers b;
#pragma omp for schedule(guided)
        for (int64_t row = 0; row < a.rows; ++row) forward_row(a, shaped, vtrace, row, b);
        finish_streams();
    }
}

void backward_along_time(const GaeBackward& g) {
    zero_outside(g.forward, g.grad_rewards);
    zero_outside(g.forward, g.grad_values);
    zero_outside(g.forward, g.grad_final_values);
#pragma omp parallel if (is_parallel(g.forward))
    {
        Buffers b;
#pragma omp for schedule(guided)
        for (int64_t row = 0; row < g.forward.rows; ++row) backward_row(g, row, b);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
