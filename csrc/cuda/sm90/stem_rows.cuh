// From global memory to the operands of wgmma: the weights once a block, rows of the image as the
// bands go down. A warp fetches every fourth row and expands it itself, so that between the two
// there is no barrier.
#pragma once

#include "cuda/sm80/ptx.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/stem.h"

namespace resnet_fused::sm90 {

struct alignas(16) Words4 {
  uint32_t v[4];
};

// Rows of the image that are expanded at a time, and the first pixel of them that is needed. Both
// may be outside of the image.
struct StemRows {
  int image, row, count, pixel;
};
// What a pooled row adds to those before it in the band.
RF_DEVICE StemRows stem_rows(const StemParams& p, const StemBand& band, int row) {
  const StemProblem& q = p.problem;
  const int end = (2 * row + 1) * q.stride_h - q.pad_h + q.r;
  const int first = row > 0 ? 2 * row - 1 : 0;  // row of the convolution
  const int begin = row == band.row ? first * q.stride_h - q.pad_h : end - 2 * q.stride_h;
  return {band.image, begin, end - begin, 4 * band.pair - q.pad_w};
}

// Where in x a row's needed pixels begin, in bytes, and how many there are.
struct StemSpan {
  int64_t begin;
  int first, pixels;  // first: counted from that of StemRows
};
RF_DEVICE StemSpan stem_span(const StemParams& p, const StemRows& rows, int row) {
  const StemProblem& q = p.problem;
  const int first = rows.pixel < 0 ? 0 : rows.pixel;
  const int end = rows.pixel + 2 * p.layout.positions;
  const bool in = row >= 0 && row < q.h;
  const int pixels = in ? (end < q.w ? end : q.w) - first : 0;
  const int64_t line = int64_t(rows.image) * q.h + row;
  return {2 * (line * q.w + first) * q.c, first - rows.pixel, pixels};
}

// As they are, from the multiple of 16 bytes before them. One group of copies.
RF_DEVICE void fetch_rows(const StemParams& p, uint8_t* raw, const StemRows& rows, int warp,
                          int lane) {
  const StemProblem& q = p.problem;
  const int64_t size = int64_t(2) * q.n * q.h * q.w * q.c;
  for (int i = warp; i < rows.count; i += 4) {
    const StemSpan span = stem_span(p, rows, rows.row + i);
    const int64_t begin = span.begin & ~int64_t(15);
    const int64_t end = span.begin + 2 * span.pixels * q.c;
    const uint8_t* const from = static_cast<const uint8_t*>(p.x) + begin;
    uint8_t* const to = raw + i * p.layout.raw_pitch;
    if (span.pixels <= 0) continue;
    for (int at = 16 * lane; begin + at < end; at += 16 * 32) {
      const int64_t left = size - begin - at;
      sm80::copy_part_of_16(sm80::shared_address(to + at), from + at, left < 16 ? int(left) : 16);
    }
  }
  sm80::copies_commit();
}

// Four channels a pixel, to the ring from its row `slot` on. Whether something is not finite: an
// exponent of ones becomes a carry.
template <typename T>
RF_DEVICE bool expand_rows(const StemParams& p, const uint8_t* raw, uint8_t* ring,
                           const StemRows& rows, int slot, int warp, int lane) {
  const StemProblem& q = p.problem;
  const StemLayout& l = p.layout;
  uint32_t carries = 0;
  for (int i = warp; i < rows.count; i += 4) {
    const StemSpan span = stem_span(p, rows, rows.row + i);
    const uint16_t* const from =
        reinterpret_cast<const uint16_t*>(raw + i * l.raw_pitch + (span.begin & 15));
    const int to_slot = slot + i < l.ring_rows ? slot + i : slot + i - l.ring_rows;
    uint8_t* const to = ring + to_slot * l.ring_pitch;
    for (int at = lane; at < l.positions; at += 32) {
      uint32_t v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int pixel = 2 * at + e / 4 - span.first, channel = e % 4;
        const bool in = pixel >= 0 && pixel < span.pixels && channel < q.c;
        v[e] = in ? from[pixel * q.c + channel] : 0;
      }
      Words4 words;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        words.v[e] = v[2 * e] | v[2 * e + 1] << 16;
        carries |= (words.v[e] & 0x7fff7fffu) + sm80::smallest_exponents(T());
      }
      *reinterpret_cast<Words4*>(to + 16 * at) = words;
    }
  }
  return carries & 0x80008000u;
}

// This block's channels as they are in memory. One group of copies.
RF_DEVICE void fetch_weights(const StemParams& p, uint8_t* staged, int channel, int thread) {
  const StemProblem& q = p.problem;
  const int channels = q.k - channel < kStemChannels ? q.k - channel : kStemChannels;
  const int size = q.r * q.s * q.c;  // of a channel; channels come in multiples of 8
  const uint8_t* const from = static_cast<const uint8_t*>(p.weight) + int64_t(2) * channel * size;
  for (int at = 16 * thread; at < 2 * channels * size; at += 16 * kStemThreads)
    sm80::copy_16(sm80::shared_address(staged + at), from + at, true);
  sm80::copies_commit();
}
// [r][chunks][64][2 taps][4 channels], zeros for what is not there.
RF_DEVICE void expand_weights(const StemParams& p, const uint8_t* staged, uint8_t* weights,
                              int channel, int thread) {
  const StemProblem& q = p.problem;
  const int chunks = p.layout.chunks, k = thread % kStemChannels;
  const uint16_t* const from = reinterpret_cast<const uint16_t*>(staged) + k * q.r * q.s * q.c;
#pragma unroll 4
  for (int i = thread / kStemChannels; i < q.r * chunks; i += kStemThreads / kStemChannels) {
    const int r = i / chunks, tap = 2 * (i - r * chunks);
    uint32_t v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int s = tap + e / 4, c = e % 4;
      const bool in = channel + k < q.k && s < q.s && c < q.c;
      v[e] = in ? from[(r * q.s + s) * q.c + c] : 0;
    }
    Words4 words;
#pragma unroll
    for (int e = 0; e < 4; ++e) words.v[e] = v[2 * e] | v[2 * e + 1] << 16;
    *reinterpret_cast<Words4*>(weights + 16 * (i * kStemChannels + k)) = words;
  }
}

}  // namespace resnet_fused::sm90
