// Convolution with a sparse weight, and its gradients, in time proportional to the non-zeros.
//
// Both directions are one sweep. An output channel (forward) or an input channel (backward) is a
// sum over its non-zeros of a value times an image of the other side, shifted; positions of a row
// stay in registers while the non-zeros go by. The batch is innermost: a tile of kLanes images is
// packed block of positions by block of positions, with its padding, so that what a block reads
// and writes stays in the caches. In the backward pass the element of dy that goes into dx also
// goes, times x, into the gradient of the value.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.h"
#include "vec.h"

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

// Pairs are (height, width). Padding behind an axis follows from the size of the output.
struct ConvShape {
  int64_t batch, in_channels, out_channels, groups;
  int64_t size[2], kernel[2], strides[2], low[2], dilation[2], output[2];
};

// y = the convolution of x with the weight: [out_channels, in_channels / groups * kernel] by rows,
// its columns in the order (channel, height, width). x and y are NHWC. Null, or what is wrong.
template <class Pool>
const char* conv_forward(Pool& pool, const ConvShape& shape, const float* x,
                         const int32_t* row_starts, const int32_t* columns, int64_t capacity,
                         const float* values, float* y);

// Its gradients; either of dx and dvalues may be null. Places that are not used get 0.
template <class Pool>
const char* conv_backward(Pool& pool, const ConvShape& shape, const float* x, const float* dy,
                          const int32_t* row_starts, const int32_t* columns, int64_t capacity,
                          const float* values, float* dx, float* dvalues);

namespace conv {

// Positions whose sums stay in registers. Backward, their x does as well where there is room.
constexpr int kPositions = kRegisters >= 32 ? 14 : 12;
constexpr int64_t kOuts = 64;           // channels whose sums are worked on together
constexpr int64_t kInBytes = 256 << 10;  // of the packed images that these read together, at most
// As many as fit the first cache, as a strip reads about half of their rows; but more if an output
// had too few entries among them, since it takes up its sums again for each such group.
constexpr int64_t kNearBytes = 96 << 10;
constexpr int64_t kEntries = 14;
constexpr int64_t kPackChannels = 64;   // of a pixel, packed together
constexpr int64_t kFarBytes = 16 << 20;  // of outputs that the caches would not keep
constexpr int64_t kSlices = 8;          // parts of the batch with a gradient of their own

struct Buffer {
  float* data = nullptr;
  explicit Buffer(int64_t floats)
      : data(static_cast<float*>(::operator new(4 * std::max<int64_t>(floats, 1),
                                                std::align_val_t(64)))) {}
  Buffer(Buffer&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
};

// Large arrays may be new to the process. Their pages would then come one by one, 4 KB each, as
// they are written, which takes longer than what is computed here. Only whole huge pages are asked
// for: the neighbours of an array are left alone.
inline void want_huge_pages(float* array, int64_t floats) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(array) + kPage - 1) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(array + floats) / kPage * kPage;
  // Advice: whether it is taken does not matter.
  if (end >= begin + 4 * kPage) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)array, (void)floats;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_mod(int64_t a, int64_t b) { return ((a % b) + b) % b; }

// ---------------------------------------------------------------- which coordinates are packed

// The coordinates of one axis that are packed for a block of positions, from the block's first.
struct Axis {
  std::vector<int64_t> source;  // [packed]
  std::vector<int64_t> starts;  // [taps]: where among them a tap's run over the block starts
  int64_t length() const { return static_cast<int64_t>(source.size()); }
};

