// Operator flash_attn::fwd on CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"

namespace flash {

std::tuple<at::Tensor, at::Tensor> fwd(at::Tensor const& q_in, at::Tensor const& k_in,
                                       at::Tensor const& v_in, double softmax_scale, bool causal) {
  check_qkv(q_in, k_in, v_in);
  c10::cuda::CUDAGuard const guard(q_in.device());
  // The kernels' running maximum needs a positive scale: a negative one moves its sign into Q.
  at::Tensor const q = aligned(softmax_scale < 0 ? q_in.neg() : q_in), k = aligned(k_in),
                   v = aligned(v_in);

  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  if (k.size(1) == 0) {  // rows that see no key
    out.zero_();
    lse.fill_(std::numeric_limits<float>::infinity());
  } else if (out.numel() > 0) {
    FwdParams const params{make_problem(q, k, std::abs(softmax_scale), causal),
                           ref(q),
                           ref(k),
                           ref(v),
                           ref(out),
                           lse.data_ptr<float>()};
    check_status(launch_fwd(params, c10::cuda::getCurrentCUDAStream()));
  }
  return {out, lse};
}

}  // namespace flash
