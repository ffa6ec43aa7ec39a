// Products with a sparse matrix, forward and backward, on arrays [batch, features].
//
// A tile is a stretch of the batch, J vectors wide: the outputs of one line (row or column) of the
// matrix stay in J registers while the line's non-zeros pass by, each costing one broadcast and J
// fused multiply-adds with loads that are contiguous. What is gathered from lies tile by tile in
// memory, [features, tile width], transposed into a copy whose end is zero-filled. Outputs are
// transposed back block by block, while they are in a near cache: a compiler's transposes around the
// kernel, of whole arrays, would take several times as long.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
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
  int64_t capacity;        // length of indices
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

// Memory that is not initialized; null if there is not enough. Calls hand it on to later ones: to
// be given fresh pages by the operating system would take longer than what is done with them.
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
        try {
          spare.blocks.push_back({bytes_, data_});
          spare.bytes += bytes_;
          return;
        } catch (const std::bad_alloc&) {
          // A destructor must not throw: the memory is given back instead.
        }
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

// An array [batch, features] as tiles [tiles, features, tile width].
class Tiled {
 public:
  template <class Pool>
  Tiled(Pool& pool, const float* array, int64_t features, const Tiles& tiles)
      : step_(features * tiles.width()), copy_(tiles.count * step_) {
    if (!ok()) return;
    constexpr int64_t kColumns = 64;
    const int64_t pieces = (features + kColumns - 1) / kColumns;
    parallel_for(pool, tiles.count * pieces, [&, array](int64_t piece) {
      const int64_t tile = piece / pieces, begin = piece % pieces * kColumns;
      const int64_t end = std::min(features, begin + kColumns), width = tiles.width();
      transpose_block(array + tile * width * features + begin, features,
                      copy_.get() + tile * step_ + begin * width, width, tiles.used(tile),
                      end - begin, width);
    });
  }
  bool ok() const { return copy_.get() != nullptr; }
  const float* tile(int64_t tile) const { return copy_.get() + tile * step_; }

 private:
  int64_t step_;
  Memory copy_;
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

// sums[j] += sum of value * x[index] over the places of a line from `k` on, up to one whose index is
// not below a limit; returns which. The order of additions is the same whatever the batch.
template <int J>
PRIORITYPROP_INLINE int32_t gather_places(const int32_t* indices, const float* values,
                                          const float* x, int64_t k, int64_t end, int32_t limit,
                                          Vec* sums) {
  // As many independent sums as it takes to hide the latency of an addition.
  constexpr int kSets = J >= 6 ? 1 : J >= 3 ? 2 : 4;
  Vec partial[kSets][J] = {};
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) partial[0][j] = sums[j];
  auto add = [&](int64_t k, Vec* into) __attribute__((always_inline)) {
    const Vec value = broadcast(values[k]);
    const float* from = x + static_cast<int64_t>(indices[k]) * (J * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) into[j] += value * load(from + j * kLanes);
  };
  if (kSets > 1) {
    for (; k + kSets <= end && indices[k + kSets - 1] < limit; k += kSets) {
#pragma GCC unroll 4
      for (int set = 0; set < kSets; set++) add(k + set, partial[set]);
    }
  }
  for (; k < end && indices[k] < limit; k++) add(k, partial[0]);
#pragma GCC unroll 4
  for (int set = 1; set < kSets; set++) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) partial[0][j] += partial[set][j];
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) sums[j] = partial[0][j];
  return static_cast<int32_t>(k);
}

// The widest tile. The driver of the sanitizers builds fewer variants, in less time.
#ifndef PRIORITYPROP_VECTORS
#define PRIORITYPROP_VECTORS 8
#endif
constexpr int kForwardVectors = PRIORITYPROP_VECTORS;
// Backward keeps the inputs of a column beside the sums.
constexpr int kBackwardVectors = std::min(kRegisters == 32 ? 8 : 4, PRIORITYPROP_VECTORS);
// Lines that are worked on together: few enough that their indices, and their outputs, stay in the
// near caches until they are used.
constexpr int64_t kBlock = 128;

