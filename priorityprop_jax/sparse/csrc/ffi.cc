// What XLA calls: the kernels behind its foreign function interface.
#include <cstdint>
#include <cstring>

#include "conv.h"
#include "gru.h"
#include "linear.h"
#include "lstm.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {
namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;

ffi::Error result(const char* error) {
  if (error == nullptr) return ffi::Error::Success();
  if (error == kNoMemory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, error);
  return ffi::Error::InvalidArgument(error);
}

template <class F>
ffi::Error run(F&& kernel) {
  return result(guarded(kernel));
}

// A buffer of shape (0,) stands for an output that is not wanted, whatever its shape would be.
float* wanted(FloatsOut& buffer, bool flag) { return flag ? buffer->typed_data() : nullptr; }

bool is_matrix(const ffi::AnyBuffer::Dimensions& shape, int64_t rows, int64_t columns) {
  return shape.size() == 2 && shape[0] == rows && shape[1] == columns;
}

bool same_length(int64_t capacity, const Indices& indices, const Floats& values) {
  return static_cast<int64_t>(indices.element_count()) == capacity &&
         static_cast<int64_t>(values.element_count()) == capacity;
}

constexpr const char* kBadShapes = "the shapes of a sparse product do not fit together";

ffi::Error linear_forward_call(ffi::ThreadPool pool, Floats values, Indices row_starts,
                               Indices columns, Floats x, FloatsOut y) {
  const auto in = x.dimensions(), out = y->dimensions();
  const int64_t capacity = columns.element_count();
  if (in.size() != 2 || !is_matrix(out, in[0], row_starts.element_count() - 1) ||
      !same_length(capacity, columns, values)) {
    return result(kBadShapes);
  }
  const Lines lines{out[1], in[1], capacity, row_starts.typed_data(), columns.typed_data()};
  return run([&] {
    return linear_forward(pool, lines, values.typed_data(), x.typed_data(), y->typed_data(), in[0]);
  });
}

ffi::Error linear_backward_call(ffi::ThreadPool pool, Floats values, Indices row_starts,
                                Indices column_starts, Indices rows, Indices order, Floats x,
                                Floats dy, bool inputs, bool weights, FloatsOut dx,
                                FloatsOut dvalues) {
  const auto in = x.dimensions(), out = dy.dimensions();
  const int64_t capacity = rows.element_count();
  if (out.size() != 2 || !is_matrix(in, out[0], column_starts.element_count() - 1) ||
      static_cast<int64_t>(row_starts.element_count()) != out[1] + 1 ||
      !same_length(capacity, order, values) ||
      (inputs && !is_matrix(dx->dimensions(), in[0], in[1])) ||
      (weights && !same_length(capacity, order, *dvalues))) {
    return result(kBadShapes);
  }
  // Starts that were never filled in would pass for a weight without a place.
  if (row_starts.typed_data()[out[1]] != column_starts.typed_data()[in[1]]) {
    return result("row_starts and column_starts of a sparse pattern must count the same places");
  }
  const Lines lines{in[1], out[1], capacity, column_starts.typed_data(), rows.typed_data()};
  return run([&] {
    return linear_backward(pool, lines, order.typed_data(), values.typed_data(), x.typed_data(),
                           dy.typed_data(), wanted(dx, inputs), wanted(dvalues, weights), in[0]);
  });
}

// The shapes of images and of a pattern [out channels, in channels / groups * kernel] as the kernels
// take them; `geometry` holds kernel, strides, low padding and dilation, each of height and width,
// and groups. False if they do not fit together.
bool conv_shape(ffi::Span<const int64_t> geometry, const Floats& x,
                const ffi::AnyBuffer::Dimensions& out, const Indices& row_starts,
                const Indices& columns, const Floats& values, ConvShape& shape) {
  const auto in = x.dimensions();
  if (geometry.size() != 9 || in.size() != 4 || out.size() != 4 || in[0] != out[0] ||
      static_cast<int64_t>(row_starts.element_count()) != out[3] + 1 ||
      !same_length(columns.element_count(), columns, values)) {
    return false;
  }
  const int64_t* g = geometry.begin();
  for (int i : {0, 1, 2, 3, 6, 7, 8}) {
    if (g[i] < 1) return false;
  }
  shape = {in[0],        in[3],        out[3],       g[8],         {in[1], in[2]}, {g[0], g[1]},
           {g[2], g[3]}, {g[4], g[5]}, {g[6], g[7]}, {out[1], out[2]}};
  return in[3] % g[8] == 0 && out[3] % g[8] == 0;
}