// Tap t reads first[t], first[t] + step, ...: runs that overlap share what they share.
inline Axis make_axis(const std::vector<int64_t>& first, int64_t step, int64_t block) {
  std::vector<int64_t> order(first.size());
  for (size_t t = 0; t < order.size(); t++) order[t] = t;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::make_pair(floor_mod(first[a], step), first[a]) <
           std::make_pair(floor_mod(first[b], step), first[b]);
  });
  Axis axis;
  axis.starts.resize(first.size());
  auto& source = axis.source;
  int64_t phase = -1, next = 0;
  for (int64_t t : order) {
    if (floor_mod(first[t], step) != phase || first[t] > next) next = first[t];
    phase = floor_mod(first[t], step);
    axis.starts[t] = axis.length() - (next - first[t]) / step;
    for (; next < first[t] + block * step; next += step) source.push_back(next);
  }
  return axis;
}

// One image side of a tile: what of it is packed for a block, as [channels, rows, columns, lanes].
struct Side {
  int64_t channels, size[2], origin_step[2];
  Axis rows, columns;
  int64_t row() const { return columns.length() * kLanes; }
  // An odd number of vectors: channels of a pixel do not all go to the same few sets of a cache.
  int64_t channel() const { return rows.length() * row() | kLanes; }
};

// Calls fn(pixel, later, at) for each: where it starts in an image and where the one after it does,
// -1 for padding, and where it goes in a packed channel.
template <class F>
void each_pixel(const Side& side, const int64_t* block, F&& fn) {
  const int64_t columns = side.columns.length();
  for (int64_t r = 0; r < side.rows.length(); r++) {
    const int64_t h = block[0] * side.origin_step[0] + side.rows.source[r];
    auto pixel = [&](int64_t c) -> int64_t {
      if (c == columns) return -1;
      const int64_t w = block[1] * side.origin_step[1] + side.columns.source[c];
      const bool inside = h >= 0 && h < side.size[0] && w >= 0 && w < side.size[1];
      return inside ? (h * side.size[1] + w) * side.channels : -1;
    };
    for (int64_t c = 0; c < columns; c++) fn(pixel(c), pixel(c + 1), r * side.row() + c * kLanes);
  }
}

inline void pack(const Side& side, const int64_t* block, const float* image, int64_t lanes,
                 int64_t first, int64_t last, float* packed) {
  constexpr int64_t kLine = 16;  // floats
  const int64_t stride = side.size[0] * side.size[1] * side.channels;
  for (int64_t c = first; c < last; c += kPackChannels) {
    const int64_t count = std::min(kPackChannels, last - c);
    float* to = packed + (c - first) * side.channel();
    each_pixel(side, block, [&](int64_t pixel, int64_t later, int64_t at) {
      // Images are more streams than the processor follows by itself.
      for (int64_t lane = 0; later >= 0 && lane < lanes; lane++) {
        const float* from = image + later + c + lane * stride;
        for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
      }
      if (pixel >= 0) {
        transpose_block(image + pixel + c, stride, to + at, side.channel(), lanes, count, kLanes);
      } else {
        for (int64_t i = 0; i < count; i++) store(to + at + i * side.channel(), Vec{});
      }
    });
  }
}

// `far`: whether to write past the caches, without reading first what is overwritten.
inline void unpack(const Side& side, const int64_t* block, const float* packed, int64_t lanes,
                   int64_t first, int64_t last, float* image, bool far) {
  const int64_t stride = side.size[0] * side.size[1] * side.channels, count = last - first;
#if defined(__AVX512F__)
  // Only whole lines.
  far &= lanes == kLanes && count <= kOuts && count % kLanes == 0 && side.channels % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(image + first) % sizeof(Vec) == 0;
#else
  far = false;
#endif
  each_pixel(side, block, [&](int64_t pixel, int64_t, int64_t at) {
    if (pixel < 0) return;
    float* to = image + pixel + first;
    if (!far) {
      transpose_block(packed + at, side.channel(), to, stride, count, lanes, count);
      return;
    }
#if defined(__AVX512F__)
    alignas(64) float lines[kLanes * kOuts];
    transpose_block(packed + at, side.channel(), lines, count, count, lanes, count);
    for (int64_t lane = 0; lane < lanes; lane++) {
      for (int64_t i = 0; i < count; i += kLanes) {
        _mm512_stream_ps(to + lane * stride + i, (__m512)load(lines + lane * count + i));
      }
    }
#endif
  });
#if defined(__AVX512F__)
  if (far) _mm_sfence();  // for what other threads are told next
#endif
}

