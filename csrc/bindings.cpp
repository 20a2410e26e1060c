// Names only: each function takes its arguments in the order of kernels/native.py, after the sizes.
// Compiled twice: for _cpu, and with WARPO_CUDA for _cuda, whose functions take device and stream
// at the end.
#include <pybind11/pybind11.h>

#include "kernels.h"

#ifdef WARPO_CUDA
#include "cuda/cuda.h"
#define WARPO_MODULE _cuda
#define STREAM_PARAMETERS , int device, uintptr_t stream
#define STREAM \
    , Stream { device, reinterpret_cast<void*>(stream) }
using namespace warpo::cuda;
#else
#include "cpu/cpu.h"
#define WARPO_MODULE _cpu
#define STREAM_PARAMETERS
#define STREAM
using namespace warpo::cpu;
#endif

namespace py = pybind11;
using namespace warpo;

namespace pybind11::detail {

// (data_ptr, stride0, stride1, dtype) or None
template <>
struct type_caster<View> {
    PYBIND11_TYPE_CASTER(View, const_name("tuple[int, int, int, int] | None"));
    bool load(handle source, bool) {
        if (source.is_none()) return true;
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
        value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
        value.stride0 = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 1));
        value.stride1 = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), 2));
        value.dtype = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 3)));
        if (PyErr_Occurred()) throw error_already_set();
        return true;
    }
};

}  // namespace pybind11::detail

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Logprobs logprobs_of(int64_t rows, int64_t steps, int64_t vocab, View logits, View targets,
                     float temperature, View token_temperature, View mask, int64_t ignore_index,
                     View logprobs, View entropy, uintptr_t stats) {
    return {logits,
            rows,
            steps,
            vocab,
            targets,
            temperature,
            token_temperature,
            mask,
            ignore_index,
            logprobs,
            entropy,
            pointer<float>(stats)};
}

}  // namespace

PYBIND11_MODULE(WARPO_MODULE, m) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
#ifndef WARPO_CUDA
    m.def("instruction_set", &instruction_set);
#endif

    m.def(
        "logprobs_forward",
        [](int64_t rows, int64_t steps, int64_t vocab, View logits, View targets, float temperature,
           View token_temperature, View mask, int64_t ignore_index, View logprobs, View entropy,
           uintptr_t stats STREAM_PARAMETERS) {
            logprobs_forward(logprobs_of(rows, steps, vocab, logits, targets, temperature,
                                         token_temperature, mask, ignore_index, logprobs, entropy,
                                         stats) STREAM);
        },
        Unlocked());
    m.def(
        "logprobs_backward",
        [](int64_t rows, int64_t steps, int64_t vocab, View logits, View targets, float temperature,
           View token_temperature, View mask, int64_t ignore_index, View entropy, uintptr_t stats,
           View grad_logprobs, View grad_entropy, View grad_logits STREAM_PARAMETERS) {
            logprobs_backward(
                logprobs_of(rows, steps, vocab, logits, targets, temperature, token_temperature,
                            mask, ignore_index, View{}, entropy, stats),
                LogprobsBackward{grad_logprobs, grad_entropy, grad_logits} STREAM);
        },
        Unlocked());
    m.def(
        "gae_forward",
        [](int64_t rows, int64_t steps, View rewards, View values, View last_values,
           View final_values, View mask, View terminated, View truncated, View last_terminated,
           View last_truncated, float gamma, float gae_lambda, bool carry, bool starts_at_t,
           View advantages, View returns STREAM_PARAMETERS) {
            gae_forward(Gae{rows, steps, rewards, values, last_values, final_values, mask,
                            terminated, truncated, last_terminated, last_truncated, gamma,
                            gae_lambda, carry, starts_at_t, advantages, returns} STREAM);
        },
        Unlocked());
    m.def(
        "gae_backward",
        [](int64_t rows, int64_t steps, View mask, View terminated, View truncated,
           View last_terminated, View last_truncated, float gamma, float gae_lambda, bool carry,
           bool starts_at_t, View grad_advantages, View grad_returns, View grad_rewards,
           View grad_values, View grad_last_values, View grad_final_values STREAM_PARAMETERS) {
            // final_values says only whether truncated steps bootstrapped from it.
            gae_backward(Gae{rows, steps, View{}, View{}, View{}, grad_final_values, mask,
                             terminated, truncated, last_terminated, last_truncated, gamma,
                             gae_lambda, carry, starts_at_t, View{}, View{}},
                         GaeBackward{grad_advantages, grad_returns, grad_rewards, grad_values,
                                     grad_last_values, grad_final_values} STREAM);
        },
        Unlocked());
    m.def(
        "policy_loss",
        [](int64_t sequences, int64_t steps, View logprobs, View old_logprobs, View advantages,
           View ref_logprobs, View mask, uintptr_t cu_seqlens, bool sequence_level,
           bool sequence_mean, float ratio_low, float ratio_high, int kl, float kl_coef,
           float log_ratio_limit, uintptr_t denominator, uintptr_t grad_logprobs,
           uintptr_t partials, uintptr_t loss, uintptr_t metrics STREAM_PARAMETERS) {
            policy_loss(PolicyLoss{sequences,
                                   steps,
                                   pointer<int32_t>(cu_seqlens),
                                   logprobs,
                                   old_logprobs,
                                   advantages,
                                   ref_logprobs,
                                   mask,
                                   sequence_level,
                                   sequence_mean,
                                   ratio_low,
                                   ratio_high,
                                   kl,
                                   kl_coef,
                                   log_ratio_limit,
                                   pointer<float>(denominator),
                                   pointer<float>(grad_logprobs),
                                   pointer<float>(partials),
                                   pointer<float>(loss),
                                   pointer<float>(metrics)} STREAM);
        },
        Unlocked());
    m.def(
        "group_advantages_forward",
        [](int64_t groups, View rewards, int64_t group_size, uintptr_t order, uintptr_t offsets,
           int std_mode, bool leave_one_out, float eps, uintptr_t advantages, uintptr_t mean,
           uintptr_t std, uintptr_t degenerate STREAM_PARAMETERS) {
            group_advantages_forward(GroupAdvantages{
                groups, group_size, pointer<int64_t>(offsets), pointer<int64_t>(order), rewards,
                std_mode, leave_one_out, eps, pointer<float>(advantages), pointer<float>(mean),
                pointer<float>(std), pointer<int32_t>(degenerate)} STREAM);
        },
        Unlocked());
    m.def(
        "group_advantages_backward",
        [](int64_t groups, View rewards, int64_t group_size, uintptr_t order, uintptr_t offsets,
           int std_mode, bool leave_one_out, float eps, uintptr_t mean, uintptr_t std,
           View grad_advantages, uintptr_t grad_rewards STREAM_PARAMETERS) {
            group_advantages_backward(
                GroupAdvantages{groups, group_size, pointer<int64_t>(offsets),
                                pointer<int64_t>(order), rewards, std_mode, leave_one_out, eps,
                                nullptr, pointer<float>(mean), pointer<float>(std), nullptr},
                GroupAdvantagesBackward{grad_advantages, pointer<float>(grad_rewards)} STREAM);
        },
        Unlocked());
}
