// What recurrent cells over time have in common, forward and backward.
//
// What enters the gates from the input, and the gradients of weights, are products over all steps
// at once, which XLA has. What is left are products with few rows, each waiting for the last: weights
// are packed once, stay in the caches of the threads whose columns they are, and each product goes
// through the gates while it is in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "vec.h"

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

// Rows of a product that fit into registers beside four vectors of columns.
constexpr int kStepRows = kRegisters == 32 ? 6 : 3;
// Columns, in vectors, of a product backward.
constexpr int kStepVectors = 4;
// Multiplications of a step that are worth another thread, which then waits for the others at its
// end.
constexpr int64_t kStepWork = 1 << 15;

// The first n floats, and zeros.
PRIORITYPROP_INLINE Vec load_some(const float* from, int64_t n) {
  if (n >= kLanes) return load(from);
  Vec value = {};
  std::memcpy(&value, from, n * sizeof(float));
  return value;
}

PRIORITYPROP_INLINE void store_some(float* to, Vec value, int64_t n) {
  if (n >= kLanes) {
    store(to, value);
  } else {
    std::memcpy(to, &value, n * sizeof(float));
  }
}

// Within bounds; NaN stays.
PRIORITYPROP_INLINE Vec clamp(Vec x, float low, float high) {
  const Vec lows = broadcast(low), highs = broadcast(high);
  x = x < lows ? lows : x;
  return x > highs ? highs : x;
}

// 1 / (1 + exp(-x)).
PRIORITYPROP_INLINE Vec sigmoid(Vec x) {
  const Vec z = clamp(-x, -87.0f, 88.0f);
  // What is added pushes all digits behind the point out: z = count * log(2) + r, |r| < log(2) / 2.
  const Vec shift = broadcast(12582912.0f);
  const Vec shifted = z * 1.44269504088896341f + shift, count = shifted - shift;
  const Vec r = (z - count * 0.693359375f) + count * 2.12194440e-4f;
  Vec y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.0f);
  const IntVec exponent = ((IntVec)shifted - (IntVec)shift + 127) << 23;
  return 1.0f / (1.0f + y * (Vec)exponent);
}

// A rational approximation, which keeps its relative precision around 0.
PRIORITYPROP_INLINE Vec tanh(Vec x) {
  x = clamp(x, -7.90531110763549805f, 7.90531110763549805f);
  const Vec s = x * x;
  Vec p = broadcast(-2.76076847742355e-16f);
  p = p * s + 2.00018790482477e-13f;
  p = p * s - 8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  Vec q = broadcast(1.19825839466702e-06f);
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x * p / q;
}

// sums[r][v] = the sum over k < depth of x[r, k] panel[k, v].
template <int R, int V>
PRIORITYPROP_INLINE void step_product(const float* x, int64_t stride, const float* panel,
                                      int64_t depth, Vec (&sums)[R][V]) {
  // Additions that do not wait for each other. As many for all V, which is a matter of threads, so
  // that results are not.
  constexpr int chains = R == 1 ? 2 : 1;
  Vec acc[chains][R][V] = {};
  auto add = [&](int64_t k, Vec(&to)[R][V]) __attribute__((always_inline)) {
    Vec factor[R];
    for (int r = 0; r < R; r++) factor[r] = broadcast(x[r * stride + k]);
    for (int v = 0; v < V; v++) {
      const Vec weight = load(panel + (k * V + v) * kLanes);
      for (int r = 0; r < R; r++) to[r][v] += factor[r] * weight;
    }
  };
  int64_t k = 0;
  for (; k + chains <= depth; k += chains) {
    for (int chain = 0; chain < chains; chain++) add(k + chain, acc[chain]);
  }
  for (; k < depth; k++) add(k, acc[0]);
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) {
      Vec sum = acc[0][r][v];
      for (int chain = 1; chain < chains; chain++) sum += acc[chain][r][v];
      sums[r][v] = sum;
    }
  }
}

// Calls fn(R, row) for blocks of R rows, about as high as each other.
template <int R, class F>
PRIORITYPROP_INLINE void rows_of(int64_t count, int64_t row, F&& fn) {
  if (count == R) {
    fn(std::integral_constant<int, R>(), row);
  } else if constexpr (R > 1) {
    rows_of<R - 1>(count, row, fn);
  }
}

template <class F>
PRIORITYPROP_INLINE void in_row_blocks(int64_t rows, F&& fn) {
  const int64_t blocks = (rows + kStepRows - 1) / kStepRows;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t row = rows * block / blocks;
    rows_of<kStepRows>(rows * (block + 1) / blocks - row, row, fn);
  }
}

template <int Gates>
struct RecurrentShape {
  static constexpr int kGates = Gates;
  int64_t steps, rows, width;

