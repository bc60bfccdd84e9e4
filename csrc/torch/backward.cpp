// Operators flash_attn::_flash_attn_backward and flash_attn::_flash_attn_varlen_backward on CUDA, which write into given tensors, and
// their functional forms.
#include <ATen/ATen.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"
#include "torch/overlap.h"

namespace flash {
namespace {

// What the forward pass read and wrote, and the gradients of its results.
struct Saved {
  at::Tensor const &dout, &q, &k, &v, &out, &softmax_lse;
  OptionalTensor const& dlse;
};

// Every element of dq, dk and dv is written.
void backward(Saved const& saved, Lengths const* lengths, Options const& options,
              bool deterministic, at::Tensor const& dq_out, at::Tensor const& dk_out,
              at::Tensor const& dv_out) {
  at::Tensor const &q_in = saved.q, &k_in = saved.k, &v_in = saved.v;
  check_qkv(q_in, k_in, v_in, lengths ? 3 : 4);
  TORCH_CHECK(
      v_in.size(-1) == q_in.size(-1),
      "v: its head_dim must equal q's in the backward pass, which has no kernels where they "
      "differ; got ",
      v_in.size(-1), " and ", q_in.size(-1));
  check_like(saved.dout, "dout", q_in, q_in.sizes());
  check_like(saved.out, "out", q_in, q_in.sizes());
  check_rows(saved.softmax_lse, "softmax_lse", q_in);
  if (saved.dlse) { check_rows(*saved.dlse, "dlse", q_in); }
  check_like(dq_out, "dq", q_in, q_in.sizes());
  check_like(dk_out, "dk", q_in, k_in.sizes());
  check_like(dv_out, "dv", q_in, v_in.sizes());
  check_written({{"dq", dq_out}, {"dk", dk_out}, {"dv", dv_out}},
                {{"dout", saved.dout}, {"q", q_in}, {"k", k_in}, {"v", v_in}, {"out", saved.out}});
  c10::cuda::CUDAGuard const guard(q_in.device());
  bool const negative =
      options.softmax_scale < 0;  // as in the forward pass: its sign is moved into Q
  at::Tensor const q = aligned(negative ? q_in.neg() : q_in), k = aligned(k_in), v = aligned(v_in),
                   out = aligned(saved.out), dout = aligned(saved.dout),
                   lse  = saved.softmax_lse.contiguous(),
                   dlse = saved.dlse ? saved.dlse->contiguous() : at::Tensor();
  Problem const problem = make_problem(q, k, lengths, options);
  if (q.numel() == 0 || k.numel() == 0) {
    dq_out.zero_(), dk_out.zero_(), dv_out.zero_();
    return;
  }
  auto const writable = [](at::Tensor const& tensor) {
    return is_aligned(tensor) ? tensor : new_like(tensor);
  };
  at::Tensor const dq = writable(dq_out), dk = writable(dk_out), dv = writable(dv_out);

  BwdParams params{};
  params.problem       = problem;
  params.dout          = ref(dout);
  params.q             = ref(q);
  params.k             = ref(k);
  params.v             = ref(v);
  params.out           = ref(out);
  params.dq            = ref(dq);
  params.dk            = ref(dk);
  params.dv            = ref(dv);
  params.lse           = lse.data_ptr<float>();
  params.dlse          = saved.dlse ? dlse.data_ptr<float>() : nullptr;
  params.deterministic = deterministic;
  Plan const plan      = plan_bwd(params);
  c10::DataPtr const workspace =
      c10::cuda::CUDACachingAllocator::get()->allocate(size_t(plan.workspace_bytes));
  check_status(launch_bwd(params, plan, workspace.get(), c10::cuda::getCurrentCUDAStream()));
  if (!dq.is_same(dq_out)) { dq_out.copy_(dq); }
  if (!dk.is_same(dk_out)) { dk_out.copy_(dk); }
  if (!dv.is_same(dv_out)) { dv_out.copy_(dv); }
  if (negative) { dq_out.neg_(); }
}

at::Tensor given_or_new(OptionalTensor const& given, at::Tensor const& like) {
  return given ? *given : new_like(like);
}

// rowsum(dout * out), (..., heads, rows), with zeros up to columns in the last dimension.
at::Tensor softmax_d(at::Tensor const& dout, at::Tensor const& out, int64_t columns) {
  at::Tensor const sums = (dout.to(at::kFloat) * out.to(at::kFloat)).sum(-1).transpose(-1, -2);
  return at::constant_pad_nd(sums, {0, columns - sums.size(-1)}).contiguous();
}

constexpr int64_t kSoftmaxDRound = 128;

}  // namespace

at::Tensor flash_attn_backward(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor dq, OptionalTensor dk,
    OptionalTensor dv, double dropout_p, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, bool deterministic,
    OptionalTensor const& rng_state, OptionalTensor const& dlse, bool return_softmax_d,
    OptionalTensor const& softmax_scale_tensor, OptionalTensor const& softcap_tensor) {
  backward({dout, q, k, v, out, softmax_lse, dlse}, nullptr,
           {number(softmax_scale, softmax_scale_tensor, "softmax_scale_tensor"), causal,
            window_left, window_right, number(softcap, softcap_tensor, "softcap_tensor"),
            alibi_slopes, dropout_p, rng_state},
           deterministic, given_or_new(dq, q), given_or_new(dk, k), given_or_new(dv, v));
  if (!return_softmax_d) { return new_tensor({0}, at::kFloat, q); }
  int64_t const rows = (q.size(1) + kSoftmaxDRound - 1) / kSoftmaxDRound * kSoftmaxDRound;
  return softmax_d(dout, out, rows);
}

Gradients flash_attn_backward_functional(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, double dropout_p, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, bool deterministic, OptionalTensor const& rng_state,
    OptionalTensor const& dlse, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor) {
  at::Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                      window_left, window_right, softcap, alibi_slopes, deterministic, rng_state,
                      dlse, false, softmax_scale_tensor, softcap_tensor);
  return {dq, dk, dv};
}

at::Tensor flash_attn_varlen_backward(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor dq, OptionalTensor dk,
    OptionalTensor dv, at::Tensor const& cu_seqlens_q, at::Tensor const& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p, double softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, double softcap, OptionalTensor const& alibi_slopes,
    bool deterministic, OptionalTensor const& rng_state, bool /*zero_tensors*/,
    OptionalTensor const& dlse, bool return_softmax_d, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor) {
  OptionalTensor const none;
  Lengths const lengths{cu_seqlens_q, cu_seqlens_k, none, none, max_seqlen_q, max_seqlen_k};
  backward({dout, q, k, v, out, softmax_lse, dlse}, &lengths,
           {number(softmax_scale, softmax_scale_tensor, "softmax_scale_tensor"), causal,
            window_left, window_right, number(softcap, softcap_tensor, "softcap_tensor"),
            alibi_slopes, dropout_p, rng_state},
           deterministic, given_or_new(dq, q), given_or_new(dk, k), given_or_new(dv, v));
  if (!return_softmax_d) { return new_tensor({0}, at::kFloat, q); }
  return softmax_d(dout, out, q.size(0) + kSoftmaxDRound * lengths.batch());
}

Gradients flash_attn_varlen_backward_functional(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, bool deterministic, OptionalTensor const& rng_state,
    OptionalTensor const& dlse, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor) {
  at::Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q,
                             cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                             causal, window_left, window_right, softcap, alibi_slopes,
                             deterministic, rng_state, false, dlse, false, softmax_scale_tensor,
                             softcap_tensor);
  return {dq, dk, dv};
}

}  // namespace flash