// ---------------------------------------------------------------- the innermost loop

struct Entry {
  int32_t offset;  // of what the first position reads, in floats
  float value;
};

struct Strip {
  const float* in;
  int64_t in_row;
  const float* x;  // beside out, and in the same order
  float* out;
  int64_t out_row;
  float* sums;  // [entries, kLanes]
  bool fresh;   // whether out starts from 0 rather than from what it holds
  bool first;   // whether sums do
};

// For kRows x kColumns positions p and all entries k:
//   kOutputs: out[p] += value[k] in[offset[k] + p];  kWeights: sums[k] += in[offset[k] + p] x[p].
template <bool kOutputs, bool kWeights, int kRows, int kColumns>
void run_strip(const Strip& strip, const Entry* entries, int64_t count) {
  const Strip s = strip;  // which no store changes
  constexpr bool kHoldX = kRegisters >= 32;
  Vec out[kRows][kColumns], x[kRows][kColumns];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; c++) {
      const int64_t at = r * s.out_row + c * kLanes;
      if (kOutputs) out[r][c] = s.fresh ? Vec{} : load(s.out + at);
      if (kWeights && kHoldX) x[r][c] = load(s.x + at);
    }
  }
  for (int64_t k = 0; k < count; k++) {
    const float* in = s.in + entries[k].offset;
    const Vec value = broadcast(entries[k].value);
    Vec sum = {};
    if (kWeights && !s.first) sum = load(s.sums + k * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; c++) {
        const Vec read = load(in + r * s.in_row + c * kLanes);
        if (kOutputs) out[r][c] += value * read;
        if (kWeights && kHoldX) sum += read * x[r][c];
        if (kWeights && !kHoldX) sum += read * load(s.x + r * s.out_row + c * kLanes);
      }
    }
    if (kWeights) store(s.sums + k * kLanes, sum);
  }
  if (!kOutputs) return;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; c++) store(s.out + r * s.out_row + c * kLanes, out[r][c]);
  }
}

using RunStrip = void (*)(const Strip&, const Entry*, int64_t);
struct Runs {
  RunStrip many, one;  // kPositions / columns rows, and one row
};

template <bool kOutputs, bool kWeights, int... kColumn>
Runs pick_runs(int64_t columns, std::integer_sequence<int, kColumn...>) {
  static constexpr Runs runs[] = {
      {run_strip<kOutputs, kWeights, kPositions / (kColumn + 1), kColumn + 1>,
       run_strip<kOutputs, kWeights, 1, kColumn + 1>}...};
  return runs[columns - 1];
}

inline Runs pick_runs(bool outputs, bool weights, int64_t columns) {
  constexpr auto all = std::make_integer_sequence<int, kPositions>();
  if (outputs && weights) return pick_runs<true, true>(columns, all);
  return outputs ? pick_runs<true, false>(columns, all) : pick_runs<false, true>(columns, all);
}

// ---------------------------------------------------------------- the non-zeros, in order of use

// The positions that sums are for, in blocks of rows x columns, for every tile of the batch.
struct Blocks {
  int64_t size[2], block[2], counts[2], total;
};

inline Blocks make_blocks(int64_t batch, int64_t height, int64_t width, int64_t rows) {
  Blocks b{{height, width}, {}, {}, 0};
  b.block[1] = ceil_div(width, ceil_div(width, kPositions));
  b.block[0] = std::min(height, std::max(rows, kPositions / b.block[1]));
  for (int axis : {0, 1}) b.counts[axis] = ceil_div(b.size[axis], b.block[axis]);
  b.total = ceil_div(batch, kLanes) * b.counts[0] * b.counts[1];
  return b;
}

