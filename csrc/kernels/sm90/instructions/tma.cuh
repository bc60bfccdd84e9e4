#pragma once
// Tiles between global and shared memory by TMA: tensor maps (host), loads and stores (device).
// Used by: the sm90 kernels and launches.  Rows and columns beyond a tensor's end are zeros when loaded and are not stored.
#include <cuda.h>  // types alone: the driver's function comes through the runtime
#include <cuda_runtime.h>

#include <atomic>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "flash.h"

namespace flash::sm90 {
using namespace cute;

// --- Tensor maps ----------------------------------------------------------------------------------

// A (column, row, head, batch) tensor for TMA.  A head or batch dimension without a stride (expanded) has size 1 in the map.
struct TmaTensor {
  CUtensorMap map;
  int head_step,
      batch_step;  // 0: every head, or batch, is the same, and any number of one is right
};

// Sizes of the tensor; rows of a box, columns of a box.
struct TmaShape {
  int columns, rows, heads, batch;
  int box_rows, box_columns;
};

constexpr int kTmaAlign      = 16;  // bytes, of addresses and strides
constexpr int64_t kTmaStride = int64_t(1) << 40;

inline bool is_tma_stride(int64_t elements, int size) {
  int64_t const bytes = elements * 2;
  return size <= 1 || (bytes >= 0 && bytes < kTmaStride && bytes % kTmaAlign == 0);
}

// Whether TMA can address the tensor.  Rows must not overlap.
inline bool fits_tma(TensorRef const& tensor, int columns, int rows, int heads, int batch) {
  return reinterpret_cast<uintptr_t>(tensor.data) % kTmaAlign == 0 &&
         is_tma_stride(tensor.row_stride, rows) && (rows <= 1 || tensor.row_stride >= columns) &&
         is_tma_stride(tensor.head_stride, heads) && is_tma_stride(tensor.batch_stride, batch);
}

using TmaEncode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                               cuuint64_t const*, cuuint64_t const*, cuuint32_t const*,
                               cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// cuTensorMapEncodeTiled, or null if the driver has none.
inline TmaEncode tma_encode() {
  static std::atomic<TmaEncode> known{nullptr};  // a query that failed is made again
  if (TmaEncode const encode = known.load(std::memory_order_relaxed)) { return encode; }
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  cudaError_t const status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
#else
  cudaError_t const status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();  // that there is none is not the next call's error
    return nullptr;
  }
  known.store(reinterpret_cast<TmaEncode>(function), std::memory_order_relaxed);
  return reinterpret_cast<TmaEncode>(function);
}

// tensor must fit (fits_tma) and have no size of 0.
inline cudaError_t encode_tma(TensorRef const& tensor, TmaShape const& shape, DType dtype,
                              TmaTensor& result) {
  TmaEncode const encode = tma_encode();
  if (!encode) { return cudaErrorNotSupported; }
  result.head_step  = shape.heads > 1 && tensor.head_stride > 0;
  result.batch_step = shape.batch > 1 && tensor.batch_stride > 0;
  // A dimension of size 1 needs some stride: that of whole rows.
  int64_t const row_bytes = (int64_t(shape.columns) * 2 + kTmaAlign - 1) / kTmaAlign * kTmaAlign;
  auto const bytes        = [&](int64_t stride, bool steps) {
    return cuuint64_t(steps ? stride * 2 : row_bytes);
  };
  cuuint64_t const sizes[]   = {cuuint64_t(shape.columns), cuuint64_t(shape.rows),
                                cuuint64_t(result.head_step ? shape.heads : 1),
                                cuuint64_t(result.batch_step ? shape.batch : 1)};
  cuuint64_t const strides[] = {bytes(tensor.row_stride, shape.rows > 1),
                                bytes(tensor.head_stride, result.head_step),
                                bytes(tensor.batch_stride, result.batch_step)};
  cuuint32_t const box[]     = {cuuint32_t(shape.box_columns), cuuint32_t(shape.box_rows), 1, 1};
  cuuint32_t const steps[]   = {1, 1, 1, 1};
  CUresult const code        = encode(
      &result.map,
      dtype == DType::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      shape.box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// --- Loads and stores -----------------------------------------------------------------------------

// A tile in shared memory is what TMA writes: slabs of kBoxColumns columns, one after another.  In a slab the 16-byte chunks of a row are
// swizzled, which is wgmma's K-major layout of the tile and the MN-major layout of its transpose.
// row: of the tensor, for tile row 0; it may lie outside.  full is told how many bytes have come.
template <int kColumns, int kRows, int kBoxColumns, class Element>
CUTE_DEVICE void load_tile(TmaTensor const& tensor, uint64_t* full, Element* tile, int row,
                           int head, int batch) {
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kBoxColumns) {
    SM90_TMA_LOAD_4D::copy(&tensor.map, full, uint64_t(TMA::CacheHintSm90::EVICT_NORMAL),
                           tile + column * kRows, column, row, head * tensor.head_step,
                           batch * tensor.batch_step);
  }
}

// The other way.  Shared memory must have been made visible (fence_view_async_shared), and may be changed after tma_store_wait<0>().
template <int kColumns, int kRows, int kBoxColumns, class Element>
CUTE_DEVICE void store_tile(TmaTensor const& tensor, Element const* tile, int row, int head,
                            int batch) {
  CUTE_UNROLL
  for (int column = 0; column < kColumns; column += kBoxColumns) {
    SM90_TMA_STORE_4D::copy(&tensor.map, tile + column * kRows, column, row,
                            head * tensor.head_step, batch * tensor.batch_step);
  }
  tma_store_arrive();
}

}  // namespace flash::sm90
