// Runs the recurrence of LSTM and GRU on random shapes against one in double, on a pool of threads
// of its own; test_sanitizers.py builds it with the sanitizers. Exits with 1 if a result is wrong.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "gru.h"
#include "lstm.h"
#include "sanitize_pool.h"

namespace {

bool close(const std::vector<float>& a, const std::vector<double>& b) {
  bool good = a.size() == b.size();
  for (size_t i = 0; i < a.size(); i++) good &= std::abs(a[i] - b[i]) < 1e-4 * (1 + std::abs(b[i]));
  return good;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

void check_lstm(Pool& pool, std::mt19937& random, int64_t steps, int64_t rows, int64_t width) {
  const int64_t wide = 4 * width, one = rows * width, every = steps * one;
  const Floats inputs = random_floats(random, 4 * every), bias = random_floats(random, wide);
  Floats kernel = random_floats(random, width * wide);
  for (float& weight : kernel) weight /= std::sqrt(float(width));
  const Floats c0 = random_floats(random, one), h0 = random_floats(random, one);
  const Floats dcs = random_floats(random, every), dhs = random_floats(random, every);
  const Floats dc_last = random_floats(random, one), dh_last = random_floats(random, one);
  const bool with_dcs = random() % 2;

  Doubles gates(4 * every), cs(every), hs(every), dgates(4 * every), dbias(rows * wide);
  auto before = [&](const Doubles& states, const Floats& first, int64_t at) {
    return at < one ? double(first[at]) : states[at - one];
  };
  for (int64_t t = 0; t < steps; t++) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = 0; j < wide; j++) {
        const int64_t at = (t * rows + r) * wide + j;
        double y = inputs[at] + bias[j];
        for (int64_t k = 0; k < width; k++) {
          y += before(hs, h0, t * one + r * width + k) * kernel[k * wide + j];
        }
        gates[at] = j / width == 2 ? std::tanh(y) : sigmoid(y);
      }
      for (int64_t j = 0; j < width; j++) {
        const double* gate = &gates[(t * rows + r) * wide + j];
        const int64_t at = t * one + r * width + j;
        cs[at] = gate[width] * before(cs, c0, at) + gate[0] * gate[2 * width];
        hs[at] = gate[3 * width] * std::tanh(cs[at]);
      }
    }
  }
  Doubles dc(dc_last.begin(), dc_last.end()), dh(dh_last.begin(), dh_last.end());
  for (int64_t t = steps - 1; t >= 0; t--) {
    Doubles new_dh(one);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = 0; j < width; j++) {
        const double* gate = &gates[(t * rows + r) * wide + j];
        const double in = gate[0], forget = gate[width], cell = gate[2 * width];
        const double out = gate[3 * width];
        const int64_t here = r * width + j, at = t * one + here;
        const double tan = std::tanh(cs[at]), h = dh[here] + dhs[at];
        const double c = dc[here] + (with_dcs ? dcs[at] : 0) + h * out * (1 - tan * tan);
        const double d[4] = {c * cell * in * (1 - in),
                             c * before(cs, c0, at) * forget * (1 - forget),
                             c * in * (1 - cell * cell), h * tan * out * (1 - out)};
        dc[here] = c * forget;
        for (int64_t g = 0; g < 4; g++) {
          dgates[(t * rows + r) * wide + g * width + j] = d[g];
          dbias[r * wide + g * width + j] += d[g];
          for (int64_t k = 0; k < width; k++) {
            new_dh[r * width + k] += d[g] * kernel[k * wide + g * width + j];
          }
        }
      }
    }
    dh = new_dh;
  }

  struct Results {
    Floats gates, cs, hs, dbias, dc0, dh0;
    bool operator==(const Results& other) const {
      return gates == other.gates && cs == other.cs && hs == other.hs && dbias == other.dbias &&
             dc0 == other.dc0 && dh0 == other.dh0;
    }
  };
  const priorityprop::LstmShape shape{steps, rows, width};
  auto forward = [&](Pool& pool, Results& to, float* gates) {
    to.cs.assign(every, 9), to.hs.assign(every, 9);
    const priorityprop::LstmForward arrays{to.gates.data(), kernel.data(), bias.data(), c0.data(),
                                           h0.data(),       gates,         to.cs.data(),
                                           to.hs.data()};
    return lstm_forward(pool, shape, arrays);
  };
  auto backward = [&](Pool& pool, Results& to) {
    to.dbias.assign(rows * wide, 9), to.dc0.assign(one, 9), to.dh0.assign(one, 9);
    const priorityprop::LstmBackward arrays{to.gates.data(),
                                            to.cs.data(),
                                            kernel.data(),
                                            c0.data(),
                                            with_dcs ? dcs.data() : nullptr,
                                            dhs.data(),
                                            dc_last.data(),
                                            dh_last.data(),
                                            to.gates.data(),
                                            to.dbias.data(),
                                            to.dc0.data(),
                                            to.dh0.data()};
    return lstm_backward(pool, shape, arrays);
  };

  Results values{inputs, {}, {}, {}, {}, {}}, found = values, alone = values;
  expect(forward(pool, values, nullptr) == nullptr && values.gates == inputs, "values alone");
  expect(close(values.cs, cs) && close(values.hs, hs), "cs and hs");
  // In place, as XLA has it.
  expect(forward(pool, found, found.gates.data()) == nullptr && close(found.gates, gates), "gates");
  expect(found.cs == values.cs && found.hs == values.hs, "the same values");
  expect(backward(pool, found) == nullptr && close(found.gates, dgates), "dgates");
  expect(close(found.dbias, dbias) && close(found.dc0, dc) && close(found.dh0, dh), "the rest");
  // However many threads there are, results are the same to the last bit.
  Pool nobody(0);
  forward(nobody, alone, alone.gates.data()), backward(nobody, alone);
  expect(found == alone, "one thread");
  if (steps > 2) return;
  auto again = [&] {
    found.gates = inputs;
    const char* error = forward(pool, found, found.gates.data());
    return error ? error : backward(pool, found);
  };
  expect(survives_without_memory(again) && found == alone, "without memory");
}

