// Products with a sparse matrix, forward and backward, on arrays whose innermost axis is the batch.
//
// A tile is a stretch of the batch, J vectors wide: the outputs of one line (row or column) of the
// matrix stay in J registers while the line's non-zeros pass by, each costing one broadcast and J
// fused multiply-adds with loads that are contiguous. What is gathered from lies tile by tile in
// memory, [features, tile width]: strided rows of a large batch would fall on few cache sets. The
// batch itself is such a tile where it is one tile wide; otherwise it is copied, its end zero-filled.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "pool.h"
#include "vec.h"

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

// One side of a `SparsePattern`: for each line its places, and what stands across at each.
struct Lines {
  int64_t count;           // of rows, or columns
  int64_t across;          // of columns, or rows: the bound of indices
  int64_t capacity;        // length of indices and order
  const int32_t* starts;   // [count + 1]
  const int32_t* indices;  // [capacity]
};

inline const char* check_starts(const Lines& lines) {
  bool bad = lines.starts[0] != 0 || lines.starts[lines.count] > lines.capacity;
  for (int64_t i = 0; i < lines.count; i++) bad |= lines.starts[i] > lines.starts[i + 1];
  return bad ? "row_starts and column_starts of a sparse pattern must ascend from 0 to at most its "
               "capacity"
             : nullptr;
}

constexpr const char* kNoMemory = "out of memory";
constexpr const char* kBadIndices =
    "columns, rows or order of a sparse pattern point outside of its shape";

inline bool all_below(const int32_t* begin, const int32_t* end, int64_t limit) {
  bool bad = false;
  for (; begin < end; begin++) {
    bad |= static_cast<uint32_t>(*begin) >= static_cast<uint32_t>(limit);
  }
  return !bad;
}

// Whether it is safe to read what the places of some lines point to.
inline bool check_places(const Lines& lines, int64_t begin, int64_t end) {
  return all_below(lines.indices + lines.starts[begin], lines.indices + lines.starts[end],
                   lines.across);
}

// Memory that is not initialized; null if there is not enough. Calls hand it on to later ones: to be
// given fresh pages by the operating system would take longer than what is done with them.
class Memory {
 public:
  explicit Memory(int64_t floats) {
    while (bytes_ < floats * 4) bytes_ *= 2;
    Spare& spare = the_spare();
    {
      std::lock_guard<std::mutex> lock(spare.mutex);
      for (auto& block : spare.blocks) {
        if (block.first != bytes_) continue;
        data_ = block.second;
        spare.bytes -= bytes_;
        block = spare.blocks.back();
        spare.blocks.pop_back();
        return;
      }
    }
    data_ = std::aligned_alloc(64, bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    Spare& spare = the_spare();
    {
      std::lock_guard<std::mutex> lock(spare.mutex);
      if (data_ != nullptr && spare.bytes + bytes_ <= kMostSpare) {
        spare.blocks.push_back({bytes_, data_});
        spare.bytes += bytes_;
        return;
      }
    }
    std::free(data_);
  }
  float* get() const { return static_cast<float*>(data_); }

 private:
  static constexpr int64_t kMostSpare = 128 << 20;
  struct Spare {
    std::mutex mutex;
    std::vector<std::pair<int64_t, void*>> blocks;
    int64_t bytes = 0;
  };
  // Never destroyed: a program may end while threads are still at work.
  static Spare& the_spare() {
    static Spare* spare = new Spare;
    return *spare;
  }

  int64_t bytes_ = 4096;
  void* data_ = nullptr;
};

// The batch cut into tiles of one width.
struct Tiles {
  int64_t batch, vectors, count;  // `vectors` a tile

