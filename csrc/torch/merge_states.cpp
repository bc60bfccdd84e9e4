// Operator flash_attn::_flash_attn_merge_states on CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"

namespace flash {

std::tuple<at::Tensor, at::Tensor> merge_states(at::Tensor const& out_a_in,
                                                at::Tensor const& lse_a_in,
                                                at::Tensor const& out_b_in,
                                                at::Tensor const& lse_b_in) {
  at::Tensor const out_a = aligned(out_a_in), out_b = aligned(out_b_in);
  TORCH_CHECK(
      out_a.is_cuda() && (out_a.dim() == 3 || out_a.dim() == 4),
      "out_a: must be (batch, seqlen, heads, head_dim) or (total, heads, head_dim) on CUDA; "
      "got ",
      out_a.sizes(), " on ", out_a.device());
  TORCH_CHECK(out_a.scalar_type() == at::kHalf || out_a.scalar_type() == at::kBFloat16,
              "out_a: FlashAttention only support fp16 and bf16 data type; got ",
              out_a.scalar_type());
  TORCH_CHECK(out_a.size(-1) % 8 == 0, "out_a: head_dim must be a multiple of 8; got ",
              out_a.size(-1));
  check_like(out_b, "out_b", out_a, out_a.sizes());
  check_rows(lse_a_in, "lse_a", out_a);
  check_rows(lse_b_in, "lse_b", out_a);
  c10::cuda::CUDAGuard const guard(out_a.device());
  at::Tensor const lse_a = lse_a_in.contiguous(), lse_b = lse_b_in.contiguous();
  at::Tensor out = new_like(out_a), lse = new_like(lse_a);
  bool const is_ragged = out_a.dim() == 3;
  MergeParams params{};
  Problem& problem = params.problem;
  problem.dtype    = out_a.scalar_type() == at::kHalf ? DType::kFp16 : DType::kBf16;
  problem.batch    = is_ragged ? 1 : int(out_a.size(0));
  problem.seqlen_q = int(out_a.size(is_ragged ? 0 : 1));
  problem.heads_q  = int(out_a.size(-2));
  problem.head_dim = problem.head_dim_v = int(out_a.size(-1));
  problem.lse_head_stride               = problem.seqlen_q;
  problem.lse_batch_stride              = int64_t(problem.heads_q) * problem.seqlen_q;
  params.out_a = ref(out_a), params.out_b = ref(out_b), params.out = ref(out);
  params.lse_a = lse_a.data_ptr<float>(), params.lse_b = lse_b.data_ptr<float>();
  params.lse = lse.data_ptr<float>();
  check_status(launch_merge_states(params, c10::cuda::getCurrentCUDAStream()));
  return {out, lse};
}

}  // namespace flash
