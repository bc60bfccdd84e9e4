#pragma once
// Forward kernel with the loops exchanged: key blocks outside, query blocks inside.  O, the reference maxima and the sums of a query
// block go through global memory once per key block.
// Used by the units keys_outside_*.  Grid (batch, heads, splits): block s owns the query blocks s, s + splits, ...
// Invariant: a partial result is read and written by one thread block only.
#include "calls.h"
#include "pieces/address.cuh"
#include "pieces/compiler.cuh"
#include "pieces/mask.cuh"
#include "pieces/softmax.cuh"
#include "sm80/fwd/traits.cuh"
#include "sm80/instructions/copy.cuh"
#include "sm80/instructions/fragment.cuh"
#include "sm80/instructions/store.cuh"

namespace parallelism {
using namespace flash;
using namespace flash::sm80;

template <class Traits, MaskKind kMask>
struct KeysOutside {
  using Element = typename Traits::Element;
  using TileQ   = typename Traits::TileQ;
  using TileKV  = typename Traits::TileKV;
  using TileS   = Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>;
  using TileO   = Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>;
  using CopyQ   = TileCopy<Element, Traits::kBlockM, Traits::kHeadDim, Traits::kThreads>;
  using CopyKV  = TileCopy<Element, Traits::kBlockN, Traits::kHeadDim, Traits::kThreads>;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
  static constexpr int kBlockO = kBlockM * kHeadDim;  // values of a query block in o_partial
  //   | Q stage 0, later O | Q stage 1, later O | K | V |
  static constexpr int kSmemBytes = (2 * TileQ::kSize + 2 * TileKV::kSize) * int(sizeof(Element));

  // Row of this thread's r-th score row.
  template <class TensorO>
  CUTE_DEVICE static auto row_coordinates(TensorO const&, int thread) {
    auto tOcO =
        typename Traits::TiledMma{}.get_slice(thread).partition_C(make_identity_tensor(TileO{}));
    return make_tensor(tOcO.data(), rows_columns(tOcO.layout()));
  }

  // One query block meets one key block.  site: batch, head.
  CUTE_DEVICE static void step(FwdParams const& params, float* o_block, float* rows_block,
                               Element* smem_q, Element* smem_kv, int2 site, int m_block,
                               int n_block) {
    Problem const& problem = params.problem;
    // What depends on the thread is computed anew in each step: kept across steps it was spilled.
    int const thread = opaque(int(threadIdx.x)), lane = thread % 32;
    Visibility<kMask> const see{problem.seqlen_q, problem.seqlen_k, 0, 0};
    BlockRange const range = key_blocks<kBlockM, kBlockN>(see, m_block);
    typename Traits::TiledMma mma;
    auto tOrO             = partition_fragment_C(mma, TileO{});
    constexpr int kRows   = 2 * decltype(size<1>(tOrO))::value;
    constexpr int kChunks = decltype(size(tOrO))::value / 4;
    Softmax<kRows> softmax(problem.unit.scale_log2);
    auto o_rows = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
    auto where  = row_coordinates(tOrO, thread);

    // The partial result of the key blocks before.
    if (n_block == range.first) {
      clear(tOrO);
    } else {
      CUTE_UNROLL
      for (int i = 0; i < kChunks; ++i) {
        float4 const o = reinterpret_cast<float4 const*>(o_block)[i * kThreads + thread];
        tOrO(i * 4) = o.x, tOrO(i * 4 + 1) = o.y, tOrO(i * 4 + 2) = o.z, tOrO(i * 4 + 3) = o.w;
      }
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int const row      = get<0>(where(r, 0));
        softmax.row_ref[r] = rows_block[row];
        softmax.row_sum[r] = lane % 4 == 0 ? rows_block[kBlockM + row] : 0.f;
      }
    }

