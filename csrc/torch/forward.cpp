// Operators flash_attn::_flash_attn_forward and flash_attn::_flash_attn_varlen_forward on CUDA.
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

std::tuple<at::Tensor, at::Tensor> attend(at::Tensor const& q_in, at::Tensor const& k_in,
                                          at::Tensor const& v_in, Lengths const* lengths,
                                          Options const& options) {
  check_qkv(q_in, k_in, v_in, lengths ? 3 : 4);
  c10::cuda::CUDAGuard const guard(q_in.device());
  // The kernels' running maximum needs a positive scale: a negative one moves its sign into Q.
  at::Tensor q = aligned(options.softmax_scale < 0 ? q_in.neg() : q_in), k = aligned(k_in),
             v = aligned(v_in);
  if (v.size(-1) !=
      q.size(-1)) {  // sm90 alone has kernels: nothing else takes what TMA cannot address
    q = with_rows_apart(q), k = with_rows_apart(k), v = with_rows_apart(v);
  }
  at::Tensor out = new_out(q, v), lse = new_lse(q);
  FwdParams params{make_problem(q, k, lengths, options),
                   ref(q),
                   ref(k),
                   ref(v),
                   ref(out),
                   lse.data_ptr<float>()};
  params.problem.head_dim_v = int(v.size(-1));
  if (k.numel() == 0) {  // rows that see no key
    out.zero_();
    lse.fill_(std::numeric_limits<float>::infinity());
  } else if (out.numel() > 0) {
    check_status(launch_fwd(params, c10::cuda::getCurrentCUDAStream()));
  }
  return {out, lse};
}

// What dropout needs: a given state, as a tensor that is the result's own, or a new one; without dropout an empty tensor.
at::Tensor rng_state_of(at::Tensor const& q, int64_t sequences, double dropout_p,
                        OptionalTensor const& given) {
  if (!(dropout_p > 0)) { return new_tensor({0}, at::kLong, q); }
  return given ? given->clone() : draw_rng_state(q, sequences);
}

}  // namespace

ForwardResults flash_attn_forward(at::Tensor const& q, at::Tensor const& k, at::Tensor const& v,
                                  double dropout_p, double softmax_scale, bool causal,
                                  int64_t window_left, int64_t window_right, double softcap,
                                  OptionalTensor const& alibi_slopes, bool return_softmax,
                                  OptionalTensor const& rng_state,
                                  OptionalTensor const& softmax_scale_tensor,
                                  OptionalTensor const& softcap_tensor, bool /*deterministic*/) {
  check_qkv(q, k, v, 4);
  at::Tensor const state     = rng_state_of(q, q.size(0), dropout_p, rng_state);
  OptionalTensor const drawn = state;
  Options const options{number(softmax_scale, softmax_scale_tensor, "softmax_scale_tensor"),
                        causal,
                        window_left,
                        window_right,
                        number(softcap, softcap_tensor, "softcap_tensor"),
                        alibi_slopes,
                        dropout_p,
                        drawn};
  auto [out, lse]        = attend(q, k, v, nullptr, options);
  at::Tensor const probs = return_softmax && dropout_p > 0 ? attn_probs(q, k, nullptr, options)
                                                           : new_tensor({0}, q.scalar_type(), q);
  return {out, lse, probs, state};
}

ForwardResults flash_attn_varlen_forward(
    at::Tensor const& q, at::Tensor const& k, at::Tensor const& v, at::Tensor const& cu_seqlens_q,
    at::Tensor const& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap,
    OptionalTensor const& alibi_slopes, bool return_softmax, OptionalTensor const& block_table,
    OptionalTensor const& leftpad_k, OptionalTensor const& seqused_k, bool /*zero_tensors*/,
    int64_t num_splits, OptionalTensor const& rng_state, OptionalTensor const& softmax_scale_tensor,
    OptionalTensor const& softcap_tensor, bool /*deterministic*/) {
  bool const wants_probs = return_softmax && dropout_p > 0;
  TORCH_CHECK(!wants_probs || !(seqused_k || leftpad_k || block_table),
              "return_softmax: S_dmask is not available with seqused_k, leftpad_k or block_table");
  TORCH_CHECK(q.is_cuda(), "q must be on CUDA; got ", q.device());
  at::Tensor const state     = rng_state_of(q, cu_seqlens_q.numel() - 1, dropout_p, rng_state);
  OptionalTensor const drawn = state;
  Options const options{number(softmax_scale, softmax_scale_tensor, "softmax_scale_tensor"),
                        causal,
                        window_left,
                        window_right,
                        number(softcap, softcap_tensor, "softcap_tensor"),
                        alibi_slopes,
                        dropout_p,
                        drawn};
  at::Tensor probs = new_tensor({0}, q.scalar_type(), q);
  if (block_table) {
    OptionalTensor const cu_q = cu_seqlens_q, cu_k = cu_seqlens_k, none;
    auto [out, lse] = attend_pages(
        q, k, v, {cu_q, cu_k, max_seqlen_q, seqused_k, 0, none, leftpad_k, block_table}, options,
        num_splits);
    return {out, lse, probs, state};
  }
  Lengths const lengths{cu_seqlens_q, cu_seqlens_k, seqused_k,
                        leftpad_k,    max_seqlen_q, max_seqlen_k};
  auto [out, lse] = attend(q, k, v, &lengths, options);
  if (wants_probs) { probs = attn_probs(q, k, &lengths, options); }
  return {out, lse, probs, state};
}

}  // namespace flash
