// The reference engine's arithmetic on a GPU. Compiled to kernels.ptx by `make kernels` (nvcc -ptx), so that an engine
// needs neither nvcc nor a compiler library.

// Adds to *total: the sum over i of words[i] * (2 * (first + i) + 1), modulo 2^64.
extern "C" __global__ void weighted_sum(const unsigned long long *words, unsigned long long count,
                                        unsigned long long first, unsigned long long *total) {
  unsigned long long sum = 0;
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
    sum += words[i] * (2 * (first + i) + 1);
  for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
  if (threadIdx.x % 32 == 0) atomicAdd(total, sum);
}
