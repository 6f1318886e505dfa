// From global to shared memory: a tile's patch of the image, and the weights.
#pragma once

#include "cuda/sm80/config.cuh"
#include "cuda/sm80/stem.h"

namespace resnet_fused::sm80 {

// A tile's image, and its first pooled row and column.
struct StemPlace {
  int image, row, column;
};
RF_DEVICE StemPlace place_of(const StemParams& p, int tile, int rows) {
  const int across = tile / p.tiles_of_w, image = across / p.tiles_of_h;
  return {image, (across - image * p.tiles_of_h) * rows,
          (tile - across * p.tiles_of_w) * kPoolColumns};
}

// Rows of the image are whole granules and patches begin at whole granules of them: no granule is
// half outside of the image. The copies are one group, but single elements are stored at once.
template <typename T, int kGranule>
RF_DEVICE void load_patch(const StemParams& p, T* patch, const StemPlace& place, int thread,
                          int threads) {
  const Problem& q = p.problem;
  const StemLayout& l = p.layout;
  const int line = q.w * q.c, granules = l.pitch / kGranule;
  // The patch's first row and element, in the image; both may be negative.
  const int top = (2 * place.row - 1) * q.stride_h - q.pad_h;
  const int left = ((2 * place.column - 1) * q.stride_w - q.pad_w) * q.c - (l.lead + l.first);
  const T* const image = static_cast<const T*>(p.x) + int64_t(place.image) * q.h * line;
  for (int i = thread; i < l.patch_rows * granules; i += threads) {
    const int row = i / granules, element = (i - row * granules) * kGranule;
    const int h = top + row, e = left + element;
    const bool in = h >= 0 && h < q.h && e >= 0 && e < line;
    const T* const from = in ? image + h * line + e : static_cast<const T*>(p.x);
    T* const to = patch + row * l.pitch + element;
    if constexpr (kGranule == 8) {
      copy_16(shared_address(to), from, in);
    } else if constexpr (kGranule == 2) {
      copy_4(shared_address(to), from, in);
    } else {
      *to = in ? *from : from_float<T>(0.f);
    }
  }
}
template <typename T>
RF_DEVICE void load_patch(const StemParams& p, T* patch, const StemPlace& place, int thread,
                          int threads) {
  if (p.layout.granule == 8) {
    load_patch<T, 8>(p, patch, place, thread, threads);
  } else if (p.layout.granule == 2) {
    load_patch<T, 2>(p, patch, place, thread, threads);
  } else {
    load_patch<T, 1>(p, patch, place, thread, threads);
  }
  copies_commit();
}

template <typename T>
struct alignas(4) Pair {
  T v[2];
};

// [64][2 steps][8], zero where a segment reaches beyond its row of the window, in a last segment
// without its pair, and for channels that are not there. A lane keeps its two elements; of all its
// channels it asks before it stores the first, as a block begins with waiting for them.
template <typename T, int kWarps>
RF_DEVICE void load_weights(const StemParams& p, T* weights, int channel, int warp, int lane) {
  constexpr int kEach = kStemChannels / kWarps;
  static_assert(kEach * kWarps == kStemChannels, "warps have as many channels each");
  const Problem& q = p.problem;
  const StemLayout& l = p.layout;
  const int row = q.s * q.c, size = q.r * row;
  for (int word = lane; word < 8 * l.steps; word += 32) {
    const int segment = word / 4, r = segment / l.segments;
    const int e = (segment - r * l.segments) * 8 + word % 4 * 2 - l.lead;
    const bool low = r < q.r && e >= 0 && e < row, high = r < q.r && e + 1 < row;
    const T* const from = static_cast<const T*>(p.weight) + r * row + e;
    Pair<T> pairs[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = channel + warp + i * kWarps, at = k * size;
      const bool in = k < q.k;
      pairs[i].v[0] = in && low ? from[at] : from_float<T>(0.f);
      pairs[i].v[1] = in && high ? from[at + 1] : from_float<T>(0.f);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      *reinterpret_cast<Pair<T>*>(weights + (warp + i * kWarps) * l.weight_pitch + 2 * word) =
          pairs[i];
  }
}

}  // namespace resnet_fused::sm80