void check_gru(Pool& pool, std::mt19937& random, int64_t steps, int64_t rows, int64_t width) {
  const int64_t wide = 3 * width, one = rows * width, every = steps * one;
  const Floats inputs = random_floats(random, 3 * every), bias = random_floats(random, width);
  Floats kernel = random_floats(random, width * wide);
  for (float& weight : kernel) weight /= std::sqrt(float(width));
  const Floats h0 = random_floats(random, one), dhs = random_floats(random, every);
  const Floats dh_last = random_floats(random, one);

  Doubles gates(3 * every), products(every), hs(every);
  Doubles dinputs(3 * every), dgates(3 * every), dbias(4 * one);
  auto before = [&](int64_t at) { return at < one ? double(h0[at]) : hs[at - one]; };
  for (int64_t t = 0; t < steps; t++) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = 0; j < width; j++) {
        const int64_t at = t * one + r * width + j, to = (t * rows + r) * wide + j;
        double y[3] = {0, 0, bias[j]};
        for (int64_t g = 0; g < 3; g++) {
          for (int64_t k = 0; k < width; k++) {
            y[g] += before(t * one + r * width + k) * kernel[k * wide + g * width + j];
          }
        }
        const double reset = sigmoid(inputs[to] + y[0]);
        const double update = sigmoid(inputs[to + width] + y[1]);
        const double fresh = std::tanh(inputs[to + 2 * width] + reset * y[2]);
        gates[to] = reset, gates[to + width] = update, gates[to + 2 * width] = fresh;
        products[at] = y[2], hs[at] = (1 - update) * fresh + update * before(at);
      }
    }
  }
  Doubles dh(dh_last.begin(), dh_last.end());
  for (int64_t t = steps - 1; t >= 0; t--) {
    Doubles new_dh(one);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = 0; j < width; j++) {
        const int64_t here = r * width + j, at = t * one + here, to = (t * rows + r) * wide + j;
        const double reset = gates[to], update = gates[to + width], fresh = gates[to + 2 * width];
        const double h = dh[here] + dhs[at], of_new = h * (1 - update) * (1 - fresh * fresh);
        const double d[4] = {of_new * products[at] * reset * (1 - reset),
                             h * (before(at) - fresh) * update * (1 - update), of_new * reset,
                             of_new};
        new_dh[here] += h * update;
        for (int64_t g = 0; g < 3; g++) {
          dgates[to + g * width] = d[g], dinputs[to + g * width] = d[g == 2 ? 3 : g];
          for (int64_t k = 0; k < width; k++) {
            new_dh[r * width + k] += d[g] * kernel[k * wide + g * width + j];
          }
        }
        for (int64_t b = 0; b < 4; b++) dbias[r * 4 * width + b * width + j] += d[b];
      }
    }
    dh = new_dh;
  }

  struct Results {
    Floats gates, products, hs, dgates, dbias, dh0;
    bool operator==(const Results& other) const {
      return gates == other.gates && products == other.products && hs == other.hs &&
             dgates == other.dgates && dbias == other.dbias && dh0 == other.dh0;
    }
  };
  const priorityprop::GruShape shape{steps, rows, width};
  auto forward = [&](Pool& pool, Results& to, bool keep) {
    to.products.assign(every, 9), to.hs.assign(every, 9);
    const priorityprop::GruForward arrays{to.gates.data(),
                                          kernel.data(),
                                          bias.data(),
                                          h0.data(),
                                          keep ? to.gates.data() : nullptr,
                                          keep ? to.products.data() : nullptr,
                                          to.hs.data()};
    return gru_forward(pool, shape, arrays);
  };
  auto backward = [&](Pool& pool, Results& to) {
    to.dgates.assign(3 * every, 9), to.dbias.assign(4 * one, 9), to.dh0.assign(one, 9);
    const priorityprop::GruBackward arrays{
        to.gates.data(), to.products.data(), to.hs.data(),     kernel.data(),
        h0.data(),       dhs.data(),         dh_last.data(),   to.gates.data(),
        to.dgates.data(), to.dbias.data(),   to.dh0.data()};
    return gru_backward(pool, shape, arrays);
  };

  Results values{inputs, {}, {}, {}, {}, {}}, found = values, alone = values;
  expect(forward(pool, values, false) == nullptr && values.gates == inputs, "values alone, GRU");
  expect(close(values.hs, hs), "hs, GRU");
  // In place, as XLA has it.
  expect(forward(pool, found, true) == nullptr && close(found.gates, gates), "gates, GRU");
  expect(found.hs == values.hs && close(found.products, products), "the same values, GRU");
  expect(backward(pool, found) == nullptr && close(found.gates, dinputs), "dinputs");
  expect(close(found.dgates, dgates) && close(found.dbias, dbias), "dgates, GRU");
  expect(close(found.dh0, dh), "the rest, GRU");
  Pool nobody(0);
  forward(nobody, alone, true), backward(nobody, alone);
  expect(found == alone, "one thread, GRU");
  if (steps > 2) return;
  auto again = [&] {
    found.gates = inputs;
    const char* error = forward(pool, found, true);
    return error ? error : backward(pool, found);
  };
  expect(survives_without_memory(again) && found == alone, "without memory, GRU");
}