// The outputs of a block of lines, for one tile of the batch, until they go where they belong.
template <int J>
class Output {
 public:
  static constexpr int64_t kWidth = J * kLanes;

  // Of `array`, with so many lines in all.
  Output(float* array, int64_t lines, const Tiles& tiles, int64_t tile)
      : array_(array + tile * kWidth * lines), lines_(lines), used_(tiles.used(tile)) {}
  // Blocks are cut where they fill cache lines of the output.
  static int64_t block_end(int64_t begin, int64_t last) {
    return std::min(last, (begin / kBlock + 1) * kBlock);
  }
  PRIORITYPROP_INLINE float* line(int64_t line) { return block_ + line % kBlock * kWidth; }
  PRIORITYPROP_INLINE void put(int64_t at, const Vec* sums) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) store(line(at) + j * kLanes, sums[j]);
  }
  void block_done(int64_t begin, int64_t end) {
    transpose_block(line(begin), kWidth, array_ + begin, lines_, end - begin, used_, end - begin);
  }

 private:
  float* array_;
  int64_t lines_, used_;
  alignas(64) float block_[kBlock * kWidth];
};

// How many of the features that are gathered from to take at a time: as many as stay in the first
// cache, if lines have so many places among them that to take up their sums again is worth it.
// Narrower vectors ask no more of the second cache than it gives, nor does the backward sweep.
inline int64_t features_at_once(const Lines& lines, int64_t width) {
  if (kLanes < 16) return lines.across;
  constexpr int64_t kFloats = 8192, kPlaces = 10;
  const int64_t features = kFloats / width;
  const double places = 1.0 * lines.starts[lines.count] * features;
  return places >= 1.0 * kPlaces * lines.across * lines.count ? features : lines.across;
}

// y[line] = sum over the places of the line of value * x[index]: forward by rows, backward by
// columns.
template <class Pool>
const char* gather(Pool& pool, const Lines& lines, const float* values, const float* x, float* y,
                   int64_t batch) {
  const Tiles tiles(batch, kForwardVectors);
  const Tiled tiled(pool, x, lines.across, tiles);
  if (!tiled.ok()) return kNoMemory;
  const double operations = 1.0 * (lines.starts[lines.count] + lines.count) * tiles.vectors;
  const int64_t pieces = pieces_for(pool, operations);
  const int64_t features = std::max<int64_t>(1, features_at_once(lines, tiles.width()));
  std::atomic<bool> bad{false};
  with_constant<kForwardVectors>(tiles.vectors, [&](auto J) {
    parallel_for(pool, tiles.count * pieces, [&](int64_t task) {
      const int64_t tile = task / pieces, piece = task % pieces;
      const int64_t last = piece_begin(lines, piece + 1, pieces);
      const float* from = tiled.tile(tile);
      Output<J> output(y, lines.count, tiles, tile);
      int32_t next[kBlock];
      for (int64_t begin = piece_begin(lines, piece, pieces), end; begin < last; begin = end) {
        end = output.block_end(begin, last);
        if (!check_places(lines, begin, end)) {
          bad = true;
          return;
        }
        for (int64_t line = begin; line < end; line++) next[line - begin] = lines.starts[line];
        for (int64_t limit = features; ; limit += features) {
          // The last takes all that is left: indices may be wrong, and descend.
          const bool all = limit >= lines.across;
          const int32_t below = all ? INT32_MAX : static_cast<int32_t>(limit);
          for (int64_t line = begin; line < end; line++) {
            Vec sums[J];
            for (int j = 0; j < J; j++) {
              sums[j] = limit == features ? Vec{} : load(output.line(line) + j * kLanes);
            }
            int32_t& k = next[line - begin];
            k = gather_places<J>(lines.indices, values, from, k, lines.starts[line + 1], below,
                                 sums);
            output.put(line, sums);
          }
          if (all) break;
        }
        output.block_done(begin, end);
      }
    });
  });
  return bad ? kBadIndices : nullptr;
}

