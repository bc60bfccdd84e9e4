// Operator flash_attn::bwd on CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"

namespace flash {

std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(at::Tensor const& dout_in,
                                                   at::Tensor const& q_in, at::Tensor const& k_in,
                                                   at::Tensor const& v_in, at::Tensor const& out_in,
                                                   at::Tensor const& softmax_lse,
                                                   std::optional<at::Tensor> const& dlse_in,
                                                   double softmax_scale, bool causal,
                                                   bool deterministic) {
  check_qkv(q_in, k_in, v_in);
  check_like(dout_in, "dout", q_in, q_in.sizes());
  check_like(out_in, "out", q_in, q_in.sizes());
  check_rows(softmax_lse, "softmax_lse", q_in);
  if (dlse_in) { check_rows(*dlse_in, "dlse", q_in); }
  c10::cuda::CUDAGuard const guard(q_in.device());
  bool const negative = softmax_scale < 0;  // as in the forward pass: its sign is moved into Q
  at::Tensor const q = aligned(negative ? q_in.neg() : q_in), k = aligned(k_in), v = aligned(v_in),
                   out = aligned(out_in), dout = aligned(dout_in), lse = softmax_lse.contiguous();
  at::Tensor const dlse = dlse_in ? dlse_in->contiguous() : at::Tensor();

  at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
             dv = at::empty(v.sizes(), v.options());
  if (q.numel() == 0 || k.numel() == 0) {
    dq.zero_(), dk.zero_(), dv.zero_();
    return {dq, dk, dv};
  }
  Problem const problem = make_problem(q, k, std::abs(softmax_scale), causal);
  BwdPlan const plan    = plan_bwd(problem);
  // One allocation: dq_accum, rows, then the turns as 32-bit integers.
  at::Tensor workspace =
      at::empty({plan.dq_accum + plan.rows + (deterministic ? plan.turns : 0)}, lse.options());
  float* const base = workspace.data_ptr<float>();
  float* const rows = base + plan.dq_accum;
  BwdParams params{};
  params.problem   = problem;
  params.dout      = ref(dout);
  params.q         = ref(q);
  params.k         = ref(k);
  params.v         = ref(v);
  params.out       = ref(out);
  params.dq        = ref(dq);
  params.dk        = ref(dk);
  params.dv        = ref(dv);
  params.lse       = lse.data_ptr<float>();
  params.dlse      = dlse_in ? dlse.data_ptr<float>() : nullptr;
  params.workspace = {base, rows,
                      deterministic ? reinterpret_cast<int*>(rows + plan.rows) : nullptr};
  check_status(launch_bwd(params, c10::cuda::getCurrentCUDAStream()));
  if (negative) { dq.neg_(); }
  return {dq, dk, dv};
}

}  // namespace flash
