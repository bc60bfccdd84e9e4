#pragma once
// A backward pass to take apart: one kernel template, in which tile shape, the split of dQ between warps and the kind of copies are
// parameters; whether key blocks are spread over thread blocks is decided at launch.
// Used by backward_launch.cuh.  Written to be compared with itself: the extension's own kernel is faster.
// Invariant: every row of dk and dv is written exactly once; dq_accum holds sums in the coordinates of MmaDq.
#include "backward_traits.cuh"
#include "calls.h"
#include "pieces/address.cuh"
#include "pieces/compiler.cuh"
#include "pieces/mask.cuh"
#include "pieces/numeric.cuh"
#include "sm80/instructions/copy.cuh"
#include "sm80/instructions/dq_accum.cuh"
#include "sm80/instructions/fragment.cuh"
#include "sm80/instructions/store.cuh"

namespace parallelism {

// A (kRows x kColumns) tile into shared memory, rows from rows_left on as zeros.  Without kAsync through registers: it has arrived when
// the function returns, and the loads of one call are in flight together.
template <bool kAsync, int kRows, int kColumns, int kThreads, class Element, class TensorS>
CUTE_DEVICE void load_tile(TensorS const& sTile, Element const* matrix, int64_t row_stride,
                           int rows_left, int thread) {
  constexpr int kChunks = kColumns / 8, kTotal = kRows * kChunks;
  constexpr int kSteps = (kTotal + kThreads - 1) / kThreads;
  auto const row_of    = [&](int i) { return (thread + i * kThreads) / kChunks; };
  auto const column    = thread % kChunks * 8;
  static_assert(kThreads % kChunks == 0, "a thread keeps its column");
  auto const is_mine = [&](int i) { return kTotal % kThreads == 0 || row_of(i) < kRows; };
  uint4 held[kAsync ? 1 : kSteps];
  CUTE_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    Element const* const source = matrix + row_of(i) * row_stride + column;
    bool const exists           = row_of(i) < rows_left;
    if constexpr (kAsync) {
      if (is_mine(i)) { cp_async_16(&sTile(row_of(i), column), source, exists); }
    } else {
      held[i] = is_mine(i) && exists ? *reinterpret_cast<uint4 const*>(source)
                                     : make_uint4(0u, 0u, 0u, 0u);
    }
  }
  if constexpr (!kAsync) {
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (is_mine(i)) { *reinterpret_cast<uint4*>(&sTile(row_of(i), column)) = held[i]; }
    }
  }
}

template <class Traits>
struct Backward {
  using Element = typename Traits::Element;
  using TileQ   = typename Traits::TileQ;
  using TileK   = typename Traits::TileK;
  using TileS   = typename Traits::TileS;
  using TileSdp = Shape<Int<Traits::kBlockN>, Int<Traits::kSubM>>;
  using See     = Visibility<MaskKind::kLocal>;  // full or causal, decided at run time
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN, kSubM = Traits::kSubM;
  static constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;
  static constexpr int kRowValues = 2 * kBlockM;  // LSE and delta of a query block

  struct Memory {
    Element *k, *v, *q, *s;
    float *partial, *rows;
  };
  CUTE_DEVICE static Memory carve(unsigned char* bytes) {
    Element* const elements = reinterpret_cast<Element*>(bytes);
    float* const floats     = reinterpret_cast<float*>(elements + Traits::kTileElements);
    return {elements,
            elements + TileK::kSize,
            elements + 2 * TileK::kSize,
            elements + 2 * TileK::kSize + Traits::kStages * 2 * TileQ::kSize,
            floats,
            floats + Traits::kPartialFloats};
  }

  struct Head {
    int batch, head;
    int64_t first_block;  // of its query blocks in the workspace
  };

  // Q, dO, LSE and delta of a query block.
  CUTE_DEVICE static void load_queries(BwdKernelParams const& params, Head const& where,
                                       Memory const& memory, int stage, int m_block) {
    int const thread = opaque(int(threadIdx.x)), row0 = m_block * kBlockM;
    int const rows_left  = params.problem.seqlen_q - row0;
    Element* const tiles = memory.q + stage * 2 * TileQ::kSize;
    auto const load      = [&](TensorRef const& tensor, Element* target) {
      load_tile<Traits::kAsync, kBlockM, kHeadDim, kThreads>(
          TileQ::tensor(target),
          matrix_of<Element const>(tensor, where.batch, where.head) + row0 * tensor.row_stride,
          tensor.row_stride, rows_left, thread);
    };
    load(params.q, tiles);
    load(params.dout, tiles + TileQ::kSize);
    if (thread < kRowValues / 4) {
      float* const target = memory.rows + stage * kRowValues + thread * 4;
      float const* const source =
          params.workspace.rows + (where.first_block + m_block) * kRowValues + thread * 4;
      if constexpr (Traits::kAsync) {
        cp_async_16(target, source, true);
      } else {
        *reinterpret_cast<float4*>(target) = *reinterpret_cast<float4 const*>(source);
      }
    }
  }

