// The stem's convolution and its max-pool in one pass.
//
// Every pooled row needs three rows of convolution, and strips have four: between two strips there
// is always one that both need. Within a job the kernel keeps it. Between two jobs it goes through
// memory, pooled along the columns, and whichever of the two ends last joins it to the pooled row:
// nothing is computed twice, no job waits for another, and jobs may be as short as their balance
// over the threads asks for. The result does not depend on who is last, because a maximum does not.
//
// Measured on Zen 4 at 3.65 GHz, 3 x 224 x 224 to 64 channels, float32: 1.10 ms on one core, less
// than the 1.14 without the pool, whose output is four times as large. On two cores, medians of
// interleaved runs: 0.76 ms at batch 1 and 5.4 at batch 8, where PyTorch's prepacked convolution
// alone takes 1.18 and 10.7; bfloat16 0.81 and 5.9, against 0.99 and 11.5.
#pragma once

#include "cpu/conv_jobs.h"

namespace resnet_fused {

// Memory for the rows between jobs: its bytes, and what the calling thread does with it before any
// job starts.
int64_t stem_edge_bytes(const ConvJobs& conv);
void clear_stem_edges(const ConvJobs& conv, void* edges);

// All jobs of a convolution of the plan "stem", as a loop of a team's or on PyTorch's threads; its
// y is the pooled image.
void run_pooled_stem(Member& member, const ConvJobs& conv, void* edges);
void run_pooled_stem(const ConvJobs& conv);

}  // namespace resnet_fused
