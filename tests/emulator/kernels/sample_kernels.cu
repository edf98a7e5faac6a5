// Kernels as the project's own will be: valid for NVRTC, and compiled for the host.
#include <cuda_bf16.h>

// y += a * x, four elements a thread; the last thread takes the odd ones.
extern "C" __global__ void __launch_bounds__(256)
    axpy(float a, const float* __restrict__ x, float* __restrict__ y, unsigned n) {
  const unsigned stride = blockDim.x * gridDim.x;
  const unsigned first = blockIdx.x * blockDim.x + threadIdx.x;
  for (unsigned i = first; i < n / 4; i += stride) {
    const float4 in = __ldg(reinterpret_cast<const float4*>(x) + i);
    float4 out = reinterpret_cast<float4*>(y)[i];
    out.x += a * in.x;
    out.y += a * in.y;
    out.z += a * in.z;
    out.w += a * in.w;
    reinterpret_cast<float4*>(y)[i] = out;
  }
  if (first == 0) {
    for (unsigned i = n / 4 * 4; i < n; ++i) y[i] += a * x[i];
  }
}

// *sum += the sum of squares: in registers, through a warp's lanes, through shared memory.
extern "C" __global__ void squared_norm(const float* __restrict__ x, unsigned n, double* sum) {
  __shared__ double partial[32];
  double mine = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) {
    mine += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  for (int delta = 16; delta > 0; delta /= 2) mine += __shfl_down_sync(0xFFFFFFFFU, mine, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = threadIdx.x < (blockDim.x + 31) / 32 ? partial[threadIdx.x] : 0.0;
  for (int lanes = 16; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(0xFFFFFFFFU, mine, lanes);
  if (threadIdx.x == 0) atomicAdd(sum, mine);
}

// out[column][row] = in[row][column], in tiles of 32 x 32 with a column to spare.
extern "C" __global__ void transpose_to_float(const __nv_bfloat16* __restrict__ in,
                                              float* __restrict__ out, unsigned rows,
                                              unsigned columns) {
  extern __shared__ float tile[];
  const unsigned x = blockIdx.x * 32 + threadIdx.x;
  const unsigned y = blockIdx.y * 32;
  for (unsigned i = threadIdx.y; i < 32; i += blockDim.y) {
    if (x < columns && y + i < rows) {
      tile[i * 33 + threadIdx.x] = __bfloat162float(in[(y + i) * columns + x]);
    }
  }
  __syncthreads();
  const unsigned row = y + threadIdx.x;
  for (unsigned i = threadIdx.y; i < 32; i += blockDim.y) {
    const unsigned column = blockIdx.x * 32 + i;
    if (row < rows && column < columns) {
      out[column * rows + row] = tile[threadIdx.x * 33 + i];
    }
  }
}

// What each lane of a warp, and then the block, says.
extern "C" __global__ void votes(unsigned* ballots, int* counts) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned odd = __ballot_sync(0xFFFFFFFFU, lane & 1U);
  const int third = __shfl_sync(0xFFFFFFFFU, static_cast<int>(lane), 3, 8);
  const int before = __shfl_up_sync(0xFFFFFFFFU, static_cast<int>(lane), 1);
  ballots[threadIdx.x] = odd ^ static_cast<unsigned>(third) ^ static_cast<unsigned>(before) << 8;
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int all = __all_sync(0xFFFFFFFFU, threadIdx.x < 4096);
  __syncwarp();
  counts[threadIdx.x] = count + all;
}

// A mistake: one lane waits for its warp, and its warp for the block.
extern "C" __global__ void hangs(int* out) {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
