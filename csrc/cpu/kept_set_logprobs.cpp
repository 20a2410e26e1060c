// Logprobs over the kept ids of each token: threads over tokens, and over ids for the gradient of
// the weight.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/huge_pages.h"
#include "cpu/load.h"
#include "math/temperature.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

int64_t load_index(const View& view, int64_t i) {
    return view.dtype == kInt32 ? *address<int32_t>(view, 0, i) : *address<int64_t>(view, 0, i);
}

// The entries of a token; offsets that lead outside the list are cut there.
struct Kept {
    int64_t first, last;
};

Kept kept_of(const KeptSetLogprobs& a, int64_t token) {
    const int64_t first = load_index(a.kept_offsets, token);
    const int64_t last = load_index(a.kept_offsets, token + 1);
    return {first < 0 ? 0 : first, last > a.num_kept ? a.num_kept : last};
}

bool is_inside(const KeptSetLogprobs& a, int64_t id) { return id >= 0 && id < a.vocab; }

// float32 room for one row, one for each thread.
class Row {
public:
    explicit Row(int64_t size) : data((float*)malloc(size * sizeof(float))) {}
    ~Row() { free(data); }
    Row(const Row&) = delete;
    Row& operator=(const Row&) = delete;

    float* const data;
};

template <class T>
float dot(const float* x, const T* y, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i] * to_float(y[i]);
    return sum;
}

template <class T>
void add_scaled(float factor, const T* x, int64_t size, float* sum) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sum[i] += factor * to_float(x[i]);
}

template <class T>
void store_row(const float* x, int64_t size, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) from_float(x[i], out[i]);
}

template <class T>
void forward_token(const KeptSetLogprobs& a, int64_t token, float* hidden) {
    float* stats = a.stats + 2 * token;
    const Kept kept = kept_of(a, token);
    if (kept.first >= kept.last) {
        a.logprobs[token] = stats[0] = stats[1] = 0;
        return;
    }
    load_strided(address<T>(a.hidden, token, 0), 1, (int)a.hidden_size, hidden);
    const int64_t target = *address<int64_t>(a.targets, 0, token);
    float chosen = NAN, max = -INFINITY;
    for (int64_t e = kept.first; e < kept.last; ++e) {
        const int64_t id = load_index(a.kept_ids, e);
        float logit = NAN;
        if (is_inside(a, id)) {
            logit = dot(hidden, address<T>(a.weight, id, 0), a.hidden_size);
            if (a.bias.data) logit += load_one(a.bias, 0, id);
        }
        a.kept_logits[e] = logit;
        max = logit > max ? logit : max;
        if (id == target) chosen = logit;
    }
    const float inverse = 
        1.0f / temperature_or_nan(element<float>(a.token_temperature, 0, token, a.temperature));
    float sum = 0;
    for (int64_t e = kept.first; e < kept.last; ++e)
        sum += exp_f32((a.kept_logits[e] - max) * inverse);
    // no kept target: NaN for the gradient too
    const float log_sum = chosen == chosen ? logf(sum) : NAN;
    const float value = (chosen - max) * inverse - log_sum;
    a.logprobs[token] = value > 0 ? 0 : value;
    stats[0] = max;
    stats[1] = log_sum;
}

template <class T>
void forward(const KeptSetLogprobs& a) {
#pragma omp parallel if (a.num_kept * a.hidden_size >= kParallelWork)
    {
        Row hidden(a.hidden_size);
#pragma omp for schedule(dynamic, 4)
        for (int64_t token = 0; token < a.tokens; ++token) forward_token<T>(a, token, hidden.data);
    }
}

