// Memory of the simulated device, and page-locked memory of the host.
//
// One file in RAM is mapped twice:
//
//     shown    what tensors have as their address; no access allowed, so that a host that reads or writes device memory
//              dies at that line
//     hidden   the same bytes, where kernels find them
//
// Blocks are handed on in the order of their stream, as CUDA's caching allocator does it: one that is freed is kept for
// the next allocation on the stream that it was allocated on, which may get it while kernels of *other* streams
// still use it. What an allocation returns is filled with NaN (in stream order), whatever lay there before.
#pragma once
#include <c10/core/CachingDeviceAllocator.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cstring>
#include <set>
#include "streams.h"

namespace sim {

constexpr auto DEVICE_TYPE = c10::DeviceType::PrivateUse1;
constexpr size_t ADDRESS_SPACE = 32ull << 30;
constexpr size_t ALIGNMENT = 512;

inline c10::Device the_device() { return {DEVICE_TYPE, 0}; }

// Which ranges of the device's address space nobody has.
class AddressSpace {
 public:
  void map() {
    if (shown_ != nullptr) return;
    file_ = memfd_create("simulated-device", 0);
    TORCH_CHECK(file_ >= 0 && ftruncate(file_, ADDRESS_SPACE) == 0, "simulated device: the system gives no memfd");
    auto at = [&](int access) { return mmap(nullptr, ADDRESS_SPACE, access, MAP_SHARED | MAP_NORESERVE, file_, 0); };
    void *hidden = at(PROT_READ | PROT_WRITE), *shown = at(PROT_NONE);
    TORCH_CHECK(hidden != MAP_FAILED && shown != MAP_FAILED, "simulated device: the system maps no memory");
    hidden_ = static_cast<char*>(hidden), shown_ = static_cast<char*>(shown);
    holes_[0] = ADDRESS_SPACE;
  }

  char* shown(size_t offset) const { return shown_ + offset; }
  char* hidden(size_t offset) const { return hidden_ + offset; }
  size_t offset_of(const void* shown) const {
    auto address = static_cast<const char*>(shown);
    TORCH_CHECK(shown_ && address >= shown_ && address < shown_ + ADDRESS_SPACE, "simulated device: not its memory");
    return address - shown_;
  }

  // The first hole that is large enough. There is far more address space than memory, so that holes do no harm.
  size_t take(size_t size) {
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
      auto [offset, room] = *hole;
      if (room < size) continue;
      holes_.erase(hole);
      if (room > size) holes_[offset + size] = room - size;
      return offset;
    }
    TORCH_CHECK(false, "simulated device: its address space is used up");
  }

  void give_back(size_t offset, size_t size) {
    fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
    auto next = holes_.lower_bound(offset);
    if (next != holes_.end() && next->first == offset + size) size += next->second, next = holes_.erase(next);
    if (next != holes_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == offset) return void(before->second += size);
    }
    holes_[offset] = size;
  }

 private:
  int file_ = -1;
  char *shown_ = nullptr, *hidden_ = nullptr;
  std::map<size_t, size_t> holes_;  // offset -> size
};

inline AddressSpace address_space;

inline void free_device_memory(void* context);

// Stream-ordered, with a hard capacity: blocks in use and blocks kept for reuse never exceed it together.
class DeviceMemory final : public c10::DeviceAllocator {
 public:
  size_t capacity = 4ull << 30;

  c10::DataPtr allocate(size_t nbytes) override {
    Lock lock(device_mutex);
    address_space.map();
    if (nbytes == 0) return {nullptr, nullptr, &free_device_memory, the_device()};
    Block block = find((nbytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, nbytes);
    stats_.allocation[0].increase(1);
    stats_.allocated_bytes[0].increase(block.size);
    live_[block.offset] = block;
    streams.put_kernel(current_stream, [block] { memset(address_space.hidden(block.offset), 0xFF, block.size); });
    void* shown = address_space.shown(block.offset);
    return {shown, shown, &free_device_memory, the_device()};
  }

  void free(void* shown) {
    Lock lock(device_mutex);
    auto found = live_.find(address_space.offset_of(shown));
    Block block = found->second;
    live_.erase(found);
    for (auto stream : block.also_used_by) streams.wait_for_stream(stream);
    stats_.allocation[0].decrease(1);
    stats_.allocated_bytes[0].decrease(block.size);
    kept_[block.stream].emplace(block.size, block.offset);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_device_memory; }
  bool initialized() override { return true; }

  void copy_data(void* into, const void* from, size_t nbytes) const override {
    char *to = address_space.hidden(address_space.offset_of(into));
    char *source = address_space.hidden(address_space.offset_of(from));
    put([=] { memcpy(to, source, nbytes); });
  }

  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    Lock lock(device_mutex);
    if (pointer.get_deleter() != &free_device_memory || !pointer.get()) return;  // another's, as CUDA has it
    live_.at(address_space.offset_of(pointer.get())).also_used_by.insert(stream.id());
  }

