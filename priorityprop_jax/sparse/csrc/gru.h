// The recurrence of a GRU over time, forward and backward.
#pragma once

#include "steps.h"

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

using GruShape = RecurrentShape<3>;

struct GruForward {
  const float *inputs;  // [steps, rows, 3 * width]: reset, update, new
  const float *kernel;  // [width, 3 * width]
  const float *bias;    // [width], of what the reset gate lets through
  const float *h0;      // [rows, width]
  float *gates;         // [steps, rows, 3 * width], after their functions, or null; may be inputs
  float *products;      // [steps, rows, width], what the reset gate lets through, or null with gates
  float *hs;            // [steps, rows, width]
};

template <class Pool>
const char* gru_forward(Pool& pool, const GruShape& shape, const GruForward& a) {
  const int64_t width = shape.width, wide = shape.wide();
  auto cell = [&](int64_t step, int64_t row, int64_t j, int64_t n, Vec(&y)[3]) {
    const int64_t here = row * width + j, to = step * shape.entries() + here;
    const int64_t at = (step * shape.rows + row) * wide + j;
    const float* inputs = a.inputs + at;
    const Vec reset = sigmoid(load_some(inputs, n) + y[0]);
    const Vec update = sigmoid(load_some(inputs + width, n) + y[1]);
    const Vec product = y[2] + load_some(a.bias + j, n);
    const Vec fresh = tanh(load_some(inputs + 2 * width, n) + reset * product);
    const Vec before = load_some(step ? a.hs + to - shape.entries() : a.h0 + here, n);
    store_some(a.hs + to, (1.0f - update) * fresh + update * before, n);
    if (a.gates == nullptr) return;
    store_some(a.gates + at, reset, n);
    store_some(a.gates + at + width, update, n);
    store_some(a.gates + at + 2 * width, fresh, n);
    store_some(a.products + to, product, n);
  };
  forward_steps(pool, shape, a.kernel, a.h0, a.hs, cell);
  return nullptr;
}

struct GruBackward {
  const float *gates;          // [steps, rows, 3 * width]
  const float *products, *hs;  // [steps, rows, width]
  const float *kernel;         // [width, 3 * width]
  const float *h0;             // [rows, width]
  const float *dhs;            // [steps, rows, width], of what came out
  const float *dh;             // [rows, width], of the last state
  float *dinputs;              // [steps, rows, 3 * width], of what enters gates; may be gates
  float *dgates;               // the same of the state's products, before the reset gate
  float *dbias;                // [rows, 4 * width]: dgates, then the new gate's dinputs, over steps
  float *dh0;                  // [rows, width]
};

template <class Pool>
const char* gru_backward(Pool& pool, const GruShape& shape, const GruBackward& a) {
  const int64_t width = shape.width, wide = shape.wide(), steps = shape.steps;
  std::memset(a.dbias, 0, 4 * shape.entries() * sizeof(float));
  auto cell = [&](int64_t step, int64_t row, int64_t j, int64_t n, Vec dh) {
    const int64_t here = row * width + j, at = step * shape.entries() + here;
    // What came past the gates of the step behind.
    if (step + 1 < steps) dh += load_some(a.dh0 + here, n);
    if (step < 0) return store_some(a.dh0 + here, dh, n);
    const int64_t to = (step * shape.rows + row) * wide + j;
    const float* gates = a.gates + to;
    const Vec reset = load_some(gates, n), update = load_some(gates + width, n);
    const Vec fresh = load_some(gates + 2 * width, n), product = load_some(a.products + at, n);
    const Vec before = load_some(step ? a.hs + at - shape.entries() : a.h0 + here, n);
    dh += load_some(a.dhs + at, n);
    store_some(a.dh0 + here, dh * update, n);
    const Vec of_new = dh * ((1.0f - update) * (1.0f - fresh * fresh));
    const Vec d[4] = {of_new * (product * reset * (1.0f - reset)),
                      dh * ((before - fresh) * update * (1.0f - update)), of_new * reset, of_new};
    for (int block = 0; block < 4; block++) {
      float* bias = a.dbias + row * 4 * width + block * width + j;
      store_some(bias, load_some(bias, n) + d[block], n);
    }
    for (int gate = 0; gate < 3; gate++) {
      store_some(a.dgates + to + gate * width, d[gate], n);
      store_some(a.dinputs + to + gate * width, d[gate == 2 ? 3 : gate], n);
    }
  };
  backward_steps(pool, shape, a.kernel, a.dh, a.dgates, cell);
  return nullptr;
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
