// Operators flash_attn::bwd and flash_attn::varlen_bwd, and their forms that write into given tensors, on CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"

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
  check_like(saved.dout, "dout", q_in, q_in.sizes());
  check_like(saved.out, "out", q_in, q_in.sizes());
  check_rows(saved.softmax_lse, "softmax_lse", q_in);
  if (saved.dlse) { check_rows(*saved.dlse, "dlse", q_in); }
  check_like(dq_out, "dq", q_in, q_in.sizes());
  check_like(dk_out, "dk", q_in, k_in.sizes());
  check_like(dv_out, "dv", q_in, v_in.sizes());
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

}  // namespace

void bwd_into(at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
              at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor const& dlse,
              double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
              double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
              OptionalTensor const& rng_state, bool deterministic, at::Tensor dq, at::Tensor dk,
              at::Tensor dv) {
  backward({dout, q, k, v, out, softmax_lse, dlse}, nullptr,
           {softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, dropout_p,
            rng_state},
           deterministic, dq, dk, dv);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor const& dlse,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, double dropout_p, OptionalTensor const& rng_state,
    bool deterministic) {
  at::Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  bwd_into(dout, q, k, v, out, softmax_lse, dlse, softmax_scale, causal, window_left, window_right,
           softcap, alibi_slopes, dropout_p, rng_state, deterministic, dq, dk, dv);
  return {dq, dk, dv};
}

void varlen_bwd_into(at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k,
                     at::Tensor const& v, at::Tensor const& out, at::Tensor const& softmax_lse,
                     OptionalTensor const& dlse, at::Tensor const& cu_seqlens_q,
                     at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                     double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
                     OptionalTensor const& rng_state, bool deterministic, at::Tensor dq,
                     at::Tensor dk, at::Tensor dv) {
  OptionalTensor const none;
  Lengths const lengths{cu_seqlens_q, cu_seqlens_k, none, none, max_seqlen_q, max_seqlen_k};
  backward({dout, q, k, v, out, softmax_lse, dlse}, &lengths,
           {softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, dropout_p,
            rng_state},
           deterministic, dq, dk, dv);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_bwd(
    at::Tensor const& dout, at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
    at::Tensor const& out, at::Tensor const& softmax_lse, OptionalTensor const& dlse,
    at::Tensor const& cu_seqlens_q, at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
    OptionalTensor const& rng_state, bool deterministic) {
  at::Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  varlen_bwd_into(dout, q, k, v, out, softmax_lse, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                  max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
                  alibi_slopes, dropout_p, rng_state, deterministic, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace flash
