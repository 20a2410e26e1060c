// The CUDA implementations under the names of the CPU library, so that csrc/bindings.cpp builds as
// warpo.kernels._cpu and the tests of the backend "cpu" run the CUDA kernels.
// Not shown: the CPU library, and what csrc/bindings.cpp does differently for _cuda.
#include <mutex>

#include "cpu/cpu.h"
#include "cuda/cuda.h"

namespace warpo::cpu {
namespace {

// One operation at a time: there is one set of fibers.
std::mutex running;

}  // namespace

#define WARPO_RUN(operation, Arguments)                   \
    void operation(const Arguments& arguments) {          \
        const std::lock_guard<std::mutex> lock(running);  \
        cuda::operation(arguments, cuda::Stream{});       \
    }
WARPO_OPERATIONS(WARPO_RUN)

// What a test asks for, so as not to pass on the CPU library by accident.
const char* instruction_set() { return "emulated"; }

// A GPU has them from BLAS; their bindings are for other instruction sets.
#ifdef __x86_64__
void float32_product(const MatrixProduct&) {}
#endif
#ifdef WARPO_AVX512_BF16
void bfloat16_product(const MatrixProduct&) {}
#endif

}  // namespace warpo::cpu