  CUTE_DEVICE static void load_keys(BwdKernelParams const& params, Head const& where,
                                    Memory const& memory, int n_block) {
    int const thread = opaque(int(threadIdx.x)), row0 = n_block * kBlockN;
    auto const load = [&](TensorRef const& tensor, Element* target) {
      load_tile<Traits::kAsync, kBlockN, kHeadDim, kThreads>(
          TileK::tensor(target),
          matrix_of<Element const>(tensor, where.batch, where.head) + row0 * tensor.row_stride,
          tensor.row_stride, params.problem.seqlen_k - row0, thread);
    };
    load(params.k, memory.k);
    load(params.v, memory.v);
  }

  // P^T and dS^T of kSubM queries, which dV and dK take from registers; dS^T also into shared memory.
  template <class TensorK>
  CUTE_DEVICE static void score_part(Memory const& memory, int stage, int sub, See const& see,
                                     bool masked, int row0, int col0, float scale_log2,
                                     TensorK& tdKrdK, TensorK& tdVrdV, int thread) {
    Element* const tiles    = memory.q + stage * 2 * TileQ::kSize;
    float const* const rows = memory.rows + stage * kRowValues + sub * kSubM;
    using Part              = Shape<Int<kSubM>, Int<kHeadDim>>;
    using PartT             = Shape<Int<kHeadDim>, Int<kSubM>>;
    auto const part         = [&](Element* tile) {
      return local_tile(TileQ::tensor(tile), Part{}, make_coord(sub, _0{}));
    };
    auto const transposed = [&](Element* tile) {
      return local_tile(TileQ::transposed(tile), PartT{}, make_coord(_0{}, sub));
    };
    typename Traits::MmaKeys mma;
    auto tScS = mma.get_slice(thread).partition_C(make_identity_tensor(TileSdp{}));

    auto tSrS = partition_fragment_C(mma, TileSdp{});
    clear(tSrS);
    gemm_ss<typename Traits::OperandK, typename Traits::OperandQ>(
        mma, tSrS, TileK::tensor(memory.k), part(tiles), thread);
    if (masked) {
      mask_scores<true, typename Traits::MmaKeys, TileSdp>(tSrS, see, row0 + sub * kSubM, col0,
                                                           thread);
    }
    auto scores = make_tensor(tSrS.data(), rows_columns(tSrS.layout()));
    auto where  = make_tensor(tScS.data(), rows_columns(tScS.layout()));
    CUTE_UNROLL
    for (int c = 0; c < size<1>(scores); ++c) {
      float const lse = rows[get<1>(where(0, c))];
      CUTE_UNROLL
      for (int r = 0; r < size<0>(scores); ++r) {
        scores(r, c) = exp2_approx(fmaf(scores(r, c), scale_log2, -lse));
      }
    }
    auto tSrP = round_to<Element>(tSrS);

    auto tSrdS = partition_fragment_C(mma, TileSdp{});
    clear(tSrdS);
    gemm_ss<typename Traits::OperandK, typename Traits::OperandQ>(
        mma, tSrdS, TileK::tensor(memory.v), part(tiles + TileQ::kSize), thread);
    auto gradients = make_tensor(tSrdS.data(), rows_columns(tSrdS.layout()));
    CUTE_UNROLL
    for (int c = 0; c < size<1>(gradients); ++c) {
      float const delta = rows[kBlockM + get<1>(where(0, c))];
      CUTE_UNROLL
      for (int r = 0; r < size<0>(gradients); ++r) {
        gradients(r, c) = scores(r, c) * (gradients(r, c) - delta);
      }
    }
    auto tSrdSr = round_to<Element>(tSrdS);
    fragment_to_smem<typename Traits::MmaKeys>(
        tSrdSr, local_tile(TileS::tensor(memory.s), TileSdp{}, make_coord(_0{}, sub)), thread);

    auto tdVrP  = make_tensor(tSrP.data(), as_operand_a(tSrP.layout()));
    auto tdKrdS = make_tensor(tSrdSr.data(), as_operand_a(tSrdSr.layout()));
    gemm_rs<typename Traits::OperandQt>(mma, tdVrdV, tdVrP, transposed(tiles + TileQ::kSize),
                                        thread);
    gemm_rs<typename Traits::OperandQt>(mma, tdKrdK, tdKrdS, transposed(tiles), thread);
  }

