// From Python's objects to attend or flash_attn::fwd, without pybind11's and the interpreter's share of the time.
// Invariant: what it serves gives the same bits, errors and graph as _checks and _autograd would; whatever is unusual it leaves to them.
#include "torch/entry.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>

#include "torch/attend.h"

namespace flash {
namespace {

// In the order of flash_attn_func's signature.
enum Argument {
  kArgQ,
  kArgK,
  kArgV,
  kArgDropout,
  kArgScale,
  kArgCausal,
  kArgWindow,
  kArgSoftcap,
  kArgSlopes,
  kArgDeterministic,
  kArgProbs,
  kArguments
};

// No mode, transform or tracer would see the operators: they are called as in a plain program.
bool is_plain_context() {
  return c10::default_included_set.has_all(c10::impl::tls_local_dispatch_key_set().included_) &&
         !at::impl::torch_function_mode_enabled();
}

// The tensor of a Tensor or Parameter, no subclass, on CUDA without anything lazy, wrapped or dual about it; null for others.
at::Tensor const* plain_tensor(PyObject* object) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kPlain({DispatchKey::CUDA, DispatchKey::ADInplaceOrView,
                                        DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
  if (!THPVariable_CheckExact(object)) { return nullptr; }
  at::Tensor const& tensor = THPVariable_Unpack(object);
  bool const is_plain = tensor.defined() && kPlain.has_all(tensor.key_set()) && tensor.is_cuda() &&
                        !tensor._fw_grad(/*level=*/0).defined();
  return is_plain ? &tensor : nullptr;
}

std::optional<double> real(PyObject* object) {
  if (PyFloat_CheckExact(object)) { return PyFloat_AS_DOUBLE(object); }
  return std::nullopt;
}

std::optional<bool> flag(PyObject* object) {
  return PyBool_Check(object) ? std::optional<bool>(object == Py_True) : std::nullopt;
}

std::optional<int64_t> integer(PyObject* object) {
  if (!PyLong_CheckExact(object)) { return std::nullopt; }
  int overflow        = 0;
  int64_t const value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow ? std::nullopt : std::optional<int64_t>(value);
}

// Whether shapes, dtypes, devices and layouts are those that the operators take as they are.
bool are_served(at::Tensor const& q, at::Tensor const& k, at::Tensor const& v) {
  constexpr int64_t kMaxHeadDim = 256, kHeadDimMultiple = 8;
  if (q.dim() != 4 || k.dim() != 4 || k.sizes() != v.sizes()) { return false; }
  at::ScalarType const dtype = q.scalar_type();
  int64_t const head_dim = q.size(3), heads_q = q.size(2), heads_k = k.size(2);
  return (dtype == at::kHalf || dtype == at::kBFloat16) && k.scalar_type() == dtype &&
         v.scalar_type() == dtype && k.device() == q.device() && v.device() == q.device() &&
         q.size(0) > 0 && k.size(0) == q.size(0) && k.size(3) == head_dim && head_dim > 0 &&
         head_dim <= kMaxHeadDim && head_dim % kHeadDimMultiple == 0 && heads_k > 0 &&
         heads_q > 0 && heads_q % heads_k == 0 && q.stride(3) == 1 && k.stride(3) == 1 &&
         v.stride(3) == 1;
}

struct Call {
  at::Tensor const &q, &k, &v;
  double softmax_scale, softcap;
  int64_t window_left, window_right;
  bool causal, deterministic;
};

std::optional<Call> parse(PyObject* const* arguments) {
  if (arguments[kArgSlopes] != Py_None || arguments[kArgProbs] != Py_False) { return {}; }
  at::Tensor const *q = plain_tensor(arguments[kArgQ]), *k = plain_tensor(arguments[kArgK]),
                   *v = plain_tensor(arguments[kArgV]);
  if (!q || !k || !v || !are_served(*q, *k, *v)) { return {}; }
  PyObject *const given_scale = arguments[kArgScale], *const window = arguments[kArgWindow];
  auto const dropout_p = real(arguments[kArgDropout]), softcap = real(arguments[kArgSoftcap]),
             scale =
                 given_scale == Py_None ? std::pow(double(q->size(3)), -0.5) : real(given_scale);
  auto const causal        = flag(arguments[kArgCausal]),
             deterministic = flag(arguments[kArgDeterministic]);
  if (!PyTuple_CheckExact(window) && !PyList_CheckExact(window)) { return {}; }
  if (PySequence_Fast_GET_SIZE(window) != 2) { return {}; }
  auto const left      = integer(PySequence_Fast_GET_ITEM(window, 0)),
             right     = integer(PySequence_Fast_GET_ITEM(window, 1));
  bool const is_served = dropout_p && *dropout_p == 0.0 && scale && softcap && *softcap >= 0.0 &&
                         std::isfinite(*softcap) && causal && deterministic && left && right;
  if (!is_served) { return {}; }
  return Call{*q, *k, *v, *scale, *softcap, *left, *right, *causal, *deterministic};
}

}  // namespace

PyObject* attend_common(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != kArguments || !is_plain_context()) { Py_RETURN_NONE; }
  std::optional<Call> const call = parse(arguments);
  if (!call) { Py_RETURN_NONE; }
  at::Tensor out;
  {
    pybind11::gil_scoped_release const without_gil;
    auto const& c              = *call;
    std::tie(out, std::ignore) = attend(c.q, c.k, c.v, c.softmax_scale, c.causal, c.window_left,
                                        c.window_right, c.softcap, {}, 0.0, {}, c.deterministic);
  }
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

}  // namespace flash
