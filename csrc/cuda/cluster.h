// Host side of a launch in clusters: blocks that run at once and read each other's shared memory.
#pragma once

#include "cuda/launch.h"

namespace warpo::cuda {

// What a kernel may use of the chip of the current device.
struct Chip {
    int shared_bytes;  // most dynamic shared memory of a block
    bool has_clusters;
};

template <typename... Parameters>
Chip chip_for(const char* operation, void (*kernel)(Parameters...)) {
    int device, shared_bytes, has_clusters;
    check(cudaGetDevice(&device), operation);
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          operation);
    check(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device), operation);
    // A newer chip runs code for an older architecture too, which has no instructions for clusters.
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), operation);
    return {shared_bytes - static_cast<int>(attributes.sharedSizeBytes),
            has_clusters != 0 && attributes.ptxVersion >= 90};
}

struct Grid {
    int64_t clusters;
    int blocks;        // of a cluster
    int threads;       // of a block
    int shared_bytes;  // dynamic, of a block
};

template <typename... Parameters>
void launch_clusters(const char* operation, Stream stream, const Grid& grid,
                     void (*kernel)(Parameters...), Parameters... arguments) {
    const int64_t blocks = grid.clusters * grid.blocks;
    check_blocks(operation, blocks);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               grid.shared_bytes),
          operation);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          operation);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream.stream);
    config.attrs = &cluster;
    config.numAttrs = grid.blocks > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), operation);
}

}  // namespace warpo::cuda