    // S = Q K^T, P, O += P V
    auto tSrS = partition_fragment_C(mma, TileS{});
    clear(tSrS);
    gemm_ss<typename Traits::OperandQ, typename Traits::OperandK>(mma, tSrS, TileQ::tensor(smem_q),
                                                                  TileKV::tensor(smem_kv), thread);
    if (range.needs_mask(n_block)) {
      mask_scores<false, typename Traits::TiledMma, TileS>(tSrS, see, m_block * kBlockM,
                                                           n_block * kBlockN, thread);
    }
    auto scores = make_tensor(tSrS.data(), rows_columns(tSrS.layout()));
    softmax.update(scores, o_rows);
    CUTE_UNROLL
    for (int c = 0; c < size<1>(scores); ++c) { softmax.exponentials(scores, c); }
    auto tSrP = round_to<Element>(tSrS);
    auto tOrP = make_tensor(tSrP.data(), as_operand_a(tSrP.layout()));
    gemm_rs<typename Traits::OperandV>(mma, tOrO, tOrP, TileKV::transposed(smem_kv + TileKV::kSize),
                                       thread);

    // Either the next partial result, or the final one.
    if (n_block + 1 < range.end) {
      CUTE_UNROLL
      for (int i = 0; i < kChunks; ++i) {
        reinterpret_cast<float4*>(o_block)[i * kThreads + thread] =
            make_float4(tOrO(i * 4), tOrO(i * 4 + 1), tOrO(i * 4 + 2), tOrO(i * 4 + 3));
      }
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int const row   = get<0>(where(r, 0));
        float const sum = quad_sum(softmax.row_sum[r]);
        if (lane % 4 == 0) {
          rows_block[row] = softmax.row_ref[r], rows_block[kBlockM + row] = sum;
        }
      }
      return;
    }
    finish(params, smem_q, site, m_block, tOrO, softmax);
  }

  template <class TensorO, int kRows>
  CUTE_DEVICE static void finish(FwdParams const& params, Element* smem_q, int2 site, int m_block,
                                 TensorO& tOrO, Softmax<kRows>& softmax) {
    Problem const& problem = params.problem;
    int const thread = opaque(int(threadIdx.x)), row0 = m_block * kBlockM;
    auto o_rows = make_tensor(tOrO.data(), rows_columns(tOrO.layout()));
    auto where  = row_coordinates(tOrO, thread);
    float lse[kRows];
    softmax.finish(lse);
    float* const lse_rows =
        params.lse + site.x * problem.lse_batch_stride + site.y * problem.lse_head_stride + row0;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(o_rows); ++c) { o_rows(r, c) *= softmax.row_sum[r]; }
      int const row = get<0>(where(r, 0));
      if (thread % 4 == 0 && row0 + row < problem.seqlen_q) { lse_rows[row] = lse[r]; }
    }
    // No barrier before: a warp's rows of O overwrite the rows of Q that only it reads.
    auto sO = TileQ::tensor(smem_q);
    fragment_to_smem<typename Traits::TiledMma>(round_to<Element>(tOrO), sO, thread);
    __syncthreads();  // PROTECTS: all of O is in shared memory before other threads read it.
    smem_to_rows<kBlockM, kHeadDim, kThreads>(
        sO, matrix_of<Element>(params.out, site.x, site.y) + int64_t(row0) * params.out.row_stride,
        params.out.row_stride, problem.seqlen_q - row0, problem.head_dim, thread);
  }
};

