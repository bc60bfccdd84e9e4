// Attention with gradients for tensors on CUDA: flash_attn/_autograd.py without Python's share of the time.
// One node for both layouts, with plain members: torch::autograd::Function keeps a dictionary of boxed values for each call.
// Invariant: only plain calls come here.  Where the backward pass runs in another setting, such as is_grads_batched, it hands over to
// the Python function.
#include "torch/fast_path/node.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string>
#include <vector>

#include "torch/convert.h"
#include "torch/operators.h"

namespace flash {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The operators are called by name: fake tensors, dispatch modes and profilers see them.
template <class Function>
auto find_operator(char const* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// Options and Lengths without their tensors.  IValues hold them in place; compiled autograd keeps such numbers out of its cache's keys.
enum Number : size_t {
  kScale,
  kSoftcap,
  kDropout,
  kLeft,
  kRight,
  kMaxSeqlenQ,
  kMaxSeqlenK,
  kCausal,
  kDeterministic,
  kNumbers
};
using Numbers = std::array<c10::IValue, kNumbers>;

// What is saved, in this order; undefined where there is none.
enum Saved : size_t { kQ, kK, kV, kOut, kLse, kRngState, kCuSeqlensQ, kCuSeqlensK, kSaved };
using Tensors = std::array<at::Tensor, kSaved>;

OptionalTensor optional(at::Tensor const& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}
at::Tensor with_contiguous_rows(at::Tensor const& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

ForwardResults call_forward(at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
                            Lengths const* lengths, Options const& o) {
  static auto const dense =
      find_operator<decltype(flash_attn_forward)>("flash_attn::_flash_attn_forward");
  static auto const varlen =
      find_operator<decltype(flash_attn_varlen_forward)>("flash_attn::_flash_attn_varlen_forward");
  at::AutoGradMode const no_grad(false);
  at::AutoDispatchBelowADInplaceOrView const below_autograd;
  return lengths
             ? varlen.call(q, k, v, lengths->cu_seqlens_q, lengths->cu_seqlens_k,
                           lengths->max_seqlen_q, lengths->max_seqlen_k, o.dropout_p,
                           o.softmax_scale, o.causal, o.window_left, o.window_right, o.softcap,
                           o.alibi_slopes, false, {}, {}, {}, false, 0, o.rng_state, {}, {}, false)
             : dense.call(q, k, v, o.dropout_p, o.softmax_scale, o.causal, o.window_left,
                          o.window_right, o.softcap, o.alibi_slopes, false, o.rng_state, {}, {},
                          false);
}

// flash_attn/_autograd.py's backward pass, for gradients that are no plain tensors.
variable_list call_python(at::Tensor const& dout, OptionalTensor const& dlse, Tensors const& saved,
                          Numbers const& numbers) {
  namespace py = pybind11;
  py::gil_scoped_acquire const gil;
  auto const tensor = [](at::Tensor const& t) -> py::object {
    return t.defined() ? py::cast(t) : py::none();
  };
  auto const number = [&](Number which) -> py::object {
    c10::IValue const& value = numbers[which];
    return value.isDouble() ? py::cast(value.toDouble())
           : value.isBool() ? py::cast(value.toBool())
                            : py::cast(value.toInt());
  };
  bool const is_ragged    = saved[kCuSeqlensQ].defined();
  py::object const none   = py::none();
  py::tuple const score   = py::make_tuple(number(kScale), number(kCausal), number(kLeft),
                                           number(kRight), number(kSoftcap));
  py::tuple const statics = py::make_tuple(score, number(kDropout), number(kDeterministic), false,
                                           is_ragged ? number(kMaxSeqlenQ) : none,
                                           is_ragged ? number(kMaxSeqlenK) : none);
  py::object const gradients = py::module_::import("flash_attn._autograd").attr("gradients");
  return py::cast<variable_list>(gradients(
      tensor(dout), dlse ? tensor(*dlse) : none, tensor(saved[kQ]), tensor(saved[kK]),
      tensor(saved[kV]), tensor(saved[kOut]), tensor(saved[kLse]), none, none, none,
      tensor(saved[kRngState]), tensor(saved[kCuSeqlensQ]), tensor(saved[kCuSeqlensK]), statics));
}

// A tensor on CUDA without anything that a mode or a transform wrapped around it.
bool is_plain(at::Tensor const& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kPlain({DispatchKey::CUDA, DispatchKey::ADInplaceOrView,
                                        DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA});
  return !tensor.defined() || kPlain.has_all(tensor.key_set());
}

// dq, dk and dv from the gradients of out and softmax_lse, which are undefined where these were not used.
variable_list call_backward(variable_list const& gradients, Tensors const& saved,
                            Numbers const& numbers) {
  static auto const dense =
      find_operator<decltype(flash_attn_backward)>("flash_attn::_flash_attn_backward");
  static auto const varlen = find_operator<decltype(flash_attn_varlen_backward)>(
      "flash_attn::_flash_attn_varlen_backward");
  // Without the fallback that would box the arguments.
  at::AutoDispatchBelowADInplaceOrView const below_autograd;
  at::Tensor const &q = saved[kQ], &k = saved[kK], &v = saved[kV], &out = saved[kOut],
                   &lse = saved[kLse], &cu_seqlens_q = saved[kCuSeqlensQ];
  at::Tensor const dout =
      gradients[0].defined() ? with_contiguous_rows(gradients[0]) : at::zeros_like(out);
  if (!is_plain(dout)) { return call_python(dout, {}, saved, numbers); }

  OptionalTensor const rng_state = optional(saved[kRngState]), none;
  auto const real                = [&](Number number) { return numbers[number].toDouble(); };
  auto const integer             = [&](Number number) { return numbers[number].toInt(); };
  auto const flag                = [&](Number number) { return numbers[number].toBool(); };
  at::Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  if (cu_seqlens_q.defined()) {
    varlen.call(dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, saved[kCuSeqlensK],
                integer(kMaxSeqlenQ), integer(kMaxSeqlenK), real(kDropout), real(kScale),
                flag(kCausal), integer(kLeft), integer(kRight), real(kSoftcap), none,
                flag(kDeterministic), rng_state, false, none, false, none, none);
  } else {
    dense.call(dout, q, k, v, out, lse, dq, dk, dv, real(kDropout), real(kScale), flag(kCausal),
               integer(kLeft), integer(kRight), real(kSoftcap), none, flag(kDeterministic),
               rng_state, none, false, none, none);
  }
  variable_list results;
  results.reserve(3);
  results.push_back(std::move(dq));
  results.push_back(std::move(dk));
  results.push_back(std::move(dv));
  return results;
}

// The same for compiled autograd, which hands over what FlashAttnBackward::apply_with_saved has packed.
variable_list call_backward_packed(variable_list const& gradients,
                                   std::vector<c10::IValue> const& packed) {
  variable_list const tensors = packed[0].toTensorVector();
  Tensors saved;
  std::copy(tensors.begin(), tensors.end(), saved.begin());
  Numbers numbers;
  std::copy(packed.begin() + 1, packed.end(), numbers.begin());
  return call_backward(gradients, saved, numbers);
}

class FlashAttnBackward : public torch::autograd::Node {
 public:
  explicit FlashAttnBackward(Numbers numbers) : numbers_(std::move(numbers)) {}

  std::string name() const override { return "FlashAttnBackward"; }

  void save(Saved which, at::Tensor const& tensor) {
    bool const is_output = which == kOut;
    if (tensor.defined()) { saved_[which] = SavedVariable(tensor, is_output); }
  }

  void release_variables() override {
    std::lock_guard<std::mutex> const lock(mutex_);
    for (SavedVariable& saved : saved_) { saved.reset_data(); }
    is_released_ = true;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& arguments) const override {
    arguments.collect(is_released_);
    for (SavedVariable const& saved : saved_) { arguments.collect(saved, true); }
    for (c10::IValue const& number : numbers_) { arguments.collect(number); }
  }

  // Puts a call of call_backward_packed into the graph that is being recorded, as torch::autograd::Function does.
  variable_list apply_with_saved(variable_list const& gradients,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    namespace compiled = torch::dynamo::autograd;
    for (SavedVariable& saved : saved_) { swap.before(saved); }
    for (c10::IValue& number : numbers_) { swap.before(number); }
    Tensors const tensors = unpack();
    std::vector<c10::IValue> arguments{variable_list(tensors.begin(), tensors.end())};
    arguments.insert(arguments.end(), numbers_.begin(), numbers_.end());
    std::vector<at::TypePtr> schema;
    for (c10::IValue const& argument : arguments) { schema.push_back(argument.type()); }
    auto const edges =
        compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            compiled::get_input_metadata(next_edges()));
    auto const& compiler   = compiled::getPyCompilerInterface();
    std::string const call = compiler->bind_function(
        swap.get_py_compiler(), name(), call_backward_packed, schema, /*is_custom_function=*/true,
        /*is_traceable=*/false);
    variable_list results = compiler->call_function(swap.get_py_compiler(), "apply_functional",
                                                    call, gradients, arguments, edges);
    for (SavedVariable& saved : saved_) { swap.after(saved); }
    for (c10::IValue& number : numbers_) { swap.after(number); }
    return results;
  }

 protected:
  variable_list apply(variable_list&& gradients) override {
    std::lock_guard<std::mutex> const lock(mutex_);
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "flash_attn can be differentiated once, not twice: its gradients have no gradients "
                "of their own, as create_graph=True demands");
    // First: a checkpoint's hooks run the forward pass again, with gradients.
    Tensors const saved = unpack();
    return call_backward(gradients, saved, numbers_);
  }

 private:
  Tensors unpack() {
    TORCH_CHECK(!is_released_, torch::autograd::ERR_BACKWARD_TWICE);
    std::shared_ptr<Node> const self = getptr();
    Tensors tensors;
    for (size_t i = 0; i < kSaved; ++i) { tensors[i] = saved_[i].unpack(self); }
    return tensors;
  }

  Numbers numbers_;
  std::array<SavedVariable, kSaved> saved_;
  bool is_released_ = false;
};

}  // namespace

