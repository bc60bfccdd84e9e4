// Attention with gradients for tensors on CUDA: the Python class _autograd.FlashAttn without Python's share of the time.
#include "torch/autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/operators.h"

namespace flash {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The operators are called by name: fake tensors and dispatch modes see them.
template <class Function>
auto find_operator(char const* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// One argument, in which torch looks for no inputs.
struct Rest {
  Options const& options;
  Lengths const* lengths;  // null for tensors with a batch dimension
  bool deterministic;
};

OptionalTensor optional(at::Tensor const& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}
at::Tensor with_contiguous_rows(at::Tensor const& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

struct FlashAttn : torch::autograd::Function<FlashAttn> {
  static variable_list forward(AutogradContext* context, at::Tensor const& q, at::Tensor const& k,
                               at::Tensor const& v, Rest const& rest) {
    static auto const dense  = find_operator<decltype(fwd)>("flash_attn::fwd");
    static auto const varlen = find_operator<decltype(varlen_fwd)>("flash_attn::varlen_fwd");
    at::AutoDispatchBelowADInplaceOrView const below_autograd;
    Options const& o       = rest.options;
    Lengths const* lengths = rest.lengths;
    auto [out, lse] =
        lengths ? varlen.call(q, k, v, lengths->cu_seqlens_q, lengths->cu_seqlens_k, {}, {}, {},
                              lengths->max_seqlen_q, lengths->max_seqlen_k, o.softmax_scale,
                              o.causal, o.window_left, o.window_right, o.softcap, o.alibi_slopes,
                              o.dropout_p, o.rng_state)
                : dense.call(q, k, v, o.softmax_scale, o.causal, o.window_left, o.window_right,
                             o.softcap, o.alibi_slopes, o.dropout_p, o.rng_state);
    at::Tensor const none;
    context->save_for_backward({q, k, v, out, lse, o.alibi_slopes.value_or(none),
                                o.rng_state.value_or(none), lengths ? lengths->cu_seqlens_q : none,
                                lengths ? lengths->cu_seqlens_k : none});
    context->set_materialize_grads(false);
    auto& data            = context->saved_data;
    data["softmax_scale"] = o.softmax_scale;
    data["causal"]        = o.causal;
    data["window_left"]   = o.window_left;
    data["window_right"]  = o.window_right;
    data["softcap"]       = o.softcap;
    data["dropout_p"]     = o.dropout_p;
    data["deterministic"] = rest.deterministic;
    if (lengths) {
      data["max_seqlen_q"] = lengths->max_seqlen_q;
      data["max_seqlen_k"] = lengths->max_seqlen_k;
    }
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, variable_list const& gradients) {
    static auto const dense  = find_operator<decltype(bwd)>("flash_attn::bwd");
    static auto const varlen = find_operator<decltype(varlen_bwd)>("flash_attn::varlen_bwd");
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "flash_attn can be differentiated once, not twice: its gradients have no gradients "
                "of their own, as create_graph=True demands");
    // First: a checkpoint's hooks run the forward pass again, with gradients.
    variable_list const saved = context->get_saved_variables();
    // Without the fallback that would box the arguments.
    at::AutoDispatchBelowADInplaceOrView const below_autograd;
    at::Tensor const &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4],
                     &cu_seqlens_q = saved[7], &cu_seqlens_k = saved[8];
    OptionalTensor const alibi_slopes = optional(saved[5]), rng_state = optional(saved[6]),
                         dlse = optional(gradients[1].defined() ? gradients[1].contiguous()
                                                                : gradients[1]);
    at::Tensor const dout =
        gradients[0].defined() ? with_contiguous_rows(gradients[0]) : at::zeros_like(out);
    auto& data         = context->saved_data;
    auto const integer = [&](char const* name) { return data.at(name).toInt(); };
    auto const real    = [&](char const* name) { return data.at(name).toDouble(); };
    auto const flag    = [&](char const* name) { return data.at(name).toBool(); };
    auto [dq, dk, dv] =
        cu_seqlens_q.defined()
            ? varlen.call(dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k,
                          integer("max_seqlen_q"), integer("max_seqlen_k"), real("softmax_scale"),
                          flag("causal"), integer("window_left"), integer("window_right"),
                          real("softcap"), alibi_slopes, real("dropout_p"), rng_state,
                          flag("deterministic"))
            : dense.call(dout, q, k, v, out, lse, dlse, real("softmax_scale"), flag("causal"),
                         integer("window_left"), integer("window_right"), real("softcap"),
                         alibi_slopes, real("dropout_p"), rng_state, flag("deterministic"));
    return {dq, dk, dv, at::Tensor()};
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> attend(at::Tensor const& q, at::Tensor const& k,
                                          at::Tensor const& v, double softmax_scale, bool causal,
                                          int64_t window_left, int64_t window_right, double softcap,
                                          OptionalTensor const& alibi_slopes, double dropout_p,
                                          OptionalTensor const& rng_state, bool deterministic) {
  Options const options{softmax_scale, causal,       window_left, window_right,
                        softcap,       alibi_slopes, dropout_p,   rng_state};
  variable_list const results = FlashAttn::apply(q, k, v, Rest{options, nullptr, deterministic});
  return {results[0], results[1]};
}

std::tuple<at::Tensor, at::Tensor> varlen_attend(
    at::Tensor const& q, at::Tensor const& k, at::Tensor const& v, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, double dropout_p, OptionalTensor const& rng_state,
    bool deterministic) {
  OptionalTensor const none;
  Options const options{softmax_scale, causal,       window_left, window_right,
                        softcap,       alibi_slopes, dropout_p,   rng_state};
  Lengths const lengths{cu_seqlens_q, cu_seqlens_k, none, none, max_seqlen_q, max_seqlen_k};
  variable_list const results = FlashAttn::apply(q, k, v, Rest{options, &lengths, deterministic});
  return {results[0], results[1]};
}

}  // namespace flash