// What a column of the weight stands for.
struct Column {
  int64_t channel, offset, part;  // channel in its group; offset without the channel's
};

// Sums are for channels `outs` x `parts` (places that a stride sets apart), and read `ins`. Entries
// are in the order (block of outs, block of ins, out, part): the order in which they are used.
struct Lists {
  int64_t outs, ins, parts, in_block, out_block, in_blocks, out_blocks;
  std::vector<int32_t> starts;
  std::unique_ptr<Entry[]> entries;
  std::unique_ptr<int32_t[]> places;  // where an entry's value stands in the weight

  int64_t cell(int64_t out, int64_t in, int64_t part) const {
    const int64_t block = out / out_block * in_blocks + in / in_block;
    return (block * out_block + out % out_block) * parts + part;
  }
};

// Whether sums are for the rows of the weight or, by_rows false, for their columns' channels.
template <class Pool>
Lists make_lists(Pool& pool, const ConvShape& shape, bool by_rows, const std::vector<Column>& taps,
                 int64_t parts, const Side& in, int64_t out_floats, const int32_t* row_starts,
                 const int32_t* columns, const float* values, bool want_places) {
  Lists lists;
  lists.outs = by_rows ? shape.out_channels : shape.in_channels;
  lists.ins = by_rows ? shape.in_channels : shape.out_channels;
  lists.parts = parts;
  lists.out_block = std::clamp<int64_t>((kInBytes / 4) / out_floats, 1, kOuts);
  if (lists.out_block > kLanes) lists.out_block = lists.out_block / kLanes * kLanes;
  const int64_t used = row_starts[shape.out_channels];
  const int64_t all = lists.outs * (lists.ins / shape.groups) * parts;
  const int64_t enough =
      std::max((kNearBytes / 4) / in.channel(), used ? kEntries * all / used : 0);
  lists.in_block = std::clamp<int64_t>(std::min(enough, (kInBytes / 4) / in.channel()), 1,
                                       std::max<int64_t>(lists.ins, 1));
  lists.in_blocks = std::max<int64_t>(1, ceil_div(lists.ins, lists.in_block));
  lists.out_blocks = ceil_div(lists.outs, lists.out_block);
  const int64_t cells = lists.out_blocks * lists.in_blocks * lists.out_block * parts;
  lists.starts.assign(cells + 2, 0);
  lists.entries.reset(new Entry[used]);
  if (want_places) lists.places.reset(new int32_t[used]);

  // Rows of different ranges never share a cell: ranges are filled side by side.
  const int64_t range = by_rows ? lists.out_block : lists.in_block;
  const int64_t ins_of_group = shape.in_channels / shape.groups;
  const int64_t outs_of_group = shape.out_channels / shape.groups;
  int32_t* next = lists.starts.data() + 1;
  auto each = [&](auto&& fn) {
    parallel_for(pool, ceil_div(shape.out_channels, range), [&](int64_t i) {
      const int64_t last = std::min(shape.out_channels, (i + 1) * range);
      for (int64_t row = i * range; row < last; row++) {
        const int64_t group = row / outs_of_group * ins_of_group;
        for (int32_t k = row_starts[row]; k < row_starts[row + 1]; k++) {
          const Column& tap = taps[columns[k]];
          const int64_t channel = group + tap.channel;
          const int64_t out = by_rows ? row : channel, in_channel = by_rows ? channel : row;
          fn(k, lists.cell(out, in_channel, tap.part), in_channel * in.channel() + tap.offset);
        }
      }
    });
  };
  each([&](int32_t, int64_t cell, int64_t) { next[cell + 1]++; });
  for (int64_t cell = 0; cell < cells; cell++) next[cell + 1] += next[cell];
  // next[cell] runs from a cell's first entry to behind its last, where the next one starts.
  each([&](int32_t k, int64_t cell, int64_t offset) {
    const int32_t at = next[cell]++;
    lists.entries[at] = {static_cast<int32_t>(offset), values[k]};
    if (want_places) lists.places[at] = k;
  });
  return lists;
}

