// A pool of zeroed device memory, cut into pieces that are never given back: a stream's stays with the stream.
#include "host/counters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace flash {
namespace {

constexpr int64_t kChunkInts = 1 << 18, kAlignInts = 32;

struct Piece {
  int* data;
  int64_t count;
};

// Memory set to zero before this returns.  Allowed while streams are being captured: the call has a stream of its own.
int* allocate_zeros(int64_t count) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) { return nullptr; }
  void* data          = nullptr;
  cudaStream_t stream = nullptr;
  bool const ok       = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
                        cudaMalloc(&data, count * sizeof(int)) == cudaSuccess &&
                        cudaMemsetAsync(data, 0, count * sizeof(int), stream) == cudaSuccess &&
                        cudaStreamSynchronize(stream) == cudaSuccess;
  if (stream) { cudaStreamDestroy(stream); }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (!ok) {
    cudaGetLastError();
  }  // is reported by the caller, not by the next call of the runtime
  return ok ? static_cast<int*>(data) : nullptr;
}

class Pool {
 public:
  int* take(int64_t count) {
    count = (count + kAlignInts - 1) / kAlignInts * kAlignInts;
    if (rest_.count < count) {
      int64_t const size = std::max(count, kChunkInts);
      int* const data    = allocate_zeros(size);
      if (!data) { return nullptr; }
      rest_ = {data, size};
    }
    int* const piece = rest_.data;
    rest_            = {rest_.data + count, rest_.count - count};
    return piece;
  }

 private:
  Piece rest_{nullptr, 0};
};

}  // namespace

int* zeroed_counters(int64_t count, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<int, Pool> pools;
  static std::map<std::pair<int, unsigned long long>, Piece> of_streams;
  std::lock_guard<std::mutex> const lock(mutex);
  int device                     = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaGetDevice(&device) != cudaSuccess) { return nullptr; }
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) { return nullptr; }
  if (status != cudaStreamCaptureStatusNone) { return pools[device].take(count); }
  unsigned long long id = 0;  // never used again, unlike the handle
  if (cudaStreamGetId(stream, &id) != cudaSuccess) { return nullptr; }
  Piece& piece = of_streams[{device, id}];
  if (piece.count < count) {
    int* const data = pools[device].take(count);
    if (!data) { return nullptr; }
    piece = {data, count};
  }
  return piece.data;
}

}  // namespace flash
