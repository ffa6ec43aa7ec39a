// The recurrence of an LSTM over time, forward and backward.
#pragma once

#include "steps.h"

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

using LstmShape = RecurrentShape<4>;

struct LstmForward {
  const float *inputs;  // [steps, rows, 4 * width]
  const float *kernel;  // [width, 4 * width]
  const float *bias;    // [4 * width]
  const float *c0, *h0; // [rows, width]
  float *gates;         // [steps, rows, 4 * width], after their functions, or null; may be inputs
  float *cs, *hs;       // [steps, rows, width]
};

template <class Pool>
const char* lstm_forward(Pool& pool, const LstmShape& shape, const LstmForward& a) {
  const int64_t width = shape.width, wide = shape.wide();
  auto cell = [&](int64_t step, int64_t row, int64_t j, int64_t n, Vec(&y)[4]) {
    const int64_t here = row * width + j, to = step * shape.entries() + here;
    const int64_t at = (step * shape.rows + row) * wide + j;
    for (int gate = 0; gate < 4; gate++) {
      const Vec bias = load_some(a.bias + gate * width + j, n);
      y[gate] = load_some(a.inputs + at + gate * width, n) + (y[gate] + bias);
    }
    const Vec in = sigmoid(y[0]), forget = sigmoid(y[1]), cell = tanh(y[2]), out = sigmoid(y[3]);
    const Vec before = load_some(step ? a.cs + to - shape.entries() : a.c0 + here, n);
    const Vec state = forget * before + in * cell;
    store_some(a.cs + to, state, n);
    store_some(a.hs + to, out * tanh(state), n);
    if (a.gates == nullptr) return;
    store_some(a.gates + at, in, n);
    store_some(a.gates + at + width, forget, n);
    store_some(a.gates + at + 2 * width, cell, n);
    store_some(a.gates + at + 3 * width, out, n);
  };
  forward_steps(pool, shape, a.kernel, a.h0, a.hs, cell);
  return nullptr;
}

struct LstmBackward {
  const float *gates;      // [steps, rows, 4 * width]
  const float *cs;         // [steps, rows, width]
  const float *kernel;     // [width, 4 * width]
  const float *c0;         // [rows, width]
  const float *dcs, *dhs;  // [steps, rows, width], of what came out; dcs may be null
  const float *dc, *dh;    // [rows, width], of the last state
  float *dgates;           // [steps, rows, 4 * width], of what enters them; may be gates
  float *dbias;            // [rows, 4 * width]: dgates summed over steps
  float *dc0, *dh0;        // [rows, width]
};

template <class Pool>
const char* lstm_backward(Pool& pool, const LstmShape& shape, const LstmBackward& a) {
  const int64_t width = shape.width, wide = shape.wide(), steps = shape.steps;
  std::memset(a.dbias, 0, shape.rows * wide * sizeof(float));
  auto cell = [&](int64_t step, int64_t row, int64_t j, int64_t n, Vec dh) {
    const int64_t here = row * width + j, at = step * shape.entries() + here;
    if (step < 0) return store_some(a.dh0 + here, dh, n);
    const float* gates = a.gates + (step * shape.rows + row) * wide + j;
    float* dgates = a.dgates + (step * shape.rows + row) * wide + j;
    const Vec in = load_some(gates, n), forget = load_some(gates + width, n);
    const Vec cell = load_some(gates + 2 * width, n), out = load_some(gates + 3 * width, n);
    const Vec before = load_some(step ? a.cs + at - shape.entries() : a.c0 + here, n);
    const Vec t = tanh(load_some(a.cs + at, n));
    dh += load_some(a.dhs + at, n);
    Vec dc = load_some(step + 1 < steps ? a.dc0 + here : a.dc + here, n);
    if (a.dcs) dc += load_some(a.dcs + at, n);
    dc += dh * (out * (1.0f - t * t));
    store_some(a.dc0 + here, dc * forget, n);
    const Vec d[4] = {dc * (cell * in * (1.0f - in)), dc * (before * forget * (1.0f - forget)),
                      dc * (in * (1.0f - cell * cell)), dh * (t * out * (1.0f - out))};
    for (int gate = 0; gate < 4; gate++) {
      float* bias = a.dbias + row * wide + gate * width + j;
      store_some(bias, load_some(bias, n) + d[gate], n);
      store_some(dgates + gate * width, d[gate], n);
    }
  };
  backward_steps(pool, shape, a.kernel, a.dh, a.dgates, cell);
  return nullptr;
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