// ---------------------------------------------------------------- the sweep

struct Sweep {
  const ConvShape& shape;
  Blocks blocks;
  Side in, out;
  Lists lists;
  int64_t part_columns;  // parts along the width
  const float *in_image, *x;
  float *out_image, *sums;  // out_image may be null; so may be sums, and x with them

  struct Scratch {
    Buffer in, x, out, sums;
  };

  int64_t longest() const {
    int64_t longest = 0;
    const int64_t cells = lists.out_block * lists.parts;
    for (size_t i = 0; i + 2 < lists.starts.size(); i += cells) {
      longest = std::max<int64_t>(longest, lists.starts[i + cells] - lists.starts[i]);
    }
    return longest;
  }

  Scratch make_scratch(int64_t longest) const {
    const int64_t outs = lists.out_block * out.channel();
    return {Buffer(in.channels * in.channel()), Buffer(sums ? outs : 0),
            Buffer(out_image ? outs : 0), Buffer(sums ? longest * kLanes : 0)};
  }

  // One block of positions, for the blocks first <= i < last of outs.
  void run(int64_t index, int64_t first, int64_t last, float* sums, const Scratch& scratch) const {
    const int64_t per_tile = blocks.counts[0] * blocks.counts[1];
    const int64_t tile = index / per_tile * kLanes;
    const int64_t lanes = std::min<int64_t>(kLanes, shape.batch - tile);
    const int64_t at[2] = {index % per_tile / blocks.counts[1] * blocks.block[0],
                           index % blocks.counts[1] * blocks.block[1]};
    const int64_t rows = std::min(blocks.block[0], blocks.size[0] - at[0]);
    const int64_t columns = std::min(blocks.block[1], blocks.size[1] - at[1]);
    const int64_t many = kPositions / columns;
    const Runs runs = pick_runs(out_image != nullptr, sums != nullptr, columns);
    auto image = [&](auto* base, const Side& side) {
      return base + tile * side.size[0] * side.size[1] * side.channels;
    };

    // Only the groups that are worked on.
    const int64_t outs_of_group = lists.outs / shape.groups, ins_of_group = lists.ins / shape.groups;
    const int64_t last_out = std::min(lists.outs, last * lists.out_block);
    const int64_t in_first = first * lists.out_block / outs_of_group * ins_of_group;
    const int64_t in_last = ((last_out - 1) / outs_of_group + 1) * ins_of_group;
    pack(in, at, image(in_image, in), lanes, in_first, in_last,
         scratch.in.data + in_first * in.channel());

    for (int64_t ob = first; ob < last; ob++) {
      const int64_t out_first = ob * lists.out_block;
      const int64_t out_last = std::min(lists.outs, out_first + lists.out_block);
      if (sums) pack(out, at, image(x, out), lanes, out_first, out_last, scratch.x.data);
      bool fresh = true;
      for (int64_t ib = 0; ib < lists.in_blocks; ib++) {
        const int32_t* cell = lists.starts.data() +
                              (ob * lists.in_blocks + ib) * lists.out_block * lists.parts;
        const bool empty = cell[0] == cell[lists.out_block * lists.parts];
        // Sums of nothing are written all the same, once.
        if (empty && !(fresh && out_image && ib + 1 == lists.in_blocks)) continue;
        // Strip by strip, for what it reads to stay in the first cache.
        const int64_t cells = (out_last - out_first) * lists.parts;
        for (int64_t r = 0; r < rows;) {
          const bool whole = r + many <= rows;
          for (int64_t i = 0; i < cells; i++) {
            const int64_t count = cell[i + 1] - cell[i];
            if (count == 0 && !(fresh && out_image)) continue;
            const int64_t o = i / lists.parts, part = i % lists.parts;
            const int64_t place = o * out.channel() +
                                  (part / part_columns * blocks.block[0] + r) * out.row() +
                                  part % part_columns * blocks.block[1] * kLanes;
            const Strip strip{scratch.in.data + r * in.row(), in.row(), scratch.x.data + place,
                              scratch.out.data + place, out.row(),
                              scratch.sums.data + (cell[i] - cell[0]) * kLanes, fresh,
                              r == 0};
            (whole ? runs.many : runs.one)(strip, lists.entries.get() + cell[i], count);
          }
          r += whole ? many : 1;
        }
        if (sums) add_sums(scratch.sums.data, cell[cells] - cell[0], sums + cell[0]);
        fresh = false;
      }
      if (out_image) {
        const bool far = shape.batch * out.size[0] * out.size[1] * out.channels >= kFarBytes / 4;
        unpack(out, at, scratch.out.data, lanes, out_first, out_last, image(out_image, out), far);
      }
    }
  }

