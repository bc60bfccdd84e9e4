// Operators flash_attn::fwd and flash_attn::varlen_fwd on CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"

namespace flash {
namespace {

std::tuple<at::Tensor, at::Tensor> forward(at::Tensor const& q_in, at::Tensor const& k_in,
                                           at::Tensor const& v_in, Lengths const* lengths,
                                           Options const& options) {
  check_qkv(q_in, k_in, v_in, lengths ? 3 : 4);
  c10::cuda::CUDAGuard const guard(q_in.device());
  // The kernels' running maximum needs a positive scale: a negative one moves its sign into Q.
  at::Tensor const q = aligned(options.softmax_scale < 0 ? q_in.neg() : q_in), k = aligned(k_in),
                   v = aligned(v_in);

  at::Tensor out = new_like(q), lse = new_lse(q);
  FwdParams const params{make_problem(q, k, lengths, options),
                         ref(q),
                         ref(k),
                         ref(v),
                         ref(out),
                         lse.data_ptr<float>()};
  if (k.numel() == 0) {  // rows that see no key
    out.zero_();
    lse.fill_(std::numeric_limits<float>::infinity());
  } else if (out.numel() > 0) {
    check_status(launch_fwd(params, c10::cuda::getCurrentCUDAStream()));
  }
  return {out, lse};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> fwd(at::Tensor const& q, at::Tensor const& k,
                                       at::Tensor const& v, double softmax_scale, bool causal,
                                       int64_t window_left, int64_t window_right, double softcap,
                                       OptionalTensor const& alibi_slopes, double dropout_p,
                                       OptionalTensor const& rng_state) {
  return forward(q, k, v, nullptr,
                 {softmax_scale, causal, window_left, window_right, softcap, alibi_slopes,
                  dropout_p, rng_state});
}

std::tuple<at::Tensor, at::Tensor> varlen_fwd(
    at::Tensor const& q, at::Tensor const& k, at::Tensor const& v, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, OptionalTensor const& seqused_k,
    OptionalTensor const& leftpad_k, OptionalTensor const& block_table, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes, double dropout_p,
    OptionalTensor const& rng_state) {
  Options const options{softmax_scale, causal,       window_left, window_right,
                        softcap,       alibi_slopes, dropout_p,   rng_state};
  if (block_table) {
    OptionalTensor const cu_q = cu_seqlens_q, cu_k = cu_seqlens_k, none;
    return attend_pages(
        q, k, v, {cu_q, cu_k, max_seqlen_q, seqused_k, 0, none, leftpad_k, block_table}, options);
  }
  Lengths const lengths{cu_seqlens_q, cu_seqlens_k, seqused_k,
                        leftpad_k,    max_seqlen_q, max_seqlen_k};
  return forward(q, k, v, &lengths, options);
}

}  // namespace flash