  Tiles(int64_t batch, int64_t most) : batch(batch) {
    const int64_t all = (batch + kLanes - 1) / kLanes;
    count = (all + most - 1) / most;
    vectors = count == 0 ? 1 : (all + count - 1) / count;
    count = (all + vectors - 1) / vectors;
  }
  int64_t width() const { return vectors * kLanes; }
  int64_t used(int64_t tile) const { return std::min(width(), batch - tile * width()); }
};

// Calls f with a constant of the same value.
template <int kMost, class F>
void with_constant(int64_t value, F&& f) {
  if constexpr (kMost > 1) {
    if (value < kMost) return with_constant<kMost - 1>(value, f);
  }
  f(std::integral_constant<int, kMost>());
}

// An array [features, batch] as tiles [tiles, features, tile width].
class Tiled {
 public:
  template <class Pool>
  Tiled(Pool& pool, const float* array, int64_t features, const Tiles& tiles)
      : in_place_(tiles.count == 1 && tiles.batch == tiles.width()),
        step_(features * tiles.width()),
        copy_(in_place_ ? 0 : tiles.count * step_),
        data_(in_place_ ? array : copy_.get()) {
    if (in_place_ || !ok()) return;
    constexpr int64_t kRows = 64;
    const int64_t pieces = (features + kRows - 1) / kRows;
    parallel_for(pool, tiles.count * pieces, [&, array](int64_t piece) {
      const int64_t tile = piece / pieces, begin = piece % pieces * kRows;
      const int64_t used = tiles.used(tile), width = tiles.width();
      const float* from = array + tile * width;
      float* to = copy_.get() + tile * step_;
      for (int64_t i = begin; i < std::min(features, begin + kRows); i++) {
        std::memcpy(to + i * width, from + i * tiles.batch, used * 4);
        std::memset(to + i * width + used, 0, (width - used) * 4);
      }
    });
  }
  bool ok() const { return copy_.get() != nullptr; }
  const float* tile(int64_t tile) const { return data_ + tile * step_; }

 private:
  bool in_place_;
  int64_t step_;
  Memory copy_;
  const float* data_;
};

// How many pieces to cut work into that takes so many vector operations: a piece should be worth
// the microseconds of starting a thread, and there should be some to spare for threads that are
// slow.
template <class Pool>
int64_t pieces_for(Pool& pool, double operations) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (threads == 1) return 1;
  return std::max<int64_t>(1, std::min<double>(4.0 * threads, operations / 16384));
}

// The first line of a piece, when lines are split evenly by their places.
inline int64_t piece_begin(const Lines& lines, int64_t piece, int64_t pieces) {
  if (piece == pieces) return lines.count;
  const int64_t used = lines.starts[lines.count];
  return std::lower_bound(lines.starts, lines.starts + lines.count, used * piece / pieces) -
         lines.starts;
}

template <int J>
PRIORITYPROP_INLINE void store_tile(float* to, const Vec* from, int64_t used) {
  if (used == J * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) store(to + j * kLanes, from[j]);
  } else {
    float whole[J * kLanes];
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) store(whole + j * kLanes, from[j]);
    std::memcpy(to, whole, used * 4);
  }
}

// sums[j] = sum over the places of a line of value * x[index], in this order whatever the batch.
template <int J>
PRIORITYPROP_INLINE void gather_line(const Lines& lines, int64_t line, const float* values,
                                     const float* x, Vec* sums) {
  // As many independent sums as it takes to hide the latency of an addition.
  constexpr int kSets = J >= 6 ? 1 : J >= 3 ? 2 : 4;
  Vec partial[kSets][J] = {};
  int64_t k = lines.starts[line];
  const int64_t end = lines.starts[line + 1];
  auto add = [&](int64_t k, Vec* into) __attribute__((always_inline)) {
    const Vec value = broadcast(values[k]);
    const float* from = x + static_cast<int64_t>(lines.indices[k]) * (J * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) into[j] += value * load(from + j * kLanes);
  };
  for (; k + kSets <= end; k += kSets) {
#pragma GCC unroll 4
    for (int set = 0; set < kSets; set++) add(k + set, partial[set]);
  }
  for (; k < end; k++) add(k, partial[0]);
#pragma GCC unroll 4
  for (int set = 1; set < kSets; set++) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) partial[0][j] += partial[set][j];
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) sums[j] = partial[0][j];
}