ffi::Error conv_forward_call(ffi::ThreadPool pool, Floats values, Indices row_starts,
                             Indices columns, Floats x, ffi::Span<const int64_t> geometry,
                             FloatsOut y) {
  ConvShape shape;
  if (!conv_shape(geometry, x, y->dimensions(), row_starts, columns, values, shape)) {
    return result(kBadShapes);
  }
  return run([&] {
    return conv_forward(pool, shape, x.typed_data(), row_starts.typed_data(), columns.typed_data(),
                        columns.element_count(), values.typed_data(), y->typed_data());
  });
}

ffi::Error conv_backward_call(ffi::ThreadPool pool, Floats values, Indices row_starts,
                              Indices columns, Floats x, Floats dy,
                              ffi::Span<const int64_t> geometry, bool inputs, bool weights,
                              FloatsOut dx, FloatsOut dvalues) {
  ConvShape shape;
  if (!conv_shape(geometry, x, dy.dimensions(), row_starts, columns, values, shape) ||
      (inputs && dx->element_count() != x.element_count()) ||
      (weights && !same_length(columns.element_count(), columns, *dvalues))) {
    return result(kBadShapes);
  }
  return run([&] {
    return conv_backward(pool, shape, x.typed_data(), dy.typed_data(), row_starts.typed_data(),
                         columns.typed_data(), columns.element_count(), values.typed_data(),
                         wanted(dx, inputs), wanted(dvalues, weights));
  });
}

constexpr const char* kBadStates = "the shapes of a recurrent cell do not fit together";

template <class Shape>
bool recurrent_shape(const ffi::AnyBuffer::Dimensions& gates, const Floats& kernel, Shape& shape) {
  if (gates.size() != 3 || gates[2] % Shape::kGates != 0) return false;
  shape = {gates[0], gates[1], gates[2] / Shape::kGates};
  return shape.steps > 0 && is_matrix(kernel.dimensions(), shape.width, shape.wide());
}

template <class Buffer>
bool has(int64_t entries, Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count()) == entries;
}

ffi::Error lstm_forward_call(ffi::ThreadPool pool, Floats inputs, Floats kernel, Floats bias,
                             Floats c0, Floats h0, FloatsOut gates, FloatsOut cs, FloatsOut hs) {
  LstmShape shape{};
  const bool fits = recurrent_shape(inputs.dimensions(), kernel, shape);
  const int64_t one = shape.entries(), all = shape.steps * one;
  if (!fits || !has(4 * shape.width, bias) || !has(one, c0) || !has(one, h0) || !has(all, *cs) ||
      !has(all, *hs) || (gates->element_count() != 0 && !has(4 * all, *gates))) {
    return result(kBadStates);
  }
  const LstmForward arrays{inputs.typed_data(),
                           kernel.typed_data(),
                           bias.typed_data(),
                           c0.typed_data(),
                           h0.typed_data(),
                           wanted(gates, gates->element_count() != 0),
                           cs->typed_data(),
                           hs->typed_data()};
  return run([&] { return lstm_forward(pool, shape, arrays); });
}