#if defined(__AVX512F__)
// The sums of kCount vectors, each over its lanes, of which f(i) gives number i; kCount of 16 stands
// for all. Halves are joined as soon as they are there, so that few are kept.
template <int kCount, class F>
PRIORITYPROP_INLINE Vec sum_lanes_of(F& f, int64_t i) {
  if constexpr (kCount == 1) {
    return f(i);
  } else {
    const __m512 a = (__m512)sum_lanes_of<kCount / 2>(f, i);
    const __m512 b = (__m512)sum_lanes_of<kCount / 2>(f, i + kCount / 2);
    if constexpr (kCount == 2) {
      return (Vec)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    } else if constexpr (kCount == 4) {
      return (Vec)_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    } else {
      return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88),
                                _mm512_shuffle_f32x4(a, b, 0xdd));
    }
  }
}
#endif

// One column of the backward pass, of which kInputs says whether dx is wanted too:
// dx = sum over places of value * dy[row], and at each place dvalue (+)= <dy[row], x>. Places stand
// one after the other in rows, values and dvalues.
template <int J, bool kInputs>
PRIORITYPROP_INLINE void backward_column(const int32_t* rows, const float* values, int64_t count,
                                         const float* x, const float* dy, float* dvalues,
                                         bool first, Vec* dx) {
  Vec inputs[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) {
    inputs[j] = load(x + j * kLanes);
    dx[j] = Vec{};
  }
  auto place = [&](int64_t k) __attribute__((always_inline)) {
    const float* from = dy + static_cast<int64_t>(rows[k]) * (J * kLanes);
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
  int64_t k = 0;
#if defined(__AVX512F__)
  // Cheaper than four at a time.
  for (; k + 16 <= count; k += 16) {
    Vec sums = sum_lanes_of<16>(place, k);
    if (!first) sums += load(dvalues + k);
    store(dvalues + k, sums);
  }
#endif
  for (; k + 4 <= count; k += 4) {
    const Vec a = place(k), b = place(k + 1), c = place(k + 2), d = place(k + 3);
    Quad sums = sum_lanes(a, b, c, d), before{};
    if (!first) std::memcpy(&before, dvalues + k, sizeof(before));
    sums += before;
    std::memcpy(dvalues + k, &sums, sizeof(sums));
  }
  for (; k < count; k++) dvalues[k] = sum_lanes(place(k)) + (first ? 0 : dvalues[k]);
}

// Whether it is safe to read what the columns of places, and their order, point to.
inline bool check_order(const Lines& lines, const int32_t* order, int64_t begin, int64_t end) {
  return check_places(lines, begin, end) &&
         all_below(order + lines.starts[begin], order + lines.starts[end],
                   lines.starts[lines.count]);
}

// Calls f with each k < count and array[where[k]]. The processor does not look far enough ahead to
// hide how long it takes to fetch them if the array, of so many places, is not near.
template <class T, class F>
PRIORITYPROP_INLINE void each_place(T* array, int64_t places, const int32_t* where, int64_t count,
                                    F&& f) {
  constexpr int64_t kAhead = 512, kNear = 1 << 18;
  int64_t k = 0;
  if (places > kNear) {
    for (; k < count - kAhead; k++) {
      __builtin_prefetch(array + where[k + kAhead]);
      f(k, array[where[k]]);
    }
  }
  for (; k < count; k++) f(k, array[where[k]]);
}

// Each piece owns some columns: their rows of dx, and their places of dvalues for all tiles.
//
// Values are brought in the order of columns before they are used, and their gradients back after:
// jumps through memory between the loads of a sweep would cost more than all the rest. This is done
// for a few columns at a time, whose places stay in the second cache in between; with several tiles
// for all columns, as one tile of dy has to stay there.
template <bool kInputs, class Pool>
const char* backward_columns(Pool& pool, const Lines& lines, const int32_t* order,
                             const float* values, const float* x, const float* dy, float* dx,
                             float* dvalues, int64_t batch) {
  const int64_t used = batch == 0 ? 0 : lines.starts[lines.count];
  std::memset(dvalues + used, 0, (lines.capacity - used) * 4);
  if (batch == 0) return nullptr;
  const Tiles tiles(batch, kBackwardVectors);
  const Tiled tiled(pool, dy, lines.across, tiles);
  const Tiled tiled_x(pool, x, lines.count, tiles);
  if (!tiled.ok() || !tiled_x.ok()) return kNoMemory;
  const double operations = 2.0 * (used + lines.count) * tiles.vectors * tiles.count;
  const int64_t pieces = pieces_for(pool, operations);
  std::atomic<const char*> error{nullptr};
  with_constant<kBackwardVectors>(tiles.vectors, [&](auto J) {
    parallel_for(pool, pieces, [&](int64_t piece) {
      const int64_t last = piece_begin(lines, piece + 1, pieces);
      for (int64_t begin = piece_begin(lines, piece, pieces), end; begin < last; begin = end) {
        end = tiles.count > 1 ? last : Output<J>::block_end(begin, last);
        if (!check_order(lines, order, begin, end)) {
          error = kBadIndices;
          return;
        }
        const int64_t first = lines.starts[begin], count = lines.starts[end] - first;
        const Memory ordered(2 * count);
        if (ordered.get() == nullptr) {
          error = kNoMemory;
          return;
        }
        float* from = ordered.get();
        float* to = from + count;
        const int32_t* where = order + first;
        if (kInputs) {
          each_place(values, used, where, count, [&](int64_t k, float value) { from[k] = value; });
        }
        for (int64_t tile = 0; tile < tiles.count; tile++) {
          Output<J> output(dx, lines.count, tiles, tile);
          for (int64_t column = begin; column < end; column++) {
            const int64_t k = lines.starts[column];
            Vec sums[J];
            backward_column<J, kInputs>(lines.indices + k, from + (k - first),
                                        lines.starts[column + 1] - k,
                                        tiled_x.tile(tile) + column * tiles.width(),
                                        tiled.tile(tile), to + (k - first), tile == 0, sums);
            if (kInputs) output.put(column, sums);
            if (kInputs && Output<J>::block_end(column, end) == column + 1) {
              output.block_done(std::max(begin, column / kBlock * kBlock), column + 1);
            }
          }
        }
        each_place(dvalues, used, where, count, [&](int64_t k, float& value) { value = to[k]; });
      }
    });
  });
  return error;
}

// y = x W^T, with x [batch, columns] and y [batch, rows]. Returns what is wrong, null if nothing is.
template <class Pool>
const char* linear_forward(Pool& pool, const Lines& by_row, const float* values, const float* x,
                           float* y, int64_t batch) {
  if (const char* error = check_starts(by_row)) return error;
  return gather(pool, by_row, values, x, y, batch);
}

// dx = dy W and dvalues = dy^T x at the places of W; null for what is not wanted. `order` says where
// the values of places by column stand.
template <class Pool>
const char* linear_backward(Pool& pool, const Lines& by_column, const int32_t* order,
                            const float* values, const float* x, const float* dy, float* dx,
                            float* dvalues, int64_t batch) {
  if (const char* error = check_starts(by_column)) return error;
  if (dvalues != nullptr) {
    return dx == nullptr ? backward_columns<false>(pool, by_column, order, values, x, dy, dx,
                                                   dvalues, batch)
                         : backward_columns<true>(pool, by_column, order, values, x, dy, dx,
                                                  dvalues, batch);
  }
  if (dx == nullptr) return nullptr;
  const int64_t used = by_column.starts[by_column.count];
  const Memory ordered(used);
  if (ordered.get() == nullptr) return kNoMemory;
  const int64_t pieces = pieces_for(pool, used / 4.0);
  std::atomic<bool> bad{false};
  parallel_for(pool, pieces, [&](int64_t piece) {
    const int64_t begin = used * piece / pieces, end = used * (piece + 1) / pieces;
    if (!all_below(order + begin, order + end, used)) {
      bad = true;
      return;
    }
    float* to = ordered.get() + begin;
    each_place(values, used, order + begin, end - begin,
               [&](int64_t k, float value) { to[k] = value; });
  });
  if (bad) return kBadIndices;
  return gather(pool, by_column, ordered.get(), dy, dx, batch);
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