  // dQ += dS K.  Warps share its rows and columns: dS of all keys is needed.
  CUTE_DEVICE static void add_dq_shared(Memory const& memory, float* dq_block, int thread) {
    using Rows = Shape<Int<Traits::kDqRows>, Int<kBlockN>>;
    __syncthreads();  // PROTECTS: dS^T of all warps is in shared memory.
    CUTE_NO_UNROLL
    for (int slice = 0; slice < Traits::kDqSlices; ++slice) {
      typename Traits::MmaDq mma;
      auto tdQrdQ = partition_fragment_C(mma, Shape<Int<Traits::kDqRows>, Int<kHeadDim>>{});
      clear(tdQrdQ);
      auto sdS = local_tile(TileS::transposed(memory.s), Rows{}, make_coord(slice, _0{}));
      gemm_ss<typename Traits::OperandDs, typename Traits::OperandKt>(
          mma, tdQrdQ, sdS, TileK::transposed(memory.k), thread);
      add_to_dq<kThreads>(dq_block + slice * Traits::kDqRows * kHeadDim, tdQrdQ, nullptr, 0,
                          thread);
    }
  }

  // The same with the keys split between the warps: each has a partial sum, and they meet in shared memory.
  CUTE_DEVICE static void add_dq_split(Memory const& memory, float* dq_block, int thread) {
    constexpr int kVectors = kHeadDim / 8;  // 16-byte vectors of a thread's partial sum
    // The keys whose dS^T a warp itself has written, as MmaKeys deals them: every kWarps-th group of 16.
    using WarpKeys = Layout<Shape<_16, Int<kBlockN / (16 * Traits::kWarps)>>,
                            Stride<_1, Int<16 * Traits::kWarps>>>;
    using Keys     = Tile<Int<Traits::kDqRows>, WarpKeys>;
    using KeysOfK  = Tile<Int<kHeadDim>, WarpKeys>;
    int const warp = thread / 32, lane = thread % 32;
    float4* const partial = reinterpret_cast<float4*>(memory.partial);
    __syncwarp();  // PROTECTS: dS^T of this warp's keys, written by its other lanes.
    CUTE_UNROLL
    for (int slice = 0; slice < Traits::kDqSlices; ++slice) {
      typename Traits::MmaDq mma;
      auto tdQrdQ = partition_fragment_C(mma, Shape<Int<Traits::kDqRows>, Int<kHeadDim>>{});
      clear(tdQrdQ);
      auto sdS = local_tile(TileS::transposed(memory.s), Keys{}, make_coord(slice, warp));
      auto sKt = local_tile(TileK::transposed(memory.k), KeysOfK{}, make_coord(_0{}, warp));
      gemm_ss<typename Traits::OperandDs, typename Traits::OperandKt>(mma, tdQrdQ, sdS, sKt, lane);
      CUTE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        partial[(warp * kVectors + i) * 32 + lane] =
            make_float4(tdQrdQ(i * 4), tdQrdQ(i * 4 + 1), tdQrdQ(i * 4 + 2), tdQrdQ(i * 4 + 3));
      }
      __syncthreads();  // PROTECTS: the partial sums of all warps are in shared memory.
      for (int i = thread; i < kVectors * 32; i += kThreads) {
        float4 sum = partial[i];
        CUTE_UNROLL
        for (int w = 1; w < Traits::kWarps; ++w) {
          float4 const other = partial[w * kVectors * 32 + i];
          sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
        }
        red_add_4(dq_block + slice * Traits::kDqRows * kHeadDim + i * 4, sum.x, sum.y, sum.z,
                  sum.w);
      }
      __syncthreads();  // PROTECTS: all have read the partial sums before the next slice overwrites them.
    }
  }

  // dK and dV of one key block, and its share of dQ.  Shared memory must not be in use when it begins.
  CUTE_DEVICE static void key_block(BwdKernelParams const& params, Head const& where,
                                    Memory const& memory, int n_block) {
    Problem const& problem = params.problem;
    See const see{problem.seqlen_q, problem.seqlen_k, kUnlimited,
                  problem.mask == MaskKind::kCausal ? 0 : kUnlimited};
    BlockRange const range = query_blocks<kBlockM, kBlockN>(see, n_block);
    int const col0         = n_block * kBlockN;
    typename Traits::MmaKeys mma;
    auto tdKrdK = partition_fragment_C(mma, Shape<Int<kBlockN>, Int<kHeadDim>>{});
    auto tdVrdV = partition_fragment_C(mma, Shape<Int<kBlockN>, Int<kHeadDim>>{});
    clear(tdKrdK), clear(tdVrdV);
    load_keys(params, where, memory, n_block);
    if constexpr (Traits::kAsync) {
      load_queries(params, where, memory, 0, range.first);
      cp_async_commit();
    }
    int stage = 0;
    for (int m_block = range.first; m_block < range.end; ++m_block) {
      int const thread = opaque(int(threadIdx.x));
      if constexpr (Traits::kAsync) {
        flash::sm80::cp_async_wait<0>();
        __syncthreads();  // PROTECTS: this stage has arrived; all warps are done with the other stage and with dS^T.
        if (m_block + 1 < range.end) {
          load_queries(params, where, memory, stage ^ 1, m_block + 1);
        }
        cp_async_commit();
      } else {
        __syncthreads();  // PROTECTS: all warps are done with Q, dO and dS^T.
        load_queries(params, where, memory, 0, m_block);
        __syncthreads();  // PROTECTS: Q, dO (and K, V) are in shared memory.
      }
      bool const masked = range.needs_mask(m_block) || see.seqlen_k - col0 < kBlockN;
      CUTE_NO_UNROLL  // unrolled, the next part's loads would take registers beside this part's scores
          for (int sub = 0; sub < kBlockM / kSubM; ++sub) {
        score_part(memory, stage, sub, see, masked, m_block * kBlockM, opaque(col0),
                   problem.scale * kLog2E, tdKrdK, tdVrdV, opaque(thread));
      }
      float* const dq_block =
          params.workspace.dq_accum + (where.first_block + m_block) * kBlockM * kHeadDim;
      if constexpr (Traits::kSplitK) {
        add_dq_split(memory, dq_block, opaque(thread));
      } else {
        add_dq_shared(memory, dq_block, opaque(thread));
      }
      if constexpr (Traits::kAsync) { stage ^= 1; }
    }
    store_keys(params, where, memory, n_block, tdKrdK, tdVrdV);
  }

  // dK and dV take the places of K and V.
  template <class TensorK>
  CUTE_DEVICE static void store_keys(BwdKernelParams const& params, Head const& where,
                                     Memory const& memory, int n_block, TensorK& tdKrdK,
                                     TensorK& tdVrdV) {
    int const thread = opaque(int(threadIdx.x)), row0 = n_block * kBlockN;
    CUTE_UNROLL
    for (int i = 0; i < size(tdKrdK); ++i) { tdKrdK(i) *= params.problem.scale; }
    __syncthreads();  // PROTECTS: all warps are done with K and V.
    auto sdK = TileK::tensor(memory.k);
    auto sdV = TileK::tensor(memory.v);
    fragment_to_smem<typename Traits::MmaKeys>(round_to<Element>(tdKrdK), sdK, thread);
    fragment_to_smem<typename Traits::MmaKeys>(round_to<Element>(tdVrdV), sdV, thread);
    __syncthreads();  // PROTECTS: all of dK and dV is in shared memory.
    auto const store = [&](auto const& sTile, TensorRef const& target) {
      smem_to_rows<kBlockN, kHeadDim, kThreads>(
          sTile, matrix_of<Element>(target, where.batch, where.head) + row0 * target.row_stride,
          target.row_stride, params.problem.seqlen_k - row0, kHeadDim, thread);
    };
    store(sdK, params.dk);
    store(sdV, params.dv);
  }
};

// Thread block (x, y, z) takes the key blocks x, x + gridDim.x, ... of batch y, head z.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(__grid_constant__ BwdKernelParams const params) {
  using Pass = Backward<Traits>;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Problem const& problem = params.problem;
  int const batch = int(blockIdx.y), head = int(blockIdx.z);
  typename Pass::Head const where{
      batch, head,
      int64_t(batch * problem.heads_q + head) * ceil_div(problem.seqlen_q, Traits::kBlockM)};
  int const n_blocks = ceil_div(problem.seqlen_k, Traits::kBlockN);
  for (int n_block = int(blockIdx.x); n_block < n_blocks; n_block += int(gridDim.x)) {
    Pass::key_block(params, where, Pass::carve(smem_bytes), n_block);
    __syncthreads();  // PROTECTS: dK and dV have been read from shared memory.
  }
}

}  // namespace parallelism