at::Tensor attend_recorded(at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
                           Lengths const* lengths, Options const& o, bool deterministic) {
  bool const is_recorded = torch::autograd::compute_requires_grad(q, k, v);
  std::shared_ptr<FlashAttnBackward> node;
  if (is_recorded) {
    int64_t const max_seqlen_q = lengths ? lengths->max_seqlen_q : 0,
                  max_seqlen_k = lengths ? lengths->max_seqlen_k : 0;
    Numbers numbers{o.softmax_scale, o.softcap,    o.dropout_p, o.window_left, o.window_right,
                    max_seqlen_q,    max_seqlen_k, o.causal,    deterministic};
    node.reset(new FlashAttnBackward(std::move(numbers)), torch::autograd::deleteNode);
    node->set_next_edges(torch::autograd::collect_next_edges(q, k, v));
  }
  auto const [out, lse, probs, rng_state] = call_forward(q, k, v, lengths, o);
  if (!is_recorded) { return out; }
  torch::autograd::set_history(out, node);
  node->save(kQ, q), node->save(kK, k), node->save(kV, v);
  node->save(kOut, out), node->save(kLse, lse);
  if (o.dropout_p > 0) { node->save(kRngState, rng_state); }
  if (lengths) {
    node->save(kCuSeqlensQ, lengths->cu_seqlens_q), node->save(kCuSeqlensK, lengths->cu_seqlens_k);
  }
  return out;
}

}  // namespace flash
