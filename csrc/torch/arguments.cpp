// From the operators' arguments to a Problem.
#include "torch/arguments.h"

#include <cmath>

#include "host/prepare.h"
#include "torch/checks.h"
#include "torch/convert.h"

namespace flash {
namespace {

int window_side(int64_t keys) { return keys < 0 || keys >= kUnlimited ? kUnlimited : int(keys); }

// A side that reaches beyond the longest sequence is no limit: left of the last query lie seqlen_k - 1 keys, right of the first
// seqlen_q - 1.
void resolve_mask(Problem& problem, Options const& options) {
  int left = window_side(options.window_left), right = window_side(options.window_right);
  if (options.causal) { right = 0; }
  if (left >= problem.seqlen_k - 1) { left = kUnlimited; }
  if (right >= problem.seqlen_q - 1) { right = kUnlimited; }
  problem.window_left = left, problem.window_right = right;
  problem.mask = left != kUnlimited    ? MaskKind::kLocal
                 : right == kUnlimited ? MaskKind::kNone
                 : right == 0          ? MaskKind::kCausal
                                       : MaskKind::kLocal;
}

void set_alibi(Problem& problem, at::Tensor const& slopes, at::Tensor const& q) {
  check_device(slopes, "alibi_slopes", q);
  TORCH_CHECK(slopes.scalar_type() == at::kFloat, "ALiBi slopes must have dtype fp32; got ",
              slopes.scalar_type());
  bool const shared = slopes.sizes() == at::IntArrayRef({problem.heads_q});
  TORCH_CHECK(shared || slopes.sizes() == at::IntArrayRef({problem.batch, problem.heads_q}),
              "alibi_slopes: must have shape (heads) = (", problem.heads_q,
              ") or (batch, heads) = (", problem.batch, ", ", problem.heads_q, "); got ",
              slopes.sizes());
  TORCH_CHECK(has_contiguous_rows(slopes),
              "ALiBi slopes tensor must have contiguous last dimension; got strides ",
              slopes.strides());
  problem.alibi_slopes       = slopes.data_ptr<float>();
  problem.alibi_batch_stride = shared ? 0 : slopes.stride(0);
}

void set_dropout(Problem& problem, Options const& options, at::Tensor const& q) {
  double const p     = options.dropout_p;
  problem.keep_scale = problem.keep_share = 1.f, problem.keep_log2 = 0.f;
  TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p must be in [0, 1): Expected p_dropout < 1; got ", p);
  constexpr double kChoices = 65536.0;  // 16 bits per weight
  double const kept         = std::nearbyint((1.0 - p) * kChoices);
  if (p == 0.0 || kept >= kChoices) { return; }
  TORCH_CHECK(options.rng_state, "rng_state: dropout_p = ", p,
              " needs the seed and offset that the forward pass used; got None");
  at::Tensor const& state = *options.rng_state;
  check_device(state, "rng_state", q);
  TORCH_CHECK(state.scalar_type() == at::kLong && state.sizes() == at::IntArrayRef({2}) &&
                  state.is_contiguous(),
              "rng_state: must be int64 of shape (2), contiguous; got ", state.scalar_type(),
              " of shape ", state.sizes());
  problem.rng_state  = state.data_ptr<int64_t>();
  problem.keep       = keep_rule(int(kept));
  problem.keep_scale = float(1.0 / (1.0 - p));
  problem.keep_share = float(1.0 - p);
  problem.keep_log2  = float(-std::log2(1.0 - p));
}

void set_lengths(Problem& problem, Lengths const& lengths, at::Tensor const& q,
                 at::Tensor const& k) {
  int64_t const batch = lengths.batch();
  check_integers(lengths.cu_seqlens_q, "cu_seqlens_q", q, batch + 1);
  check_integers(lengths.cu_seqlens_k, "cu_seqlens_k", q, batch + 1);
  TORCH_CHECK(batch > 0, "cu_seqlens_q: batch size must be positive; got ",
              lengths.cu_seqlens_q.sizes());
  if (lengths.seqused_k) { check_integers(*lengths.seqused_k, "seqused_k", q, batch); }
  if (lengths.leftpad_k) { check_integers(*lengths.leftpad_k, "leftpad_k", q, batch); }
  auto const data = [](OptionalTensor const& tensor) {
    return tensor ? tensor->data_ptr<int>() : nullptr;
  };
  problem.cu_seqlens_q = lengths.cu_seqlens_q.data_ptr<int>();
  problem.cu_seqlens_k = lengths.cu_seqlens_k.data_ptr<int>();
  problem.seqused_k    = data(lengths.seqused_k);
  problem.leftpad_k    = data(lengths.leftpad_k);
  problem.total_q      = int(q.size(0));
  problem.total_k      = int(k.size(0));
}

}  // namespace

double number(double given, OptionalTensor const& tensor, char const* name) {
  if (!tensor) { return given; }
  TORCH_CHECK(tensor->numel() == 1 && !tensor->is_complex() && tensor->scalar_type() != at::kBool,
              name, ": must have one real number; got ", tensor->scalar_type(), " of shape ",
              tensor->sizes());
  return tensor->item().toDouble();
}

Problem make_problem(at::Tensor const& q, bool is_ragged, ProblemShape const& shape,
                     Options const& options) {
  TORCH_CHECK(shape.seqlen_q < kUnlimited && shape.seqlen_k < kUnlimited,
              "q and k: at most 2^30 rows; got ", shape.seqlen_q, " and ", shape.seqlen_k);
  Problem problem{};
  problem.dtype    = q.scalar_type() == at::kHalf ? DType::kFp16 : DType::kBf16;
  problem.batch    = int(shape.batch);
  problem.heads_q  = int(q.size(-2));
  problem.heads_kv = int(shape.heads_kv);
  problem.head_dim = problem.head_dim_v = int(q.size(-1));
  problem.seqlen_q                      = int(shape.seqlen_q);
  problem.seqlen_k                      = int(shape.seqlen_k);
  problem.scale                         = float(std::abs(options.softmax_scale));
  TORCH_CHECK(options.softcap >= 0.0, "softcap must be 0 (off) or positive; got ", options.softcap);
  problem.softcap = float(options.softcap);
  problem.unit    = score_unit(problem.scale, problem.softcap);
  if (is_ragged) {
    problem.lse_head_stride = q.size(0);
  } else {
    problem.lse_head_stride  = problem.seqlen_q;
    problem.lse_batch_stride = int64_t(problem.heads_q) * problem.seqlen_q;
  }
  resolve_mask(problem, options);
  if (options.alibi_slopes) { set_alibi(problem, *options.alibi_slopes, q); }
  set_dropout(problem, options, q);
  return problem;
}

Problem make_problem(at::Tensor const& q, at::Tensor const& k, Lengths const* lengths,
                     Options const& options) {
  if (!lengths) {
    return make_problem(q, false, {q.size(0), k.size(-2), q.size(1), k.size(1)}, options);
  }
  TORCH_CHECK(q.size(0) < kUnlimited && k.size(0) < kUnlimited, "q and k: at most 2^30 rows; got ",
              q.sizes(), " and ", k.sizes());
  Problem problem = make_problem(
      q, true, {lengths->batch(), k.size(-2), lengths->max_seqlen_q, lengths->max_seqlen_k},
      options);
  set_lengths(problem, *lengths, q, k);
  return problem;
}

}  // namespace flash
