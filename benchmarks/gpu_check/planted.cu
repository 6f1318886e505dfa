// A fault of each kind, so that a sanitizer shows that it sees on this machine what it looks for:
//
//     planted memcheck|racecheck|synccheck|initcheck
//
// A tool that reports nothing here has proved nothing about the kernels either.

#include <cstdio>
#include <cstring>

constexpr int kFar = 1 << 18;  // beyond what lies beside a small allocation

// Writes far behind the end of `out`.
__global__ void out_of_bounds(int* out) { out[kFar + threadIdx.x] = 1; }

// A thread reads what its neighbour in another warp wrote, with no barrier between.
__global__ void race(int* out) {
  __shared__ int cells[64];
  cells[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = cells[63 - threadIdx.x];
}

// Half of the block comes to a barrier that is for all, the other half to another one.
__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
  }
}

// Reads memory that nothing wrote.
__global__ void uninitialised(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x] + 1; }

int main(int count, char** words) {
  if (count != 2) {
    return 2;
  }
  const char* tool = words[1];
  int* out;
  int* fresh;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess ||
      cudaMalloc(&fresh, 64 * sizeof(int)) != cudaSuccess) {
    std::puts("no memory on a GPU");
    return 2;
  }
  if (std::strcmp(tool, "memcheck") == 0) {
    out_of_bounds<<<1, 32>>>(out);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    race<<<1, 64>>>(out);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    divergent_barrier<<<1, 64>>>(out);
  } else if (std::strcmp(tool, "initcheck") == 0) {
    uninitialised<<<1, 64>>>(fresh, out);
  } else {
    return 2;
  }
  cudaDeviceSynchronize();  // its error is the sanitizer's to report
  return 0;
}