  static void add_sums(const float* from, int64_t count, float* to) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4, from += 4 * kLanes) {
      const Quad sum = sum_lanes(load(from), load(from + kLanes), load(from + 2 * kLanes),
                                 load(from + 3 * kLanes));
      for (int i = 0; i < 4; i++) to[k + i] += sum[i];
    }
    for (; k < count; k++, from += kLanes) to[k] += sum_lanes(load(from));
  }

  // Each job is a slice of the blocks of positions and a chunk of the blocks of outs. What sums
  // are added up in follows from the slices alone, so that threads do not change it.
  template <class Pool>
  void run_all(Pool& pool, int64_t slices) const {
    const int64_t threads = std::max<int64_t>(1, pool.num_threads());
    const int64_t chunks = std::min(lists.out_blocks, ceil_div(threads > 1 ? 4 * threads : 1, slices));
    const int64_t jobs = slices * chunks, workers = std::min(threads, jobs);
    const int64_t most = sums ? longest() : 0;
    std::vector<Scratch> scratch;
    for (int64_t i = 0; i < workers; i++) scratch.push_back(make_scratch(most));
    std::atomic<int64_t> next{0};
    const int64_t used = lists.starts[lists.starts.size() - 2];
    parallel_for(pool, workers, [&](int64_t worker) {
      for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < jobs;) {
        const int64_t slice = job / chunks, chunk = job % chunks;
        for (int64_t i = blocks.total * slice / slices; i < blocks.total * (slice + 1) / slices;
             i++) {
          run(i, lists.out_blocks * chunk / chunks, lists.out_blocks * (chunk + 1) / chunks,
              sums ? sums + slice * used : nullptr, scratch[worker]);
        }
      }
    });
  }
};

// ---------------------------------------------------------------- checks

inline const char* check(const ConvShape& shape, const int32_t* row_starts, const int32_t* columns,
                         int64_t capacity) {
  const char* wrong = "a sparse convolution got sizes that no convolution has";
  if (shape.batch < 0 || shape.in_channels < 0 || shape.out_channels < 0 || shape.groups < 1 ||
      shape.in_channels % shape.groups || shape.out_channels % shape.groups) {
    return wrong;
  }
  for (int axis : {0, 1}) {
    if (shape.size[axis] < 0 || shape.kernel[axis] < 1 || shape.strides[axis] < 1 ||
        shape.dilation[axis] < 1 || shape.output[axis] < 0) {
      return wrong;
    }
  }
  const char* bad = "row_starts of a sparse convolution must ascend from 0 to at most the capacity";
  if (row_starts[0] != 0 || row_starts[shape.out_channels] > capacity) return bad;
  for (int64_t row = 0; row < shape.out_channels; row++) {
    if (row_starts[row] > row_starts[row + 1]) return bad;
  }
  const int64_t limit = shape.in_channels / shape.groups * shape.kernel[0] * shape.kernel[1];
  bool inside = true;
  for (int32_t k = 0; k < row_starts[shape.out_channels]; k++) {
    inside &= columns[k] >= 0 && columns[k] < limit;
  }
  return inside ? nullptr : "columns of a sparse convolution lie outside of its weight";
}