template <class T>
void backward_token(const KeptSetLogprobsBackward& g, int64_t token, float* sum) {
    const KeptSetLogprobs& a = g.forward;
    const Kept kept = kept_of(a, token);
    const int64_t size = a.hidden_size;
    if (g.grad_hidden.data) memset(sum, 0, size * sizeof(float));
    const int64_t target = *address<int64_t>(a.targets, 0, token);
    const float inverse = 
        1.0f / temperature_or_nan(element<float>(a.token_temperature, 0, token, a.temperature));
    const float max = a.stats[2 * token], log_sum = a.stats[2 * token + 1];
    for (int64_t e = kept.first; e < kept.last; ++e) {
        const int64_t id = load_index(a.kept_ids, e);
        const float p = exp_f32((a.kept_logits[e] - max) * inverse - log_sum);
        const float grad = *address<float>(g.grad_logprobs, 0, token) * inverse *
                           ((id == target ? 1.0f : 0.0f) - p);
        g.grad_logits[e] = grad;
        if (!g.grad_hidden.data || grad == 0) continue;
        if (is_inside(a, id))
            add_scaled(grad, address<T>(a.weight, id, 0), size, sum);
        else
            for (int64_t i = 0; i < size; ++i) sum[i] = NAN;
    }
    if (g.grad_hidden.data) store_row(sum, size, address<T>(g.grad_hidden, token, 0));
}

template <class T>
void backward(const KeptSetLogprobsBackward& g) {
    const KeptSetLogprobs& a = g.forward;
#pragma omp parallel if (a.num_kept * a.hidden_size >= kParallelWork)
    {
        Row sum(a.hidden_size);
#pragma omp for schedule(dynamic, 4)
        for (int64_t token = 0; token < a.tokens; ++token) backward_token<T>(g, token, sum.data);
    }
}

template <class T>
void add_id(const KeptSetWeightGradient& g, int64_t id, float* sum) {
    const int64_t first = g.offsets[id], last = g.offsets[id + 1];
    if (g.grad_bias) {
        float total = 0;
        for (int64_t i = first; i < last; ++i) total += g.grad_logits[g.order[i]];
        g.grad_bias[id] = total;
    }
    if (!g.grad_weight.data) return;
    T* const out = address<T>(g.grad_weight, id, 0);
    if (first == last) {  // most ids
        memset(out, 0, g.hidden_size * sizeof(T));
        return;
    }
    memset(sum, 0, g.hidden_size * sizeof(float));
    for (int64_t i = first; i < last; ++i) {
        const float grad = g.grad_logits[g.order[i]];
        if (grad != 0) add_scaled(grad, address<T>(g.hidden, g.tokens[i], 0), g.hidden_size, sum);
    }
    store_row(sum, g.hidden_size, out);
}

template <class T>
void weight_gradient(const KeptSetWeightGradient& g) {
    if (g.grad_weight.data)
        advise_huge_pages(g.grad_weight.data, address<T>(g.grad_weight, g.vocab, 0));
#pragma omp parallel if (g.vocab * g.hidden_size >= kParallelWork)
    {
        Row sum(g.hidden_size);
#pragma omp for schedule(dynamic, 64)
        for (int64_t id = 0; id < g.vocab; ++id) add_id<T>(g, id, sum.data);
    }
}

}  // namespace

void kept_set_logprobs_forward(const KeptSetLogprobs& a) {
    switch (a.hidden.dtype) {
        case kFloat32: return forward<float>(a);
        case kBFloat16: return forward<BFloat16>(a);
        default: return forward<Float16>(a);
    }
}

void kept_set_logprobs_backward(const KeptSetLogprobsBackward& g) {
    switch (g.forward.hidden.dtype) {
        case kFloat32: return backward<float>(g);
        case kBFloat16: return backward<BFloat16>(g);
        default: return backward<Float16>(g);
    }
}

void kept_set_weight_gradient(const KeptSetWeightGradient& g) {
    switch (g.hidden.dtype) {
        case kFloat32: return weight_gradient<float>(g);
        case kBFloat16: return weight_gradient<BFloat16>(g);
        default: return weight_gradient<Float16>(g);
    }
}

}  // namespace warpo::cpu::WARPO_ISA