// The widest tile. The driver of the sanitizers builds fewer variants, in less time.
#ifndef PRIORITYPROP_VECTORS
#define PRIORITYPROP_VECTORS 8
#endif
constexpr int kForwardVectors = PRIORITYPROP_VECTORS;
// Backward keeps the inputs of a column beside the sums.
constexpr int kBackwardVectors = std::min(kRegisters == 32 ? 8 : 4, PRIORITYPROP_VECTORS);
// Lines whose indices are checked at once: few enough to stay in the first cache until they are used.
constexpr int64_t kBlock = 16;

// y[line] = sum over the places of the line of value * x[index]: forward by rows, backward by columns.
template <class Pool>
const char* gather(Pool& pool, const Lines& lines, const float* values, const float* x, float* y,
                   int64_t batch) {
  const Tiles tiles(batch, kForwardVectors);
  const Tiled tiled(pool, x, lines.across, tiles);
  if (!tiled.ok()) return kNoMemory;
  const double operations = 1.0 * (lines.starts[lines.count] + lines.count) * tiles.vectors;
  const int64_t pieces = pieces_for(pool, operations);
  std::atomic<bool> bad{false};
  with_constant<kForwardVectors>(tiles.vectors, [&](auto J) {
    parallel_for(pool, tiles.count * pieces, [&](int64_t task) {
      const int64_t tile = task / pieces, piece = task % pieces;
      const int64_t last = piece_begin(lines, piece + 1, pieces);
      const float* from = tiled.tile(tile);
      for (int64_t begin = piece_begin(lines, piece, pieces); begin < last; begin += kBlock) {
        const int64_t end = std::min(last, begin + kBlock);
        if (!check_places(lines, begin, end)) {
          bad = true;
          return;
        }
        for (int64_t line = begin; line < end; line++) {
          Vec sums[J];
          gather_line<J>(lines, line, values, from, sums);
          store_tile<J>(y + line * batch + tile * tiles.width(), sums, tiles.used(tile));
        }
      }
    });
  });
  return bad ? kBadIndices : nullptr;
}

// One column of the backward pass, of which kInputs says whether dx is wanted too:
// dx = sum over places of value * dy[row], and at each place dvalue (+)= <dy[row], x>, by column.
template <int J, bool kInputs>
PRIORITYPROP_INLINE void backward_column(const Lines& lines, int64_t column, const float* values,
                                         const float* x, const float* dy, float* dvalues,
                                         bool first, Vec* dx) {
  Vec inputs[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
    inputs[j] = load(x + j * kLanes);
    dx[j] = Vec{};
  }
  int64_t k = lines.starts[column];
  const int64_t end = lines.starts[column + 1];
  auto place = [&](int64_t k) __attribute__((always_inline)) {
    const float* from = dy + static_cast<int64_t>(lines.indices[k]) * (J * kLanes);
    const Vec value = kInputs ? broadcast(values[k]) : Vec{};
    Vec sum{};
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      const Vec gradient = load(from + j * kLanes);
      if (kInputs) dx[j] += value * gradient;
      sum += gradient * inputs[j];
    }
    return sum;
  };
  for (; k + 4 <= end; k += 4) {
    const Vec a = place(k), b = place(k + 1), c = place(k + 2), d = place(k + 3);
    Quad sums = sum_lanes(a, b, c, d), before{};
    if (!first) std::memcpy(&before, dvalues + k, sizeof(before));
    sums += before;
    std::memcpy(dvalues + k, &sums, sizeof(sums));
  }
  for (; k < end; k++) dvalues[k] = sum_lanes(place(k)) + (first ? 0 : dvalues[k]);
}