template <class Traits, MaskKind kMask>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    keys_outside_kernel(__grid_constant__ FwdParams const params, float* o_partial,
                        float* row_partial) {
  using Loops   = KeysOutside<Traits, kMask>;
  using Element = typename Traits::Element;
  using TileKV  = typename Traits::TileKV;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Element* const smem_q  = reinterpret_cast<Element*>(smem_bytes);
  Element* const smem_kv = smem_q + 2 * Traits::TileQ::kSize;
  Problem const& problem = params.problem;
  int const splits       = gridDim.z;
  int2 const site        = make_int2(int(blockIdx.x), int(blockIdx.y));
  int const m_blocks     = ceil_div(problem.seqlen_q, Traits::kBlockM),
            n_blocks     = ceil_div(problem.seqlen_k, Traits::kBlockN);
  int64_t const block0   = (int64_t(site.x) * problem.heads_q + site.y) * m_blocks;
  Visibility<kMask> const see{problem.seqlen_q, problem.seqlen_k, 0, 0};
  auto const load_q = [&](int m_block, int stage) {
    int const row0 = m_block * Traits::kBlockM, thread = opaque(int(threadIdx.x));
    typename Loops::CopyQ(matrix_of<Element>(params.q, site.x, site.y) + row0 * params.q.row_stride,
                          params.q.row_stride, problem.head_dim, thread)
        .template start<true>(Traits::TileQ::tensor(smem_q + stage * Traits::TileQ::kSize),
                              problem.seqlen_q - row0, thread);
  };
  auto const load_kv = [&](TensorRef const& tensor, int n_block, Element* target) {
    int const row0 = n_block * Traits::kBlockN, thread = opaque(int(threadIdx.x));
    typename Loops::CopyKV(matrix_of<Element>(tensor, site.x, site.y) + row0 * tensor.row_stride,
                           tensor.row_stride, problem.head_dim, thread)
        .template start<true>(TileKV::tensor(target), problem.seqlen_k - row0, thread);
  };

  for (int n_block = 0; n_block < n_blocks; ++n_block) {
    // This block's first query block that sees a key of n_block.
    int const lowest = see.first_query(n_block * Traits::kBlockN) / Traits::kBlockM;
    int m_block = int(blockIdx.z) + ceil_div(max_of(0, lowest - int(blockIdx.z)), splits) * splits;
    if (m_block >= m_blocks) { return; }
    load_kv(params.k, n_block, smem_kv);
    load_kv(params.v, n_block, smem_kv + TileKV::kSize);
    load_q(m_block, 0);
    cp_async_commit();
    for (int stage = 0; m_block < m_blocks; m_block += splits, stage ^= 1) {
      flash::sm80::cp_async_wait<0>();
      __syncthreads();  // PROTECTS: this Q has arrived; all warps are done with the other stage.
      if (m_block + splits < m_blocks) { load_q(m_block + splits, stage ^ 1); }
      cp_async_commit();
      Loops::step(params, o_partial + (block0 + m_block) * Loops::kBlockO,
                  row_partial + (block0 + m_block) * 2 * Traits::kBlockM,
                  smem_q + stage * Traits::TileQ::kSize, smem_kv, site, m_block, n_block);
    }
    __syncthreads();  // PROTECTS: all warps are done with K, V and both stages of Q.
  }
}

template <int kHeadDim>
cudaError_t run_keys_outside(ForwardCall const& call, cudaStream_t stream) {
  using Traits           = FwdTraits<kHeadDim, cutlass::bfloat16_t>;
  using Loops            = KeysOutside<Traits, MaskKind::kNone>;
  FwdParams const params = forward_params(call, kHeadDim);
  auto const kernel      = call.causal ? &keys_outside_kernel<Traits, MaskKind::kCausal>
                                       : &keys_outside_kernel<Traits, MaskKind::kNone>;
  cudaError_t const status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Loops::kSmemBytes);
  if (status != cudaSuccess) { return status; }
  dim3 const grid(unsigned(call.batch), unsigned(call.heads), unsigned(call.splits));
  kernel<<<grid, Traits::kThreads, Loops::kSmemBytes, stream>>>(params, call.o_partial,
                                                                call.row_partial);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t keys_outside_facts(bool causal, KernelFacts* facts) {
  using Traits = FwdTraits<kHeadDim, cutlass::bfloat16_t>;
  return read_facts(causal ? &keys_outside_kernel<Traits, MaskKind::kCausal>
                           : &keys_outside_kernel<Traits, MaskKind::kNone>,
                    Traits::kThreads, KeysOutside<Traits, MaskKind::kNone>::kSmemBytes, facts);
}

}  // namespace parallelism
