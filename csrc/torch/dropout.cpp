// Operators flash_attn::draw_rng_state and flash_attn::attn_probs on CUDA.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <mutex>

#include "torch/arguments.h"
#include "torch/checks.h"
#include "torch/convert.h"
#include "torch/operators.h"

namespace flash {

at::Tensor draw_rng_state(at::Tensor const& like, int64_t increment) {
  TORCH_CHECK(like.is_cuda(), "like must be on CUDA; got ", like.device());
  TORCH_CHECK(increment >= 0, "increment must not be negative; got ", increment);
  c10::cuda::CUDAGuard const guard(like.device());
  at::Tensor state = at::empty({2}, like.options().dtype(at::kLong));
  auto* generator  = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator(like.get_device()));
  at::PhiloxCudaState drawn;
  {
    std::lock_guard<std::mutex> lock(generator->mutex_);
    drawn = generator->philox_cuda_state(uint64_t(increment));
  }
  // While a CUDA graph is captured, seed and offset are where its replays will find them.
  RngSource const source =
      drawn.captured_ ? RngSource{0, drawn.offset_intragraph_, drawn.seed_.ptr, drawn.offset_.ptr}
                      : RngSource{drawn.seed_.val, drawn.offset_.val, nullptr, nullptr};
  check_status(
      launch_write_rng_state(source, state.data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
  return state;
}

at::Tensor attn_probs(at::Tensor const& q_in, at::Tensor const& k_in,
                      OptionalTensor const& cu_seqlens_q, OptionalTensor const& cu_seqlens_k,
                      int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
                      int64_t window_left, int64_t window_right, double softcap,
                      OptionalTensor const& alibi_slopes, double dropout_p,
                      at::Tensor const& rng_state_in) {
  TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
              "cu_seqlens_q and cu_seqlens_k: both or none");
  check_qkv(q_in, k_in, k_in, cu_seqlens_q ? 3 : 4);
  c10::cuda::CUDAGuard const guard(q_in.device());
  at::Tensor const q = aligned(softmax_scale < 0 ? q_in.neg() : q_in), k = aligned(k_in);
  OptionalTensor const rng_state = rng_state_in, none;
  Options const options{softmax_scale, causal,       window_left, window_right,
                        softcap,       alibi_slopes, dropout_p,   rng_state};
  std::optional<Lengths> lengths;
  if (cu_seqlens_q) {
    lengths.emplace(Lengths{*cu_seqlens_q, *cu_seqlens_k, none, none, max_seqlen_q, max_seqlen_k});
  }
  ProbsParams params{};
  params.problem    = make_problem(q, k, lengths ? &*lengths : nullptr, options);
  auto const padded = [](int64_t rows) { return (rows + 127) / 128 * 128; };
  params.rows = padded(max_seqlen_q), params.columns = padded(max_seqlen_k);
  at::Tensor probs = at::zeros(
      {params.problem.batch, params.problem.heads_q, params.rows, params.columns}, q.options());
  params.q = ref(q), params.k = ref(k), params.probs = probs.data_ptr();
  if (probs.numel() > 0 && q.numel() > 0 && k.numel() > 0) {
    check_status(launch_attn_probs(params, c10::cuda::getCurrentCUDAStream()));
  }
  return probs;
}

}  // namespace flash
