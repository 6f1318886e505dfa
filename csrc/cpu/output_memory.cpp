#include "cpu/output_memory.h"

#include <mutex>
#include <vector>

#include "cpu/pages.h"

namespace resnet_fused {
namespace {

constexpr int64_t kMostKept = int64_t{512} << 20;  // bytes

struct Block {
  char* address;
  int64_t bytes;
};

// Free blocks, the one that came back last at the end. Nobody waits for the lock, so that a process
// forked while another thread held it goes on, without keeping anything.
struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;
  int64_t bytes = 0;
};

Kept& kept() {
  static Kept* const all = new Kept;  // outputs may be freed after static objects
  return *all;
}

// Takes blocks out of `kept`, from the oldest on, until it has no more than `most` bytes.
std::vector<Block> take_oldest(Kept& all, int64_t most) {
  size_t count = 0;
  for (; all.bytes > most; ++count) all.bytes -= all.blocks[count].bytes;
  const auto end = all.blocks.begin() + static_cast<std::ptrdiff_t>(count);
  std::vector<Block> oldest(all.blocks.begin(), end);
  all.blocks.erase(all.blocks.begin(), end);
  return oldest;
}

}  // namespace

void* take_output_memory(int64_t bytes) {
  const int64_t size = whole_pages(bytes);
  Kept& all = kept();
  if (std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock); lock) {
    // The newest of this size, which is the warmest.
    for (auto block = all.blocks.end(); block != all.blocks.begin();) {
      if ((--block)->bytes != size) continue;
      char* const address = block->address;
      all.bytes -= size;
      all.blocks.erase(block);
      return address;
    }
  }
  return map_pages(size, "an output");
}

void give_back_output_memory(void* address, int64_t bytes) {
  const Block block{static_cast<char*>(address), whole_pages(bytes)};
  std::vector<Block> surplus{block};
  Kept& all = kept();
  if (std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock); lock) {
    all.blocks.push_back(block);
    all.bytes += block.bytes;
    surplus = take_oldest(all, kMostKept);
  }
  for (const Block& one : surplus) unmap_pages(one.address, one.bytes);
}

void drop_output_memory() {
  Kept& all = kept();
  std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
  if (!lock) return;
  for (const Block& block : take_oldest(all, 0)) unmap_pages(block.address, block.bytes);
}

}  // namespace resnet_fused
