// Has any processor with AVX2 run what the kernels do with AVX-512: included in front of them, it
// says that there is AVX-512, and puts its instructions together from smaller ones.
#pragma once

#include <immintrin.h>

#define __AVX512F__ 1

namespace emulated {

template <class F>
__m512 each(F f) {
  __m512 made{};
  for (int i = 0; i < 16; i++) made[i] = f(i);
  return made;
}
inline __m512 loadu(const void* from) {
  __m512 a;
  __builtin_memcpy(&a, from, sizeof(a));
  return a;
}
inline void storeu(void* to, const __m512& a) { __builtin_memcpy(to, &a, sizeof(a)); }
inline __m512 add(const __m512& a, const __m512& b) { return a + b; }
inline __m512 unpack(const __m512& a, const __m512& b, int high) {
  return each([&](int i) {
    const int from = i / 4 * 4 + 2 * high + i % 4 / 2;
    return i % 2 ? b[from] : a[from];
  });
}
// Of each four elements, or of the four fours, two come from `a` and two from `b`.
inline __m512 shuffle(const __m512& a, const __m512& b, int which) {
  return each([&](int i) {
    const int from = i / 4 * 4 + (which >> i % 4 * 2 & 3);
    return i % 4 < 2 ? a[from] : b[from];
  });
}
inline __m512 shuffle_fours(const __m512& a, const __m512& b, int which) {
  return each([&](int i) {
    const int from = (which >> i / 4 * 2 & 3) * 4 + i % 4;
    return i < 8 ? a[from] : b[from];
  });
}
inline __m256 half(const __m512& a, int which) {
  __m256 made{};
  for (int i = 0; i < 8; i++) made[i] = a[8 * which + i];
  return made;
}

}  // namespace emulated

#undef _mm512_shuffle_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_extractf64x4_pd
#define _mm512_loadu_ps emulated::loadu
#define _mm512_storeu_ps emulated::storeu
#define _mm512_stream_ps emulated::storeu
#define _mm512_add_ps emulated::add
#define _mm512_unpacklo_ps(a, b) emulated::unpack(a, b, 0)
#define _mm512_unpackhi_ps(a, b) emulated::unpack(a, b, 1)
#define _mm512_shuffle_ps emulated::shuffle
#define _mm512_shuffle_f32x4 emulated::shuffle_fours
#define _mm512_castps512_ps256(a) emulated::half(a, 0)
#define _mm512_castps_pd(a) (a)
#define _mm512_extractf64x4_pd(a, which) ((__m256d)emulated::half(a, which))