ffi::Error lstm_backward_call(ffi::ThreadPool pool, Floats gates, Floats cs, Floats kernel,
                              Floats c0, Floats dcs, Floats dhs, Floats dc, Floats dh,
                              FloatsOut dgates, FloatsOut dbias, FloatsOut dc0, FloatsOut dh0) {
  LstmShape shape{};
  const bool fits = recurrent_shape(gates.dimensions(), kernel, shape);
  const int64_t one = shape.entries(), all = shape.steps * one;
  if (!fits || !has(all, cs) || !has(one, c0) || (dcs.element_count() != 0 && !has(all, dcs)) ||
      !has(all, dhs) || !has(one, dc) || !has(one, dh) || !has(4 * all, *dgates) ||
      !has(4 * one, *dbias) || !has(one, *dc0) || !has(one, *dh0)) {
    return result(kBadStates);
  }
  const LstmBackward arrays{gates.typed_data(),
                            cs.typed_data(),
                            kernel.typed_data(),
                            c0.typed_data(),
                            dcs.element_count() != 0 ? dcs.typed_data() : nullptr,
                            dhs.typed_data(),
                            dc.typed_data(),
                            dh.typed_data(),
                            dgates->typed_data(),
                            dbias->typed_data(),
                            dc0->typed_data(),
                            dh0->typed_data()};
  return run([&] { return lstm_backward(pool, shape, arrays); });
}

ffi::Error gru_forward_call(ffi::ThreadPool pool, Floats inputs, Floats kernel, Floats bias,
                            Floats h0, FloatsOut gates, FloatsOut products, FloatsOut hs) {
  GruShape shape{};
  const bool fits = recurrent_shape(inputs.dimensions(), kernel, shape);
  const int64_t one = shape.entries(), all = shape.steps * one;
  const bool keep = gates->element_count() != 0;
  if (!fits || !has(shape.width, bias) || !has(one, h0) || !has(all, *hs) ||
      (keep && (!has(3 * all, *gates) || !has(all, *products)))) {
    return result(kBadStates);
  }
  const GruForward arrays{inputs.typed_data(),   kernel.typed_data(),
                          bias.typed_data(),     h0.typed_data(),
                          wanted(gates, keep),   wanted(products, keep),
                          hs->typed_data()};
  return run([&] { return gru_forward(pool, shape, arrays); });
}

ffi::Error gru_backward_call(ffi::ThreadPool pool, Floats gates, Floats products, Floats hs,
                             Floats kernel, Floats h0, Floats dhs, Floats dh, FloatsOut dinputs,
                             FloatsOut dgates, FloatsOut dbias, FloatsOut dh0) {
  GruShape shape{};
  const bool fits = recurrent_shape(gates.dimensions(), kernel, shape);
  const int64_t one = shape.entries(), all = shape.steps * one;
  if (!fits || !has(all, products) || !has(all, hs) || !has(one, h0) || !has(all, dhs) ||
      !has(one, dh) || !has(3 * all, *dinputs) || !has(3 * all, *dgates) ||
      !has(4 * one, *dbias) || !has(one, *dh0)) {
    return result(kBadStates);
  }
  const GruBackward arrays{gates.typed_data(),    products.typed_data(), hs.typed_data(),
                           kernel.typed_data(),   h0.typed_data(),       dhs.typed_data(),
                           dh.typed_data(),       dinputs->typed_data(), dgates->typed_data(),
                           dbias->typed_data(),   dh0->typed_data()};
  return run([&] { return gru_backward(pool, shape, arrays); });
}

}  // namespace
}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_linear_forward, priorityprop::linear_forward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_linear_backward, priorityprop::linear_backward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Attr<bool>("inputs")
                                  .Attr<bool>("weights")
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_conv_forward, priorityprop::conv_forward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Floats>()
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Ret<priorityprop::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_conv_backward, priorityprop::conv_backward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Indices>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Attr<bool>("inputs")
                                  .Attr<bool>("weights")
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_lstm_forward, priorityprop::lstm_forward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_lstm_backward, priorityprop::lstm_backward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_gru_forward, priorityprop::gru_forward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(priorityprop_gru_backward, priorityprop::gru_backward_call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Arg<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>()
                                  .Ret<priorityprop::Floats>());

// What the loader asks before it registers anything.

// The operands of the handlers above; goes up when they change. Kernels that were built in place
// stay behind when the sources beside them are updated.
extern "C" int priorityprop_interface() { return 4; }

// The interface that this library was built against, as major * 1000 + minor.
extern "C" int priorityprop_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// Whether this processor, and its operating system, can run a library of a name. Only the library
// of the name "base" may be asked: loading another one could already execute what is missing.
extern "C" int priorityprop_can_run(const char* name) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return std::strcmp(name, "base") == 0;
}

#pragma GCC visibility pop
