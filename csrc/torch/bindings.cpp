// The extension module: importing it registers the CUDA operators; build_info() says what this build holds.
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <sstream>
#include <string>
#include <vector>

#include "flash.h"
#include "torch/convert.h"
#include "torch/fast_path/fast_path.h"
#include "torch/operators.h"
#include "torch/overlap.h"

TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  m.impl("_flash_attn_forward", &flash::flash_attn_forward);
  m.impl("_flash_attn_varlen_forward", &flash::flash_attn_varlen_forward);
  m.impl("_flash_attn_backward", &flash::flash_attn_backward);
  m.impl("_flash_attn_backward.functional", &flash::flash_attn_backward_functional);
  m.impl("_flash_attn_varlen_backward", &flash::flash_attn_varlen_backward);
  m.impl("_flash_attn_varlen_backward.functional", &flash::flash_attn_varlen_backward_functional);
  m.impl("_flash_attn_kvcache", &flash::flash_attn_kvcache);
  m.impl("_flash_attn_kvcache.append", &flash::flash_attn_kvcache_append);
  m.impl("merge_states", &flash::merge_states);
}

namespace {

pybind11::list integers(char const* text) {
  pybind11::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) { parts.append(std::stoi(part)); }
  return parts;
}

// Each value once, in the order of the kernels.
template <class Get>
pybind11::list values_of(flash::BuildInfo const& info, Get get) {
  pybind11::list values;
  for (int i = 0; i < info.kernel_count; ++i) {
    pybind11::object const value = pybind11::cast(get(info.kernels[i]));
    if (!values.contains(value)) { values.append(value); }
  }
  return values;
}

int smem_kb_of(int device) {
  int bytes = 0;
  cudaError_t const code =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  TORCH_CHECK(code == cudaSuccess, "device: ", device, ": ", cudaGetErrorString(code));
  return bytes / 1024;
}

pybind11::dict build_info() {
  flash::BuildInfo const info = flash::build_info();
  pybind11::dict result;
  using Kernel        = flash::KernelInfo;
  result["archs"]     = integers(info.archs);
  result["smem_kb"]   = integers(info.smem_kb);
  result["head_dims"] = values_of(info, [](Kernel const& kernel) { return kernel.head_dim; });
  result["dtypes"]    = values_of(info, [](Kernel const& kernel) { return kernel.dtype; });
  result["kernels"]   = values_of(info, [](Kernel const& kernel) {
    return std::make_tuple(kernel.isa, kernel.pass, kernel.head_dim, kernel.dtype);
  });
  pybind11::list own;
  for (int i = 0; i < info.kernel_count; ++i) {
    Kernel const& kernel = info.kernels[i];
    if (kernel.head_dim_v == kernel.head_dim) { continue; }
    pybind11::object const pair =
        pybind11::make_tuple(kernel.isa, kernel.pass, kernel.head_dim, kernel.head_dim_v);
    if (!own.contains(pair)) { own.append(pair); }
  }
  result["value_head_dims"] = own;
  result["isa"]             = flash::pinned_isa();
  result["cuda_version"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  result["cutlass_version"] = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) +
                              "." + std::to_string(CUTLASS_PATCH);
  return result;
}

// The positional entry points that other libraries call on flash_attn_2_cuda.  They are thin: the operators check their arguments.

using Tensors = std::vector<at::Tensor>;
using flash::OptionalTensor;

// pybind11 hands over torch generators as objects; as in flash-attn 2.8.4, only None is taken.
void check_generator(pybind11::object const& generator) {
  TORCH_CHECK(generator.is_none(),
              "gen_: The `generator` argument is no longer supported; torch's default generator is "
              "used");
}

// The result has q's shape, with v's head dimension, and q's dtype.  Checked before anything is launched.
void check_out(OptionalTensor const& out_, at::Tensor const& q, at::Tensor const& v) {
  if (!out_) { return; }
  at::DimVector shape(q.sizes());
  if (q.dim() > 0 && v.dim() > 0) { shape.back() = v.size(-1); }
  TORCH_CHECK(out_->sizes() == shape && out_->scalar_type() == q.scalar_type(),
              "out_: must have shape ", at::IntArrayRef(shape), " and dtype ", q.scalar_type(),
              "; got ", out_->sizes(), " and ", out_->scalar_type());
  flash::check_written({{"out_", *out_}});
}

// Other libraries count on two numbers without dropout, too.
at::Tensor two_numbers(at::Tensor const& rng_state) {
  return rng_state.numel() > 0 ? rng_state : at::zeros({2}, rng_state.options());
}

