// Runs the sparse convolution on small random shapes, many calls at once on one pool, and compares
// with sums written out in double. test_sanitizers.py builds it with the sanitizers.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>

#include "conv.h"
#include "sanitize_pool.h"

using namespace priorityprop;

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

bool near(const Floats& got, const Doubles& want) {
  for (size_t i = 0; i < want.size(); i++) {
    if (!(std::abs(got[i] - want[i]) <= 1e-4 * (1 + std::abs(want[i])))) return false;
  }
  return true;
}

// A description of what went wrong, or nothing.
std::string run_case(Pool& pool, unsigned seed) {
  std::mt19937 random(seed);
  auto pick = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
  auto fill = [&](Floats& array) {
    for (float& x : array) x = pick(-100, 100) / 100.f;
  };
  ConvShape s{};
  s.batch = pick(0, 2 * kLanes + 1);
  s.groups = pick(1, 3);
  const int64_t ins = pick(1, 6), outs = s.groups * pick(1, 6);
  s.in_channels = s.groups * ins;
  s.out_channels = outs;
  for (int axis : {0, 1}) {
    s.size[axis] = pick(1, axis ? 20 : 9);
    s.kernel[axis] = pick(1, 4);
    s.strides[axis] = pick(1, 3);
    s.dilation[axis] = pick(1, 3);
    s.low[axis] = pick(-1, 3);
    const int64_t padded = s.size[axis] + s.low[axis] + pick(0, 2);
    const int64_t room = padded - (s.kernel[axis] - 1) * s.dilation[axis] - 1;
    s.output[axis] = room < 0 ? 0 : room / s.strides[axis] + 1;
  }
  const int64_t places = ins * s.kernel[0] * s.kernel[1];
  const int density = pick(0, 100);
  std::vector<int32_t> row_starts{0}, columns;
  for (int64_t row = 0; row < outs; row++) {
    for (int64_t c = 0; c < places; c++) {
      if (pick(1, 100) <= density) columns.push_back(c);
    }
    row_starts.push_back(columns.size());
  }
  const int64_t used = columns.size(), capacity = used + pick(1, 3);
  columns.resize(capacity, -7);
  Floats values(capacity), x(s.batch * s.size[0] * s.size[1] * s.in_channels);
  Floats dy(s.batch * s.output[0] * s.output[1] * outs);
  fill(values), fill(x), fill(dy);
  for (int64_t k = used; k < capacity; k++) values[k] = std::numeric_limits<float>::quiet_NaN();

  Doubles want_y(dy.size()), want_dx(x.size()), want_dv(capacity);
  for (int64_t row = 0; row < outs; row++) {
    for (int64_t k = row_starts[row]; k < row_starts[row + 1]; k++) {
      const int64_t j = columns[k] % s.kernel[1], i = columns[k] / s.kernel[1] % s.kernel[0];
      const int64_t c = row / (outs / s.groups) * ins + columns[k] / s.kernel[1] / s.kernel[0];
      for (int64_t b = 0; b < s.batch; b++) {
        for (int64_t p = 0; p < s.output[0]; p++) {
          for (int64_t q = 0; q < s.output[1]; q++) {
            const int64_t h = p * s.strides[0] + i * s.dilation[0] - s.low[0];
            const int64_t w = q * s.strides[1] + j * s.dilation[1] - s.low[1];
            if (h < 0 || h >= s.size[0] || w < 0 || w >= s.size[1]) continue;
            const int64_t from = ((b * s.size[0] + h) * s.size[1] + w) * s.in_channels + c;
            const int64_t to = ((b * s.output[0] + p) * s.output[1] + q) * outs + row;
            want_y[to] += double(values[k]) * x[from];
            want_dx[from] += double(values[k]) * dy[to];
            want_dv[k] += double(dy[to]) * x[from];
          }
        }
      }
    }
  }

  auto forward = [&](Floats& y) {
    return conv_forward(pool, s, x.data(), row_starts.data(), columns.data(), capacity,
                        values.data(), y.data());
  };
  auto backward = [&](float* dx, float* dv) {
    return conv_backward(pool, s, x.data(), dy.data(), row_starts.data(), columns.data(), capacity,
                         values.data(), dx, dv);
  };
  Floats y(dy.size(), 9), dx(x.size(), 9), dv(capacity, 9), dx_alone = dx, dv_alone = dv;
  if (forward(y) || backward(dx.data(), dv.data())) return "refused";
  if (backward(dx_alone.data(), nullptr) || backward(nullptr, dv_alone.data())) return "refused";
  if (backward(nullptr, nullptr)) return "refused to do nothing";
  if (!near(y, want_y)) return "y differs";
  if (!near(dx, want_dx) || !near(dx_alone, want_dx)) return "dx differs";
  if (!near(dv, want_dv) || !near(dv_alone, want_dv)) return "dvalues differ";

  // Index arrays that no mask gives are refused before they are followed.
  if (used > 0) {
    const int32_t column = columns[used / 2];
    for (int32_t bad : {-1, static_cast<int32_t>(places), std::numeric_limits<int32_t>::max()}) {
      columns[used / 2] = bad;
      if (!forward(y) || !backward(dx.data(), dv.data())) return "a column outside was followed";
    }
    columns[used / 2] = column;
  }
  const int64_t at = pick(0, outs);
  const int32_t start = row_starts[at];
  for (int32_t bad : {-1, static_cast<int32_t>(capacity + 1)}) {
    row_starts[at] = bad;
    if (!forward(y) || !backward(dx.data(), dv.data())) return "a start outside was followed";
  }
  row_starts[at] = start;
  return "";
}

bool without_memory(Pool& pool) {
  const ConvShape s{9, 2, 3, 1, {5, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {5, 5}};
  const std::vector<int32_t> row_starts{0, 2, 3, 4}, columns{0, 9, 4, 17};
  const Floats values(4, 2), x(9 * 25 * 2, 1), dy(9 * 25 * 3, 1);
  Floats y(dy.size()), dx(x.size()), dv(4);
  return survives_without_memory([&] {
    return conv_forward(pool, s, x.data(), row_starts.data(), columns.data(), 4, values.data(),
                        y.data());
  }) && survives_without_memory([&] {
    return conv_backward(pool, s, x.data(), dy.data(), row_starts.data(), columns.data(), 4,
                         values.data(), dx.data(), dv.data());
  });
}

}  // namespace

int main() {
  Pool pool(3);
  std::atomic<int> failures{0};
  if (!without_memory(pool)) {
    std::printf("no memory was not an error\n");
    failures++;
  }
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < 8; caller++) {
    callers.emplace_back([&, caller] {
      for (unsigned i = 0; i < 40; i++) {
        const std::string wrong = run_case(pool, 100 * caller + i);
        if (wrong.empty()) continue;
        std::printf("case %u: %s\n", 100 * caller + i, wrong.c_str());
        failures++;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  if (failures == 0) std::printf("all agree\n");
  return failures != 0;
}
