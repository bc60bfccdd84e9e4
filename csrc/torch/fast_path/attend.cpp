// From Python's objects to attend_recorded, without pybind11's and the interpreter's share of the time.
// Invariant: what it serves gives the same bits, errors and graph as _checks and _autograd would; whatever is unusual it leaves to them.
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "kernels/head_dims.h"
#include "torch/fast_path/fast_path.h"
#include "torch/fast_path/node.h"

namespace flash {
namespace {

// Where arguments are in the signatures.  The second half of both is the same, shifted.
constexpr Py_ssize_t kOptions = 8, kDenseTensors = 3, kVarlenTensors = 7;
constexpr Py_ssize_t kDenseArguments  = kDenseTensors + kOptions;
constexpr Py_ssize_t kVarlenArguments = kVarlenTensors + kOptions + 1;  // and block_table
enum VarlenArgument { kArgCuSeqlensQ = 3, kArgCuSeqlensK, kArgMaxSeqlenQ, kArgMaxSeqlenK };
enum Option {
  kDropout,
  kScale,
  kCausal,
  kWindow,
  kSoftcap,
  kSlopes,
  kDeterministic,
  kProbs,
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

struct Inputs {
  at::Tensor const &q, &k, &v;
};

bool is_served_head_dim(int64_t head_dim) {
  constexpr int64_t kHeadDimMultiple = 8;
  return head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % kHeadDimMultiple == 0;
}

// q, k and v whose shapes, dtypes, devices and layouts the operators take as they are.  dims: 4, or 3 for ragged tensors.
std::optional<Inputs> served_inputs(PyObject* const* arguments, int64_t dims) {
  at::Tensor const *q_given = plain_tensor(arguments[0]), *k_given = plain_tensor(arguments[1]),
                   *v_given = plain_tensor(arguments[2]);
  if (!q_given || !k_given || !v_given) { return {}; }
  at::Tensor const &q = *q_given, &k = *k_given, &v = *v_given;
  bool const have_dims = q.dim() == dims && k.dim() == dims && v.dim() == dims;
  if (!have_dims || k.sizes().slice(0, dims - 1) != v.sizes().slice(0, dims - 1)) { return {}; }
  // Of v with a head dimension of its own there are no gradients: Python says so.
  bool const has_own_head_dim = v.size(-1) != q.size(-1);
  if (has_own_head_dim && torch::autograd::compute_requires_grad(q, k, v)) { return {}; }
  at::ScalarType const dtype = q.scalar_type();
  int64_t const head_dim = q.size(-1), heads_q = q.size(-2), heads_k = k.size(-2);
  bool const has_batch = dims == 3 || (q.size(0) > 0 && k.size(0) == q.size(0));
  bool const is_served =
      (dtype == at::kHalf || dtype == at::kBFloat16) && k.scalar_type() == dtype &&
      v.scalar_type() == dtype && k.device() == q.device() && v.device() == q.device() &&
      has_batch && k.size(-1) == head_dim && is_served_head_dim(head_dim) &&
      is_served_head_dim(v.size(-1)) && heads_k > 0 && heads_q > 0 && heads_q % heads_k == 0 &&
      q.stride(-1) == 1 && k.stride(-1) == 1 && v.stride(-1) == 1;
  return is_served ? std::optional<Inputs>({q, k, v}) : std::nullopt;
}

struct Score {
  double dropout_p, softmax_scale, softcap;
  int64_t window_left, window_right;
  bool causal, deterministic;
};

// options: the second half of the arguments.
std::optional<Score> parse_options(PyObject* const* options, int64_t head_dim) {
  if (options[kSlopes] != Py_None || options[kProbs] != Py_False) { return {}; }
  PyObject *const given_scale = options[kScale], *const window = options[kWindow];
  auto const dropout_p = real(options[kDropout]), softcap = real(options[kSoftcap]),
             scale  = given_scale == Py_None ? std::pow(double(head_dim), -0.5) : real(given_scale);
  auto const causal = flag(options[kCausal]), deterministic = flag(options[kDeterministic]);
  if (!PyTuple_CheckExact(window) && !PyList_CheckExact(window)) { return {}; }
  if (PySequence_Fast_GET_SIZE(window) != 2) { return {}; }
  auto const left      = integer(PySequence_Fast_GET_ITEM(window, 0)),
             right     = integer(PySequence_Fast_GET_ITEM(window, 1));
  bool const is_served = dropout_p && *dropout_p >= 0.0 && *dropout_p < 1.0 && scale && softcap &&
                         *softcap >= 0.0 && std::isfinite(*softcap) && causal && deterministic &&
                         left && right;
  if (!is_served) { return {}; }
  return Score{*dropout_p, *scale, *softcap, *left, *right, *causal, *deterministic};
}

// cu_seqlens as the kernels read it.
at::Tensor const* served_cu_seqlens(PyObject* object, at::Tensor const& q) {
  at::Tensor const* const tensor = plain_tensor(object);
  bool const is_served = tensor && tensor->dim() == 1 && tensor->numel() > 1 &&
                         tensor->scalar_type() == at::kInt && tensor->device() == q.device() &&
                         tensor->stride(0) == 1;
  return is_served ? tensor : nullptr;
}

// Python checks what tensors on the device hold, if the environment asks for it.
bool checks_device_data() {
  char const* const value = std::getenv("FLASH_ATTN_CHECK_DEVICE_DATA");
  return value && *value && std::strcmp(value, "0") != 0;
}

PyObject* attend(Inputs const& x, Lengths const* lengths, Score const& score) {
  OptionalTensor const none;
  at::Tensor out;
  {
    pybind11::gil_scoped_release const without_gil;
    Options const options{score.softmax_scale, score.causal, score.window_left, score.window_right,
                          score.softcap,       none,         score.dropout_p,   none};
    out = attend_recorded(x.q, x.k, x.v, lengths, options, score.deterministic);
  }
  return THPVariable_Wrap(std::move(out));
}

}  // namespace

PyObject* fast_attend(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != kDenseArguments || !is_plain_context()) { Py_RETURN_NONE; }
  auto const inputs = served_inputs(arguments, 4);
  if (!inputs) { Py_RETURN_NONE; }
  auto const score = parse_options(arguments + kDenseTensors, inputs->q.size(-1));
  if (!score) { Py_RETURN_NONE; }
  return attend(*inputs, nullptr, *score);
  END_HANDLE_TH_ERRORS
}

PyObject* fast_varlen_attend(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != kVarlenArguments || !is_plain_context()) { Py_RETURN_NONE; }
  if (arguments[kVarlenArguments - 1] != Py_None || checks_device_data()) { Py_RETURN_NONE; }
  auto const inputs = served_inputs(arguments, 3);
  if (!inputs) { Py_RETURN_NONE; }
  auto const score       = parse_options(arguments + kVarlenTensors, inputs->q.size(-1));
  at::Tensor const *cu_q = served_cu_seqlens(arguments[kArgCuSeqlensQ], inputs->q),
                   *cu_k = served_cu_seqlens(arguments[kArgCuSeqlensK], inputs->q);
  auto const max_q = integer(arguments[kArgMaxSeqlenQ]), max_k = integer(arguments[kArgMaxSeqlenK]);
  if (!score || !cu_q || !cu_k || cu_q->numel() != cu_k->numel() || !max_q || !max_k) {
    Py_RETURN_NONE;
  }
  OptionalTensor const none;
  Lengths const lengths{*cu_q, *cu_k, none, none, *max_q, *max_k};
  return attend(*inputs, &lengths, *score);
  END_HANDLE_TH_ERRORS
}

}  // namespace flash
