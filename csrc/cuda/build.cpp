// Compiled by nvcc, which says for what GPUs.
#include <cuda_runtime_api.h>

#include "cuda/cuda.h"

namespace warpo::cuda {

Build build() {
    Build found;
    for (const int arch : {__CUDA_ARCH_LIST__}) found.capabilities.push_back(arch / 10);
    cudaRuntimeGetVersion(&found.runtime);
    cudaDriverGetVersion(&found.driver);
    return found;
}

}  // namespace warpo::cuda
