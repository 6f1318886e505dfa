// A convolution as a list of independent jobs, so that one parallel region can run several.
//
// A plain value that owns nothing: making it allocates nothing, and it may be used for as long as
// the pointers in its arguments are valid.
#pragma once

#include "conv.h"
#include "cpu/cut.h"
#include "cpu/kernels.h"
#include "cpu/team.h"

namespace resnet_fused {

// What all jobs of a call are made for, taken once: others may change it while the call runs.
struct Workers {
  const Kernels* isa = &kernels();
  int64_t threads = thread_count();
};

struct ConvJobs {
  ConvArgs args;
  const Kernels* isa;
  Cut cut;
  int64_t count;  // 0 where the output is empty

  // args.plan: any but kTorch, and one that can compute args.shape on this instruction set.
  ConvJobs(const ConvArgs& args, const Workers& workers);

  // Computes job `index` in the scratch memory of the calling thread. previous: the job of this
  // very convolution that the thread ran last, if it ran nothing since then, else -1.
  void run(int64_t index, int64_t previous) const;
};

// All jobs of a convolution, as a loop of a team's or on PyTorch's threads.
void run_conv(Member& member, const ConvJobs& conv);
void run_conv(const ConvJobs& conv);

// All jobs of two convolutions that do not depend on each other, in one loop: a thread that finds
// no job left in the first goes on with the second.
void run_convs(Member& member, const ConvJobs& first, const ConvJobs& second);

}  // namespace resnet_fused
