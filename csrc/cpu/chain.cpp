#include "cpu/chain.h"

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/output_memory.h"

namespace resnet_fused {
namespace {

// Memory for a call: kept by its thread or, where it is large, for all of them.
class CallMemory {
 public:
  explicit CallMemory(int64_t bytes) : bytes_(bytes) {
    address_ = static_cast<char*>(is_large() ? take_output_memory(bytes) : thread_arena(bytes));
  }
  ~CallMemory() {
    if (is_large()) give_back_output_memory(address_, bytes_);
  }
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;

  char* address() const { return address_; }

 private:
  bool is_large() const { return kOwnMemory && bytes_ >= kLeastKept; }

  int64_t bytes_;
  char* address_;
};

// Where everything lies between x and y: the blocks' outputs alternate between two maps.
class Layout {
 public:
  explicit Layout(const ChainArgs& chain) {
    runs_.reserve(chain.blocks.size());
    edges_at_.reserve(chain.blocks.size());
    const bool ends = !chain.mean;  // the last block writes y
    for (size_t i = 0; i < chain.blocks.size(); ++i) {
      const Block& block = *chain.blocks[i];
      runs_.emplace_back(block, workers_);
      if (!(ends && i + 1 == chain.blocks.size())) {
        const int64_t batch = block.convs[0].shape.batch;
        maps_[i % 2] = std::max(maps_[i % 2], aligned(batch * block.output_bytes()));
      }
      between_ = std::max(between_, aligned(runs_[i].bytes()));
      edges_at_.push_back(edges_);
      edges_ += aligned(runs_[i].edge_bytes());
    }
    if (chain.linear) means_ = aligned(chain.linear->images * chain.linear->inputs * 4);
  }

  const Workers& workers() const { return workers_; }
  const std::vector<BlockRun>& runs() const { return runs_; }
  int64_t bytes() const { return maps_[0] + maps_[1] + between_ + edges_ + means_; }
  char* map(char* memory, size_t block) const { return memory + (block % 2 ? maps_[0] : 0); }
  char* between(char* memory) const { return memory + maps_[0] + maps_[1]; }
  char* edges(char* memory, size_t block) const {
    return between(memory) + between_ + edges_at_[block];
  }
  char* means(char* memory) const { return between(memory) + between_ + edges_; }

 private:
  Workers workers_;
  std::vector<BlockRun> runs_;
  int64_t maps_[2] = {0, 0};
  int64_t between_ = 0, edges_ = 0, means_ = 0;
  std::vector<int64_t> edges_at_;  // each block's
};

// Multiply-adds of a job of the linear layer, about.
constexpr int64_t kLinearJob = 1 << 14;

void run_head(Member& member, const ChainArgs& chain, const Kernels& isa, const void* map,
              void* means) {
  MeanArgs mean = *chain.mean;
  mean.x = map;
  mean.y = chain.linear ? means : chain.y;
  const int64_t images = chain.blocks.back()->convs[0].shape.batch;
  member.for_each_job(images * mean_steps(mean.channels),
                      [&](int64_t step) { isa.mean(mean, step, step + 1); });
  if (!chain.linear) return;
  LinearArgs linear = *chain.linear;
  linear.x = means;
  linear.y = chain.y;
  const int64_t outputs = kLinearJob / std::max<int64_t>(linear.inputs, 1) + 1;  // of a job
  member.for_each_job(ceil_div(linear.outputs, outputs), [&](int64_t job) {
    isa.linear(linear, job * outputs, std::min((job + 1) * outputs, linear.outputs));
  });
}

}  // namespace

void run_chain(const ChainArgs& chain) {
  const Layout layout(chain);
  const CallMemory held(layout.bytes());
  char* const memory = held.address();
  const size_t count = layout.runs().size();
  for (size_t i = 0; i < count; ++i) layout.runs()[i].clear_edges(layout.edges(memory, i));
  run_together(Team::kMost, layout.workers().threads, [&](Member& member) {
    const char* x = static_cast<const char*>(chain.x);
    for (size_t i = 0; i < count; ++i) {
      const bool ends = i + 1 == count && !chain.mean;
      char* const y = ends ? static_cast<char*>(chain.y) : layout.map(memory, i);
      layout.runs()[i].run(member, x, y, layout.between(memory), layout.edges(memory, i));
      x = y;
    }
    if (chain.mean) run_head(member, chain, *layout.workers().isa, x, layout.means(memory));
  });
}

}  // namespace resnet_fused