// Each piece owns some columns: their rows of dx, and their places of dvalues for all tiles.
template <bool kInputs, class Pool>
const char* backward_columns(Pool& pool, const Lines& lines, const float* values, const float* x,
                             const float* dy, float* dx, const int32_t* order, float* dvalues,
                             int64_t batch) {
  const Tiles tiles(batch, kBackwardVectors);
  const Tiled tiled(pool, dy, lines.across, tiles), tiled_x(pool, x, lines.count, tiles);
  const int64_t used = lines.starts[lines.count];
  const Memory by_column(used);
  if (!tiled.ok() || !tiled_x.ok() || !by_column.get()) return kNoMemory;
  const int64_t without = batch == 0 ? 0 : used;
  std::memset(dvalues + without, 0, (lines.capacity - without) * 4);
  if (batch == 0) return nullptr;
  const double operations = 2.0 * (used + lines.count) * tiles.vectors * tiles.count;
  const int64_t pieces = pieces_for(pool, operations);
  with_constant<kBackwardVectors>(tiles.vectors, [&](auto J) {
    parallel_for(pool, pieces, [&](int64_t piece) {
      const int64_t begin = piece_begin(lines, piece, pieces);
      const int64_t end = piece_begin(lines, piece + 1, pieces);
      float* sums_of_places = by_column.get();
      for (int64_t tile = 0; tile < tiles.count; tile++) {
        for (int64_t column = begin; column < end; column++) {
          Vec sums[J];
          backward_column<J, kInputs>(lines, column, values,
                                      tiled_x.tile(tile) + column * tiles.width(),
                                      tiled.tile(tile), sums_of_places, tile == 0, sums);
          if (kInputs) {
            store_tile<J>(dx + column * batch + tile * tiles.width(), sums, tiles.used(tile));
          }
        }
      }
      for (int64_t k = lines.starts[begin]; k < lines.starts[end]; k++) {
        dvalues[order[k]] = sums_of_places[k];
      }
    });
  });
  return nullptr;
}

// y = W x, with x [columns, batch] and y [rows, batch]. Returns what is wrong, null if nothing is.
template <class Pool>
const char* linear_forward(Pool& pool, const Lines& by_row, const float* values, const float* x,
                           float* y, int64_t batch) {
  if (const char* error = check_starts(by_row)) return error;
  return gather(pool, by_row, values, x, y, batch);
}

// dx = W^T dy and dvalues = dy x^T at the places of W; null for what is not wanted. `order` says
// where the values of places by column stand.
template <class Pool>
const char* linear_backward(Pool& pool, const Lines& by_column, const int32_t* order,
                            const float* values, const float* x, const float* dy, float* dx,
                            float* dvalues, int64_t batch) {
  if (const char* error = check_starts(by_column)) return error;
  // Values are brought in order first, and their gradients last: jumps through memory between the
  // loads of a sweep would cost more than all the rest.
  const int64_t used = by_column.starts[by_column.count];
  const Memory copy(dx == nullptr ? 0 : used);
  if (!copy.get()) return kNoMemory;
  const int64_t pieces = pieces_for(pool, used / 4.0);
  std::atomic<bool> bad{false};
  parallel_for(pool, pieces, [&](int64_t piece) {
    const int64_t begin = used * piece / pieces, end = used * (piece + 1) / pieces;
    if (!all_below(order + begin, order + end, used) ||
        !all_below(by_column.indices + begin, by_column.indices + end, by_column.across)) {
      bad = true;
    } else if (dx != nullptr) {
      for (int64_t k = begin; k < end; k++) copy.get()[k] = values[order[k]];
    }
  });
  if (bad) return kBadIndices;

  if (dvalues == nullptr) {
    return dx == nullptr ? nullptr : gather(pool, by_column, copy.get(), dy, dx, batch);
  }
  return dx == nullptr ? backward_columns<false>(pool, by_column, copy.get(), x, dy, dx, order,
                                                 dvalues, batch)
                       : backward_columns<true>(pool, by_column, copy.get(), x, dy, dx, order,
                                                dvalues, batch);
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