inline Axis count_up(int64_t length) { return make_axis({0}, 1, length); }

// Offsets of entries are int32.
inline bool too_large(const Side& side) {
  return side.channels > 0 &&
         side.channel() > std::numeric_limits<int32_t>::max() / side.channels;
}
constexpr const char* kTooLarge = "a sparse convolution has too many channels x kernel places";
}  // namespace conv

template <class Pool>
const char* conv_forward(Pool& pool, const ConvShape& shape, const float* x,
                         const int32_t* row_starts, const int32_t* columns, int64_t capacity,
                         const float* values, float* y) {
  using namespace conv;
  if (const char* wrong = check(shape, row_starts, columns, capacity)) return wrong;
  if (!shape.batch || !shape.output[0] || !shape.output[1] || !shape.out_channels) return nullptr;
  want_huge_pages(y, shape.batch * shape.output[0] * shape.output[1] * shape.out_channels);
  const Blocks blocks = make_blocks(shape.batch, shape.output[0], shape.output[1], 4);

  Side in{shape.in_channels, {}, {}, {}, {}}, out{shape.out_channels, {}, {1, 1}, {}, {}};
  Axis axes[2];
  for (int axis : {0, 1}) {
    std::vector<int64_t> first(shape.kernel[axis]);
    for (int64_t t = 0; t < shape.kernel[axis]; t++) {
      first[t] = t * shape.dilation[axis] - shape.low[axis];
    }
    axes[axis] = make_axis(first, shape.strides[axis], blocks.block[axis]);
    in.size[axis] = shape.size[axis];
    in.origin_step[axis] = shape.strides[axis];
    out.size[axis] = shape.output[axis];
  }
  in.rows = axes[0], in.columns = axes[1];
  out.rows = count_up(blocks.block[0]), out.columns = count_up(blocks.block[1]);
  if (too_large(in)) return kTooLarge;

  std::vector<Column> taps;
  for (int64_t c = 0; c < shape.in_channels / shape.groups; c++) {
    for (int64_t i : in.rows.starts) {
      for (int64_t j : in.columns.starts) taps.push_back({c, i * in.row() + j * kLanes, 0});
    }
  }
  Lists lists = make_lists(pool, shape, true, taps, 1, in, out.channel(), row_starts, columns,
                           values, false);
  const Sweep sweep{shape, blocks, in, out, std::move(lists), 1, x, nullptr, y, nullptr};
  sweep.run_all(pool, blocks.total);
  return nullptr;
}

