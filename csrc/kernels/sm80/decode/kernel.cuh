#pragma once
// Decoding kernel: attention of few queries to a cache, the keys divided among thread blocks.
// Invariant: every row of out and lse is written exactly once, by the thread block that has all of its query tile's keys, by the last
// one of those that share them to finish, or by the one of a cluster that merges this row.
#include "pieces/address.cuh"
#include "pieces/compiler.cuh"
#include "pieces/dependent.cuh"
#include "sm80/decode/epilogue.cuh"
#include "sm80/decode/schedule.cuh"

namespace flash::sm80 {

// Rows of q beyond the last sequence: rows that see no key.
template <class Traits>
CUTE_DEVICE void clear_tail(DecodeKernelParams const& params) {
  using Element          = typename Traits::Element;
  Problem const& problem = params.problem;
  if (!problem.cu_seqlens_q) { return; }
  int const first = __ldg(problem.cu_seqlens_q + problem.batch);
  for (int row = first + blockIdx.x; row < problem.total_q; row += gridDim.x) {
    for (int i = threadIdx.x; i < problem.heads_q * problem.head_dim; i += Traits::kThreads) {
      int const head = i / problem.head_dim;
      matrix_of<Element>(params.out, 0, head)[row * params.out.row_stride + i % problem.head_dim] =
          Element(0);
    }
    for (int head = threadIdx.x; head < problem.heads_q; head += Traits::kThreads) {
      params.lse[head * problem.lse_head_stride + row] = INFINITY;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    decode_kernel(__grid_constant__ DecodeKernelParams const params) {
  if (!kIsForThisArch<Traits>) { return __trap(); }
  using Element = typename Traits::Element;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  __shared__ int scratch[Traits::kThreads / 32];
  __shared__ DecodeCursor cursor;
  __shared__ DecodeWork work;
  __shared__ typename DecodeMainloop<Traits>::Row rows[Traits::kBlockM];
  static_assert(sizeof(scratch) + sizeof(cursor) + sizeof(work) + sizeof(rows) +
                    DecodeEpilogue<Traits>::kStaticBytes <=
                Traits::kStaticSmemBytes);

  let_next_kernel_start();
  touch(params);  // they come into the constant cache while the kernel before ends
  int const group  = threadIdx.x / Traits::kGroupThreads;
  int const thread = threadIdx.x % Traits::kGroupThreads;
  typename Traits::TiledMma mma;
  DecodeSchedule<Traits> const schedule{params, cursor, work};
#pragma unroll 1
  for (bool is_early = Traits::kNarrow && starts_early() && params.plan.looks_ahead; true;
       is_early      = false) {
    // Right after kv_update only what it writes must wait: it lets this kernel start when the kernels before it have ended.
    if (!is_early && params.cache.seqlen_new == 0) { wait_for_previous_kernel(); }
    schedule.start(scratch, is_early ? LengthsAre::kEarly : LengthsAre::kFinal);
    if (!is_early) { break; }
    __syncthreads();  // PROTECTS: work is complete.
    if (work.parts.count > 0) { DecodeMainloop<Traits>::prefetch(params, work.task); }
    __syncthreads();  // PROTECTS: work has been read.
  }
  while (true) {
    __syncthreads();  // PROTECTS: work is complete, and the last results have been read: key tiles may be loaded over them.
    if (work.parts.count == 0) { break; }
    auto tOrO = partition_fragment_C(mma, Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
    clear(tOrO);
    Softmax<2> softmax(params.problem.unit.scale_log2);
    DecodeMainloop<Traits>::run(params, work.task, reinterpret_cast<Element*>(smem_bytes), rows,
                                group, thread, tOrO, softmax);
    DecodeEpilogue<Traits> const epilogue(params, work.task, softmax.scale_log2, smem_bytes);
    __syncthreads();  // PROTECTS: no group reads its key tiles, over which results are written.
    epilogue.put(tOrO, softmax, group, thread);
    __syncthreads();  // PROTECTS: all groups' results are complete.
    epilogue.finish(work.parts);
    // PROTECTS: the others of the cluster have read this thread block's results: it may end.
    if (epilogue.blocks() > 1) { wait_for_cluster(); }
    __syncthreads();  // PROTECTS: work has been read.
    if (threadIdx.x == 0) { schedule.next(); }
  }
  clear_tail<Traits>(params);
}

}  // namespace flash::sm80
