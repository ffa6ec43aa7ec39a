// Runs the linear kernels on random shapes against sums in double, on a pool of threads of its own;
// test_sanitizers.py builds it with the sanitizers. Exits with 1 if a result is wrong.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <new>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "linear.h"
#include "sanitize_pool.h"

namespace {

void check_one(Pool& pool, std::mt19937& random, int outs, int ins, int batch, double density) {
  using priorityprop::Lines;
  std::vector<int32_t> row_starts{0}, columns, column_starts{0}, rows, order;
  std::vector<std::vector<std::pair<int, int>>> by_column(ins);
  for (int i = 0; i < outs; i++) {
    for (int j = 0; j < ins; j++) {
      if (std::uniform_real_distribution<>(0, 1)(random) < density) {
        by_column[j].push_back({i, static_cast<int>(columns.size())});
        columns.push_back(j);
      }
    }
    row_starts.push_back(columns.size());
  }
  for (auto& column : by_column) {
    for (auto [row, place] : column) rows.push_back(row), order.push_back(place);
    column_starts.push_back(rows.size());
  }
  const int used = columns.size(), capacity = used + batch % 3;
  columns.resize(capacity), rows.resize(capacity), order.resize(capacity);

  auto values = random_floats(random, capacity);
  for (int k = used; k < capacity; k++) values[k] = std::nanf("");
  const auto x = random_floats(random, ins * batch), dy = random_floats(random, outs * batch);
  std::vector<float> y(outs * batch, 9), dx(ins * batch, 9), dvalues(capacity, 9);
  std::vector<double> y_sums(y.size()), dx_sums(dx.size()), dvalue_sums(capacity);
  for (int i = 0; i < outs; i++) {
    for (int k = row_starts[i]; k < row_starts[i + 1]; k++) {
      for (int b = 0; b < batch; b++) {
        const float xb = x[b * ins + columns[k]], dyb = dy[b * outs + i];
        y_sums[b * outs + i] += double(values[k]) * xb;
        dx_sums[b * ins + columns[k]] += double(values[k]) * dyb;
        dvalue_sums[k] += double(dyb) * xb;
      }
    }
  }
  auto close = [](const std::vector<float>& a, const std::vector<double>& b) {
    bool good = true;
    for (size_t i = 0; i < a.size(); i++) good &= std::abs(a[i] - b[i]) < 1e-4;
    return good;
  };
  const Lines by_row{outs, ins, capacity, row_starts.data(), columns.data()};
  const Lines columns_of{ins, outs, capacity, column_starts.data(), rows.data()};
  auto forward = [&] {
    return linear_forward(pool, by_row, values.data(), x.data(), y.data(), batch);
  };
  auto backward = [&](float* dx, float* dvalues) {
    return linear_backward(pool, columns_of, order.data(), values.data(), x.data(), dy.data(), dx,
                           dvalues, batch);
  };

  expect(forward() == nullptr && close(y, y_sums), "y");
  expect(backward(dx.data(), dvalues.data()) == nullptr, "backward");
  expect(close(dx, dx_sums) && close(dvalues, dvalue_sums), "dx and dvalues");
  // However many threads there are, results are the same to the last bit.
  Pool alone(0);
  std::vector<float> y_alone(y), dx_alone(dx), dvalues_alone(dvalues);
  linear_forward(alone, by_row, values.data(), x.data(), y_alone.data(), batch);
  linear_backward(alone, columns_of, order.data(), values.data(), x.data(), dy.data(),
                  dx_alone.data(), dvalues_alone.data(), batch);
  expect(y == y_alone && dx == dx_alone && dvalues == dvalues_alone, "one thread");
  dx.assign(dx.size(), 9), dvalues.assign(capacity, 9);
  expect(backward(dx.data(), nullptr) == nullptr && close(dx, dx_sums), "dx alone");
  expect(backward(nullptr, dvalues.data()) == nullptr && close(dvalues, dvalue_sums),
         "dvalues alone");

  // Whatever is wrong with an index, nothing outside of the arrays is touched.
  if (used == 0 || batch == 0) return;
  auto refused = [&](std::vector<int32_t>& indices, int at, int32_t value, bool is_forward) {
    const int32_t was = std::exchange(indices[at], value);
    expect((is_forward ? forward() : backward(dx.data(), dvalues.data())) != nullptr, "an index");
    if (!is_forward && &indices != &order) {
      expect(backward(nullptr, dvalues.data()) != nullptr, "an index, dvalues alone");
    }
    indices[at] = was;
  };
  const int at = random() % used;
  refused(columns, at, ins, true), refused(columns, at, -1, true);
  refused(row_starts, outs, capacity + 1, true), refused(row_starts, 0, -1, true);
  refused(rows, at, outs, false), refused(rows, at, -1, false);
  refused(order, at, used, false), refused(order, at, -1, false);
  refused(column_starts, ins, capacity + 1, false);
}

// An exception of any thread reaches the caller, once all are done; no memory is an error, not an end.
void check_exceptions(Pool& pool) {
  for (int thrower : {0, 7, 99}) {
    std::atomic<int> done{0};
    const char* error = priorityprop::guarded([&]() -> const char* {
      priorityprop::parallel_for(pool, 100, [&](int64_t i) {
        done++;
        if (i == thrower) throw std::bad_alloc();
      });
      return nullptr;
    });
    expect(error == priorityprop::kNoMemory && done == 100, "an exception of a piece");
  }
  expect(priorityprop::guarded([]() -> const char* { throw std::runtime_error("x"); }) != nullptr,
         "any exception");

  const int count = 64, batch = 300;
  std::vector<int32_t> starts(count + 1), indices(count);
  for (int i = 0; i < count; i++) starts[i + 1] = i + 1, indices[i] = i;
  const std::vector<float> values(count, 2), x(count * batch, 3);
  std::vector<float> y(count * batch), dx(count * batch), dvalues(count);
  const priorityprop::Lines lines{count, count, count, starts.data(), indices.data()};
  for (bool forward : {true, false}) {
    auto run = [&] {
      return forward ? linear_forward(pool, lines, values.data(), x.data(), y.data(), batch)
                     : linear_backward(pool, lines, indices.data(), values.data(), x.data(),
                                       x.data(), dx.data(), dvalues.data(), batch);
    };
    expect(survives_without_memory(run) && (forward ? y : dx)[0] == 6, "without memory");
  }
}

void check_some(Pool& pool, int seed, int cases) {
  std::mt19937 random(seed);
  for (int i = 0; i < cases; i++) {
    const int outs = 1 + random() % 40, ins = 1 + random() % 40;
    const double densities[] = {0, 1.0 / (outs * ins), 0.05, 0.3, 1};
    check_one(pool, random, outs, ins, i % 38, densities[i % 5]);
  }
}

}  // namespace

int main() {
  Pool pool(3);
  check_exceptions(pool);
  check_some(pool, 0, 150);
  std::mt19937 random(1);
  // Larger: more than one tile of the batch, and work for several threads.
  check_one(pool, random, 150, 130, 270, 0.3);
  check_one(pool, random, 70, 600, 128, 0.5);

  std::vector<std::thread> callers;
  for (int i = 0; i < 8; i++) callers.emplace_back([&pool, i] { check_some(pool, 2 + i, 40); });
  for (auto& caller : callers) caller.join();
  return wrong > 0;
}