template <class Pool>
const char* conv_backward(Pool& pool, const ConvShape& shape, const float* x, const float* dy,
                          const int32_t* row_starts, const int32_t* columns, int64_t capacity,
                          const float* values, float* dx, float* dvalues) {
  using namespace conv;
  if (const char* wrong = check(shape, row_starts, columns, capacity)) return wrong;
  const int64_t image = shape.size[0] * shape.size[1] * shape.in_channels;
  const int64_t used = row_starts[shape.out_channels];
  const bool nothing = !shape.batch || !image || !shape.output[0] || !shape.output[1] || !used;

  // Positions h = part + stride * u, w alike: all with the same part read dy side by side.
  const int64_t units[2] = {ceil_div(shape.size[0], shape.strides[0]),
                            ceil_div(shape.size[1], shape.strides[1])};
  Blocks blocks{};
  Side in{shape.out_channels, {}, {1, 1}, {}, {}}, out{shape.in_channels, {}, {}, {}, {}};
  std::vector<int64_t> parts[2], part_of[2];
  if (!nothing) {
    blocks = make_blocks(shape.batch, units[0], units[1],
                         std::max<int64_t>(1, 4 / shape.strides[0]));
  }
  for (int axis : {0, 1}) {
    const int64_t stride = shape.strides[axis];
    std::vector<int64_t> first(shape.kernel[axis]);
    for (int64_t t = 0; t < shape.kernel[axis]; t++) {
      const int64_t shift = t * shape.dilation[axis] - shape.low[axis];
      const int64_t part = floor_mod(shift, stride);
      first[t] = (part - shift) / stride;
      auto found = std::find(parts[axis].begin(), parts[axis].end(), part);
      part_of[axis].push_back(found - parts[axis].begin());
      if (found == parts[axis].end()) parts[axis].push_back(part);
    }
    Axis positions;
    for (int64_t part : parts[axis]) {
      for (int64_t u = 0; u < blocks.block[axis]; u++) positions.source.push_back(part + stride * u);
    }
    (axis ? in.columns : in.rows) = make_axis(first, 1, blocks.block[axis]);
    (axis ? out.columns : out.rows) = positions;
    in.size[axis] = shape.output[axis];
    out.size[axis] = shape.size[axis];
    out.origin_step[axis] = stride;
  }
  const int64_t part_count = parts[0].size() * parts[1].size();
  if (dx) want_huge_pages(dx, shape.batch * image);
  // Places that no tap reaches have no part, and nothing below writes them.
  if (dx && (nothing || part_count < shape.strides[0] * shape.strides[1])) {
    auto written = [&](int axis, int64_t at) {
      const auto& all = parts[axis];
      return !nothing && std::find(all.begin(), all.end(), at % shape.strides[axis]) != all.end();
    };
    const int64_t pixel = shape.in_channels, row = shape.size[1] * pixel;
    parallel_for(pool, shape.batch, [&](int64_t b) {
      for (int64_t h = 0; h < shape.size[0]; h++) {
        float* to = dx + b * image + h * row;
        if (!written(0, h)) {
          std::memset(to, 0, sizeof(float) * row);
          continue;
        }
        for (int64_t w = 0; w < shape.size[1]; w++) {
          if (!written(1, w)) std::memset(to + w * pixel, 0, sizeof(float) * pixel);
        }
      }
    });
  }
  if (dvalues && nothing) std::memset(dvalues, 0, sizeof(float) * capacity);
  if (nothing || (!dx && !dvalues)) return nullptr;
  if (too_large(in)) return kTooLarge;

  std::vector<Column> taps;
  for (int64_t c = 0; c < shape.in_channels / shape.groups; c++) {
    for (int64_t i = 0; i < shape.kernel[0]; i++) {
      for (int64_t j = 0; j < shape.kernel[1]; j++) {
        taps.push_back({c, in.rows.starts[i] * in.row() + in.columns.starts[j] * kLanes,
                        part_of[0][i] * static_cast<int64_t>(parts[1].size()) + part_of[1][j]});
      }
    }
  }
  Lists lists = make_lists(pool, shape, false, taps, part_count, in, out.channel(), row_starts,
                           columns, values, dvalues != nullptr);
  const int64_t slices = dvalues ? std::min(blocks.total, kSlices) : blocks.total;
  Buffer sums(dvalues ? slices * used : 0);
  if (dvalues) std::memset(sums.data, 0, sizeof(float) * slices * used);
  const Sweep sweep{shape, blocks, in, out, std::move(lists),
                    static_cast<int64_t>(parts[1].size()), dy, x, dx,
                    dvalues ? sums.data : nullptr};
  sweep.run_all(pool, slices);
  if (dvalues) {
    for (int64_t k = 0; k < used; k++) {
      float sum = 0;
      for (int64_t slice = 0; slice < slices; slice++) sum += sums.data[slice * used + k];
      dvalues[sweep.lists.places[k]] = sum;
    }
    std::memset(dvalues + used, 0, sizeof(float) * (capacity - used));
  }
  return nullptr;
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
