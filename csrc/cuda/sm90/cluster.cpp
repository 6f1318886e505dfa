#include "cuda/sm90/cluster.h"

#include "cuda/launch_help.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tiles.h"

namespace resnet_fused::sm90 {
namespace {

// One answers for all: their launch bounds are the same, and no other needs more shared memory.
constexpr int largest_split_tile() {
  int largest = -1;
  for (int i = 0; i < kTileCount; ++i) {
    if (!splits_reduction(kTiles[i].tile)) continue;
    if (largest < 0 || shared_bytes(kTiles[i].tile) > shared_bytes(kTiles[largest].tile))
      largest = i;
  }
  return largest;
}

constexpr int kWhole = 8;  // on a whole GPU

}  // namespace

int largest_cluster() {
  constexpr int kTile = largest_split_tile();
  static_assert(kTile >= 0);
  constexpr Tile kT = kTiles[kTile].tile;
  const void* const kernel = kernel_bfloat16(kTile, false, true);
  if (cuda::allow_shared(kernel, shared_bytes(kT))) {
    cudaGetLastError();
    return kWhole;
  }
  for (const unsigned blocks : {8u, 4u, 2u}) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {blocks, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(128 * (1 + kT.consumers));
    config.dynamicSmemBytes = shared_bytes(kT);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int resident = 0;
    const cudaError_t code = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
    if (code != cudaSuccess) cudaGetLastError();
    if (code != cudaSuccess && code != cudaErrorInvalidClusterSize) return kWhole;
    if (resident > 0) return int(blocks);
  }
  return 1;
}

}  // namespace resnet_fused::sm90