Tensors fwd(at::Tensor q, at::Tensor k, at::Tensor v, OptionalTensor out_,
            OptionalTensor alibi_slopes, double p_dropout, double softmax_scale, bool causal,
            int64_t left, int64_t right, double softcap, bool return_softmax,
            pybind11::object generator) {
  check_generator(generator);
  check_out(out_, q, v);
  TORCH_CHECK(!return_softmax || p_dropout > 0,
              "return_softmax is only supported when p_dropout > 0.0");
  auto [out, lse, probs, rng_state] =
      flash::flash_attn_forward(q, k, v, p_dropout, softmax_scale, causal, left, right, softcap,
                                alibi_slopes, return_softmax, {}, {}, {}, false);
  if (out_) { out_->copy_(out); }
  return {out_ ? *out_ : out, lse, probs, two_numbers(rng_state)};
}

Tensors varlen_fwd(at::Tensor q, at::Tensor k, at::Tensor v, OptionalTensor out_,
                   at::Tensor cu_seqlens_q, at::Tensor cu_seqlens_k, OptionalTensor seqused_k,
                   OptionalTensor leftpad_k, OptionalTensor block_table,
                   OptionalTensor alibi_slopes, int64_t max_seqlen_q, int64_t max_seqlen_k,
                   double p_dropout, double softmax_scale, bool zero_tensors, bool causal,
                   int64_t left, int64_t right, double softcap, bool return_softmax,
                   pybind11::object generator, int64_t num_splits) {
  check_generator(generator);
  check_out(out_, q, v);
  TORCH_CHECK(!return_softmax || p_dropout > 0,
              "return_softmax is only supported when p_dropout > 0.0");
  auto [out, lse, probs, rng_state] = flash::flash_attn_varlen_forward(
      q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale,
      causal, left, right, softcap, alibi_slopes, return_softmax, block_table, leftpad_k, seqused_k,
      zero_tensors, num_splits, {}, {}, {}, false);
  if (out_) { out_->copy_(out); }
  return {out_ ? *out_ : out, lse, probs, two_numbers(rng_state)};
}

at::Tensor given_or_new(OptionalTensor const& given, at::Tensor const& like) {
  return given ? *given : at::empty(like.sizes(), like.options());
}

Tensors bwd(at::Tensor dout, at::Tensor q, at::Tensor k, at::Tensor v, at::Tensor out,
            at::Tensor softmax_lse, OptionalTensor dq_, OptionalTensor dk_, OptionalTensor dv_,
            OptionalTensor alibi_slopes, double p_dropout, double softmax_scale, bool causal,
            int64_t left, int64_t right, double softcap, bool deterministic,
            pybind11::object generator, OptionalTensor rng_state) {
  check_generator(generator);
  at::Tensor dq = given_or_new(dq_, q), dk = given_or_new(dk_, k), dv = given_or_new(dv_, v);
  at::Tensor softmax_d = flash::flash_attn_backward(
      dout, q, k, v, out, softmax_lse, dq, dk, dv, p_dropout, softmax_scale, causal, left, right,
      softcap, alibi_slopes, deterministic, rng_state, {}, true, {}, {});
  return {dq, dk, dv, softmax_d};
}

Tensors varlen_bwd(at::Tensor dout, at::Tensor q, at::Tensor k, at::Tensor v, at::Tensor out,
                   at::Tensor softmax_lse, OptionalTensor dq_, OptionalTensor dk_,
                   OptionalTensor dv_, at::Tensor cu_seqlens_q, at::Tensor cu_seqlens_k,
                   OptionalTensor alibi_slopes, int64_t max_seqlen_q, int64_t max_seqlen_k,
                   double p_dropout, double softmax_scale, bool zero_tensors, bool causal,
                   int64_t left, int64_t right, double softcap, bool deterministic,
                   pybind11::object generator, OptionalTensor rng_state) {
  check_generator(generator);
  at::Tensor dq = given_or_new(dq_, q), dk = given_or_new(dk_, k), dv = given_or_new(dv_, v);
  at::Tensor softmax_d = flash::flash_attn_varlen_backward(
      dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
      max_seqlen_k, p_dropout, softmax_scale, causal, left, right, softcap, alibi_slopes,
      deterministic, rng_state, zero_tensors, {}, true, {}, {});
  return {dq, dk, dv, softmax_d};
}

