// The operations on a CUDA device. Launches only: no synchronisation, no allocation, fit for stream
// capture. A failure to launch throws std::runtime_error with the operation and the reason.
#pragma once

#include "kernels.h"

namespace warpo::cuda {

struct Stream {
    int device;
    void* stream;  // cudaStream_t; nullptr is the default stream
};

#define WARPO_DECLARE(operation, Arguments) void operation(const Arguments&, Stream);
WARPO_OPERATIONS(WARPO_DECLARE)
#undef WARPO_DECLARE

}  // namespace warpo::cuda
