// Vectors of floats as wide as the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// An instruction set has a namespace of its own: builds for several of them may share a process.
#if defined(__AVX512F__)
#define PRIORITYPROP_ISA avx512
#elif defined(__AVX2__)
#define PRIORITYPROP_ISA avx2
#else
#define PRIORITYPROP_ISA base
#endif

// Kernels live on their registers: what they call has to become part of them.
#define PRIORITYPROP_INLINE inline __attribute__((always_inline))

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

PRIORITYPROP_INLINE Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

PRIORITYPROP_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

PRIORITYPROP_INLINE Vec broadcast(float value) { return Vec{} + value; }

// The sums of four vectors, each over its lanes, in one go: cheaper than one after the other.
PRIORITYPROP_INLINE Quad sum_lanes(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  auto halve = [](Vec v) __attribute__((always_inline)) {
    __m512 whole = (__m512)v;
    return _mm256_add_ps(
        _mm512_castps512_ps256(whole),
        _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1)));
  };
  __m256 e = halve(a), f = halve(b), g = halve(c), h = halve(d);
#elif defined(__AVX2__)
  __m256 e = (__m256)a, f = (__m256)b, g = (__m256)c, h = (__m256)d;
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(e, f), _mm256_hadd_ps(g, h));
  return (Quad)_mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
#else
  Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

PRIORITYPROP_INLINE float sum_lanes(Vec value) {
  return sum_lanes(value, value, value, value)[0];
}

// Transposes kLanes rows of kLanes floats.
PRIORITYPROP_INLINE void transpose_square(const float* src, int64_t src_stride, float* dst,
                                          int64_t dst_stride) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
  }
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(dst + i * dst_stride, r[i]);
#elif defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(dst + (4 + i) * dst_stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
#else
  Vec a = load(src), b = load(src + src_stride);
  Vec c = load(src + 2 * src_stride), d = load(src + 3 * src_stride);
  Vec ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  store(dst, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store(dst + dst_stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store(dst + 2 * dst_stride, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store(dst + 3 * dst_stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
#endif
}

// dst[c, r] = src[r, c] for r < rows, and 0 for rows <= r < padded_rows; strides are of rows.
inline void transpose_block(const float* src, int64_t src_stride, float* dst, int64_t dst_stride,
                            int64_t rows, int64_t columns, int64_t padded_rows) {
  const int64_t full_rows = rows / kLanes * kLanes, full_columns = columns / kLanes * kLanes;
  for (int64_t c = 0; c < full_columns; c += kLanes) {
    for (int64_t r = 0; r < full_rows; r += kLanes) {
      transpose_square(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride);
    }
  }
  for (int64_t c = 0; c < columns; c++) {
    float* to = dst + c * dst_stride;
    int64_t r = c < full_columns ? full_rows : 0;
    for (; r < rows; r++) to[r] = src[r * src_stride + c];
    for (; r < padded_rows; r++) to[r] = 0;
  }
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