  void emptyCache(c10::MempoolId_t) override {
    Lock lock(device_mutex);
    give_back_kept();
  }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    Lock lock(device_mutex);
    return stats_;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    Lock lock(device_mutex);
    stats_.allocated_bytes[0].reset_peak();
    stats_.reserved_bytes[0].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    Lock lock(device_mutex);
    return {capacity - std::min(capacity, reserved()), capacity};
  }

 private:
  struct Block {
    size_t offset, size;
    StreamId stream;
    std::set<StreamId> also_used_by;
  };

  Block find(size_t size, size_t asked) {
    for (bool is_retry : {false, true}) {
      auto& kept = kept_[current_stream];
      auto reused = kept.lower_bound(size);
      if (reused != kept.end() && reused->first <= size + size / 8) {
        Block block{reused->second, reused->first, current_stream, {}};
        kept.erase(reused);
        return block;
      }
      if (reserved() + size <= capacity) {
        stats_.reserved_bytes[0].increase(size);
        ++stats_.num_device_alloc;
        return {address_space.take(size), size, current_stream, {}};
      }
      if (is_retry) break;
      ++stats_.num_alloc_retries;
      give_back_kept();
    }
    ++stats_.num_ooms;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "simulated device out of memory. Tried to allocate ", asked, " bytes; capacity ",
        capacity, ", allocated ", stats_.allocated_bytes[0].current, ", kept for reuse ",
        reserved() - stats_.allocated_bytes[0].current);
  }

  void give_back_kept() {
    streams.wait_for_all();
    for (auto& [_, blocks] : kept_) {
      for (auto [size, offset] : blocks) {
        address_space.give_back(offset, size);
        stats_.reserved_bytes[0].decrease(size);
      }
      blocks.clear();
    }
  }

  size_t reserved() const { return stats_.reserved_bytes[0].current; }

  std::map<size_t, Block> live_;                               // by offset
  std::map<StreamId, std::multimap<size_t, size_t>> kept_;     // of each stream: size -> offset
  c10::CachingDeviceAllocator::DeviceStats stats_;
};

inline DeviceMemory device_memory;
inline void free_device_memory(void* shown) { device_memory.free(shown); }

// Page-locked memory of the host: copies may use it later than when they are asked for. Other memory is copied to a
// place of its own first (see `copy_from`).
class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    void* memory = nullptr;
    size_t size = std::max<size_t>(nbytes, 1);
    TORCH_CHECK(posix_memalign(&memory, 4096, size) == 0, "simulated device: no memory to be page-locked");
    Lock lock(device_mutex);
    ranges_[reinterpret_cast<size_t>(memory)] = size;
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* into, const void* from, size_t nbytes) const override { memcpy(into, from, nbytes); }

  bool has(const void* pointer) {
    Lock lock(device_mutex);
    auto address = reinterpret_cast<size_t>(pointer);
    auto after = ranges_.upper_bound(address);
    return after != ranges_.begin() && (--after, address < after->first + after->second);
  }

 private:
  static void release(void* memory);
  std::map<size_t, size_t> ranges_;  // address -> size
  std::vector<void*> released_;      // kept until no copy can need it, as a real allocator does it
};

inline PinnedMemory pinned_memory;

inline void PinnedMemory::release(void* memory) {
  Lock lock(device_mutex);
  pinned_memory.ranges_.erase(reinterpret_cast<size_t>(memory));
  auto& released = pinned_memory.released_;
  released.push_back(memory);
  if (streams.pending() > 0) return;
  for (void* each : released) std::free(each);
  released.clear();
}

}  // namespace sim