  int64_t wide() const { return Gates * width; }
  int64_t vectors() const { return (width + kLanes - 1) / kLanes; }
  int64_t entries() const { return rows * width; }  // of a state

  template <class Pool>
  int64_t parts(Pool& pool) const {
    const int64_t worth = wide() * entries() / kStepWork;
    return std::max<int64_t>(1, std::min({pool.num_threads(), vectors(), worth}));
  }
};

// Calls cell(step, row, j, n, y) for n columns from j on of each row, where y is what the state
// before, of hs or h0, [rows, width], makes of each gate by kernel, [width, Gates * width].
template <int Gates, class Pool, class Cell>
void forward_steps(Pool& pool, const RecurrentShape<Gates>& shape, const float* kernel,
                   const float* h0, const float* hs, Cell&& cell) {
  const int64_t width = shape.width, wide = shape.wide(), parts = shape.parts(pool);
  std::vector<float> packed(shape.vectors() * kLanes * wide);
  auto pack = [&](int64_t vector, float* to) {
    const int64_t j = vector * kLanes, n = std::min<int64_t>(kLanes, width - j);
    for (int64_t k = 0; k < width; k++) {
      for (int64_t gate = 0; gate < Gates; gate++, to += kLanes) {
        store(to, load_some(kernel + k * wide + gate * width + j, n));
      }
    }
  };
  parallel_steps(pool, shape.steps, parts, [&](int64_t step, int64_t part) {
    const float* h = step ? hs + (step - 1) * shape.entries() : h0;
    const int64_t last = shape.vectors() * (part + 1) / parts;
    for (int64_t vector = shape.vectors() * part / parts; vector < last; vector++) {
      float* panel = packed.data() + vector * kLanes * wide;
      if (step == 0) pack(vector, panel);
      const int64_t j = vector * kLanes, n = std::min<int64_t>(kLanes, width - j);
      in_row_blocks(shape.rows, [&](auto count, int64_t row) {
        constexpr int R = decltype(count)::value;
        Vec y[R][Gates];
        step_product<R, Gates>(h + row * width, width, panel, width, y);
        for (int r = 0; r < R; r++) cell(step, row + r, j, n, y[r]);
      });
    }
  });
}

// Calls cell(step, row, j, n, dh) from the last step to the first, where dh is the gradient of n
// columns from j on of a state: behind the last step that of dh, then what dgates,
// [steps, rows, Gates * width], which the cell writes, give through the kernel; in front of the
// first step it is -1.
template <int Gates, class Pool, class Cell>
void backward_steps(Pool& pool, const RecurrentShape<Gates>& shape, const float* kernel,
                    const float* dh, const float* dgates, Cell&& cell) {
  const int64_t width = shape.width, wide = shape.wide(), parts = shape.parts(pool);
  const int64_t rows = shape.rows, steps = shape.steps;
  std::vector<float> packed(shape.vectors() * kLanes * wide);

  // Some vectors of columns, at the turn behind which `done` steps are back through their gates.
  auto columns = [&](auto count, int64_t done, int64_t vector) {
    constexpr int V = decltype(count)::value;
    float* panel = packed.data() + vector * kLanes * wide;
    const int64_t step = steps - 1 - done;
    if (done == 0) {
      for (int64_t v = 0; v < V; v++) {
        const int64_t j = (vector + v) * kLanes, n = std::min<int64_t>(kLanes, width - j);
        transpose_block(kernel + j * wide, wide, panel + v * kLanes, V * kLanes, n, wide, kLanes);
        for (int64_t row = 0; row < rows; row++) {
          cell(step, row, j, n, load_some(dh + row * width + j, n));
        }
      }
      return;
    }
    const float* behind = dgates + (step + 1) * rows * wide;
    in_row_blocks(rows, [&](auto count, int64_t row) {
      constexpr int R = decltype(count)::value;
      Vec found[R][V];
      step_product<R, V>(behind + row * wide, wide, panel, wide, found);
      for (int r = 0; r < R; r++) {
        for (int v = 0; v < V; v++) {
          const int64_t j = (vector + v) * kLanes, n = std::min<int64_t>(kLanes, width - j);
          cell(step, row + r, j, n, found[r][v]);
        }
      }
    });
  };

  parallel_steps(pool, steps + 1, parts, [&](int64_t done, int64_t part) {
    int64_t vector = shape.vectors() * part / parts;
    const int64_t last = shape.vectors() * (part + 1) / parts;
    for (; vector < last; vector += kStepVectors) {
      const int64_t count = std::min<int64_t>(kStepVectors, last - vector);
      rows_of<kStepVectors>(count, vector, [&](auto count, int64_t vector) {
        columns(count, done, vector);
      });
    }
  });
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
