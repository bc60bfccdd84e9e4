// What dropout adds to the forward pass on CUDA: its random state, and S_dmask.
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

at::Tensor draw_rng_state(at::Tensor const& q, int64_t sequences) {
  // How far the generator advances for each query head of each sequence.
  constexpr int64_t kRandomNumbersPerHead = 32;
  int64_t const increment                 = sequences * q.size(-2) * kRandomNumbersPerHead;
  c10::cuda::CUDAGuard const guard(q.device());
  at::Tensor state = at::empty({2}, q.options().dtype(at::kLong));
  auto* generator  = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator(q.get_device()));
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

at::Tensor attn_probs(at::Tensor const& q_in, at::Tensor const& k_in, Lengths const* lengths,
                      Options const& options) {
  check_qkv(q_in, k_in, k_in, lengths ? 3 : 4);
  c10::cuda::CUDAGuard const guard(q_in.device());
  at::Tensor const q = aligned(options.softmax_scale < 0 ? q_in.neg() : q_in), k = aligned(k_in);
  ProbsParams params{};
  params.problem    = make_problem(q, k, lengths, options);
  auto const padded = [](int64_t rows) { return (rows + 127) / 128 * 128; };
  params.rows       = padded(lengths ? lengths->max_seqlen_q : q.size(1));
  params.columns    = padded(lengths ? lengths->max_seqlen_k : k.size(1));
  at::Tensor probs  = at::zeros(
      {params.problem.batch, params.problem.heads_q, params.rows, params.columns}, q.options());
  params.q = ref(q), params.k = ref(k), params.probs = probs.data_ptr();
  if (probs.numel() > 0 && q.numel() > 0 && k.numel() > 0) {
    check_status(launch_attn_probs(params, c10::cuda::getCurrentCUDAStream()));
  }
  return probs;
}

}  // namespace flash