void check_one(Pool& pool, std::mt19937& random, int64_t steps, int64_t rows, int64_t width) {
  check_lstm(pool, random, steps, rows, width);
  check_gru(pool, random, steps, rows, width);
}

void check_some(Pool& pool, int seed, int cases) {
  std::mt19937 random(seed);
  for (int i = 0; i < cases; i++) {
    check_one(pool, random, 3 + random() % 5, 1 + random() % 15, 1 + random() % 40);
  }
}

// Each part of each step once, after all of the step before, with helpers that come late or never.
void check_steps(Pool& pool) {
  for (int64_t parts : {1, 2, 3, 7, 40}) {
    std::vector<int64_t> seen(parts);
    std::atomic<int64_t> done{0};
    priorityprop::parallel_steps(pool, 200, parts, [&](int64_t step, int64_t part) {
      expect(done >= step * parts && seen[part]++ == step, "steps in turn");
      done++;
    });
    expect(done == 200 * parts, "all parts");
  }
}

}  // namespace

int main() {
  Pool pool(3);
  check_steps(pool);
  check_some(pool, 0, 60);
  std::mt19937 random(1);
  check_one(pool, random, 2, 7, 70);  // work for several threads
  check_one(pool, random, 9, 20, 130);

  std::vector<std::thread> callers;
  for (int i = 0; i < 6; i++) {
    callers.emplace_back([&pool, i] { check_some(pool, 2 + i, 15), check_steps(pool); });
  }
  for (auto& caller : callers) caller.join();
  return wrong > 0;
}