Tensors fwd_kvcache(at::Tensor q, at::Tensor k_cache, at::Tensor v_cache, OptionalTensor k,
                    OptionalTensor v, OptionalTensor seqlens_k, OptionalTensor rotary_cos,
                    OptionalTensor rotary_sin, OptionalTensor cache_batch_idx,
                    OptionalTensor leftpad_k, OptionalTensor block_table,
                    OptionalTensor alibi_slopes, OptionalTensor out_, double softmax_scale,
                    bool causal, int64_t left, int64_t right, double softcap,
                    bool rotary_interleaved, int64_t num_splits) {
  check_out(out_, q, q);
  TORCH_CHECK(k.has_value() == v.has_value(),
              "k and v: If key is supplied, value must also be passed in");
  TORCH_CHECK(!k || seqlens_k, "seqlens_k: If key is supplied, seqlens_k must also be passed in");
  TORCH_CHECK(k || !rotary_cos,
              "k: If rotary cos/sin are provided, new key / value to be appended to KV cache must "
              "also be provided");
  if (k_cache.size(-1) % 8 != 0) {  // flash_attn_with_kvcache warns by itself, through Python
    TORCH_WARN_ONCE("k_cache: its head_dim ", k_cache.size(-1),
                    " is no multiple of 8, so that every call copies what it uses of k_cache and "
                    "v_cache; caches of zeros whose head_dim is the next multiple of 8 are used "
                    "where they are");
  }
  int64_t const capacity = k_cache.size(1) * (block_table ? block_table->size(1) : 1);
  auto [out, lse] =
      k ? flash::flash_attn_kvcache_append(
              q, k_cache, v_cache, *k, *v, rotary_cos, rotary_sin, rotary_interleaved, {},
              q.size(1), seqlens_k, capacity, cache_batch_idx, leftpad_k, block_table,
              softmax_scale, causal, left, right, softcap, alibi_slopes, num_splits, {}, {})
        : flash::flash_attn_kvcache(q, k_cache, v_cache, {}, q.size(1), seqlens_k, capacity,
                                    cache_batch_idx, leftpad_k, block_table, softmax_scale, causal,
                                    left, right, softcap, alibi_slopes, num_splits, {}, {});
  if (out_) { out_->copy_(out); }
  return {out_ ? *out_ : out, lse};
}

}  // namespace

PYBIND11_MODULE(flash_attn_2_cuda, m) {
  m.doc() = "CUDA kernels of flash_attn; importing registers the operators torch.ops.flash_attn.*";
  m.def("build_info", &build_info,
        "What this build holds: archs, smem_kb (sizes of shared memory with tiles), head_dims, "
        "dtypes, kernels (isa, pass, head_dim, dtype), value_head_dims (isa, pass, head_dim, "
        "head_dim of v, where the two differ), cuda_version, cutlass_version; isa: the one that "
        "calls are limited to, or ''.");
  m.def(
      "pin_isa", [](std::string const& isa) { flash::check_status(flash::pin_isa(isa.c_str())); },
      "Limits calls to the kernels of one isa ('sm80'), as the environment's FLASH_ATTN_ISA does; "
      "'' allows all.");
  m.def(
      "limit_smem_kb", [](int kb) { flash::check_status(flash::limit_smem_kb(kb)); },
      "For tests: thread blocks get no more than 99, 163 or 227 KB of shared memory, as the "
      "environment's FLASH_ATTN_TEST_SMEM_KB says at the start; 0: what the device allows.  A size "
      "below that makes it a GPU of compute capability 8.0 for what is decided on the host.");
  m.def("smem_kb", &smem_kb_of, "KB of shared memory that a device allows a thread block.");
  // Called by flash_attn/flash_attn_interface.py; pybind11 takes longer to convert arguments than attention to one tile takes.
  auto const fast = [](auto function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
  };
  static PyMethodDef methods[] = {
      {"fast_attend", fast(&flash::fast_attend), METH_FASTCALL,
       "The usual call of flash_attn_func: out, or None for what it does not serve."},
      {"fast_varlen_attend", fast(&flash::fast_varlen_attend), METH_FASTCALL,
       "The usual call of flash_attn_varlen_func: out, or None for what it does not serve."},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) { throw pybind11::error_already_set(); }
  // Arguments have no names, as other libraries pass them: varlen_fwd takes 21 or, with num_splits, 22.
  namespace py = pybind11;
  m.def("fwd", &fwd, "Forward pass: [out, softmax_lse, S_dmask, rng_state].");
  m.def("varlen_fwd", &varlen_fwd,
        "Forward pass of sequences of their own lengths: [out, softmax_lse, S_dmask, rng_state].");
  m.def(
      "varlen_fwd",
      [](at::Tensor q, at::Tensor k, at::Tensor v, OptionalTensor out_, at::Tensor cu_q,
         at::Tensor cu_k, OptionalTensor seqused_k, OptionalTensor leftpad_k,
         OptionalTensor block_table, OptionalTensor alibi, int64_t max_q, int64_t max_k, double p,
         double scale, bool zero, bool causal, int64_t left, int64_t right, double softcap,
         bool return_softmax, py::object generator) {
        return varlen_fwd(q, k, v, out_, cu_q, cu_k, seqused_k, leftpad_k, block_table, alibi,
                          max_q, max_k, p, scale, zero, causal, left, right, softcap,
                          return_softmax, generator, 0);
      },
      "The same without num_splits.");
  m.def("fwd_kvcache", &fwd_kvcache,
        "Attention to a cache, after new keys and values are appended to it: [out, softmax_lse].");
  m.def("bwd", &bwd, "Backward pass: [dq, dk, dv, softmax_d].");
  m.def("varlen_bwd", &varlen_bwd,
        "Backward pass of sequences of their own lengths: [dq, dk, dv, softmax_d].");
}
