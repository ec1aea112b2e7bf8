// Streams and events of the simulated device: queues of kernels that have been put in but not run.
//
// Nothing runs by itself. A kernel runs when somebody waits for it, or when putting in another one lets the device go
// on a little (`eager`). What runs next is drawn among the heads of all queues that do not wait for an event, so that
// any order that the events allow can come up. A wait that is missing then shows up as wrong numbers for some seeds. On
// one thread the same seed gives the same order.
//
// A wait runs either whatever is drawn until it is satisfied, or (with the chance `lazy`) only what it needs: the first
// finds kernels that run too early, the second kernels that run too late.
#pragma once
#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace sim {

using StreamId = int64_t;

// Guards the whole device. Recursive, because kernels run under it and allocate.
inline std::recursive_mutex device_mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

// A place in a stream. An event that is recorded again stands for another place from then on.
struct Place {
  StreamId stream;
  bool reached = false;
};
using PlaceRef = std::shared_ptr<Place>;

class Streams {
 public:
  // The chances described above.
  double eager = 0.3, lazy = 0.5;

  void seed(uint64_t value) { random_.seed(value); }

  StreamId create() { return ++last_created_; }

  void put_kernel(StreamId stream, std::function<void()> kernel) { put(stream, {std::move(kernel), nullptr, nullptr}); }

  PlaceRef record(StreamId stream) {
    auto place = std::make_shared<Place>(Place{stream});
    put(stream, {nullptr, place, nullptr});
    return place;
  }

  // The stream goes on only when the place has been reached.
  void hold(StreamId stream, PlaceRef place) { put(stream, {nullptr, nullptr, std::move(place)}); }

  bool is_idle(StreamId stream) {
    run_one();
    return queues_[stream].entries.empty();
  }

  bool is_reached(const PlaceRef& place) {
    if (!place->reached) run_one();  // else a loop that asks until it is would never end
    return place->reached;
  }

  void wait_for(const PlaceRef& place) {
    bool only_needed = draw() < lazy;
    while (!place->reached) only_needed ? run_towards(place->stream) : (void)run_one();
  }

  void wait_for_stream(StreamId stream) {
    Queue& queue = queues_[stream];
    bool only_needed = draw() < lazy;
    for (uint64_t last = queue.put; queue.done < last;) only_needed ? run_towards(stream) : (void)run_one();
  }

  void wait_for_all() {
    while (run_one()) {}
  }

  // A kernel's error is told at the next wait, as a device does. For callers without the lock.
  void raise_failure() {
    std::string what;
    {
      Lock lock(device_mutex);
      what.swap(failure_);
    }
    TORCH_CHECK(what.empty(), "simulated device: a kernel failed earlier: ", what);
  }

  size_t pending() const {
    size_t count = 0;
    for (auto& [_, queue] : queues_) count += queue.entries.size();
    return count;
  }

 private:
  struct Entry {
    std::function<void()> kernel;
    PlaceRef reaches, waits_for;
  };
  struct Queue {
    std::deque<Entry> entries;
    uint64_t put = 0, done = 0;
    bool can_go_on() const {
      return !entries.empty() && (!entries.front().waits_for || entries.front().waits_for->reached);
    }
  };

  double draw() { return std::uniform_real_distribution<>()(random_); }

  void put(StreamId stream, Entry entry) {
    Queue& queue = queues_[stream];
    queue.entries.push_back(std::move(entry));
    ++queue.put;
    while (draw() < eager && run_one()) {}
  }

  // Run the head of any queue; false if there is none. (One that waits for a place is not alone: what reaches the place
  // was put in before it.)
  bool run_one() {
    std::vector<Queue*> able;
    for (auto& [_, queue] : queues_)
      if (queue.can_go_on()) able.push_back(&queue);
    if (able.empty()) return false;
    run_head(*able[random_() % able.size()]);
    return true;
  }

  void run_towards(StreamId stream) {
    Queue& queue = queues_[stream];
    queue.can_go_on() ? run_head(queue) : run_towards(queue.entries.front().waits_for->stream);
  }

  void run_head(Queue& queue) {
    Entry entry = std::move(queue.entries.front());
    queue.entries.pop_front();
    if (entry.kernel) run_kernel(entry.kernel);
    if (entry.reaches) entry.reaches->reached = true;
    ++queue.done;
  }

  // Without the modes of the thread that happens to wait: none of its autograd, autocast or Python modes.
  void run_kernel(const std::function<void()>& kernel) {
    auto excluded = c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView;
    c10::impl::ForceDispatchKeyGuard plain(c10::default_included_set, excluded);
    at::NoGradGuard no_grad;
    try {
      kernel();
    } catch (const std::exception& error) {
      if (failure_.empty()) failure_ = error.what();
    }
  }

  std::map<StreamId, Queue> queues_;
  StreamId last_created_ = 0;  // 0 itself is the default stream
  std::mt19937_64 random_{0};
  std::string failure_;
};

inline Streams streams;

// The stream that this thread puts kernels into.
inline thread_local StreamId current_stream = 0;

inline void put(std::function<void()> kernel) {
  Lock lock(device_mutex);
  streams.put_kernel(current_stream, std::move(kernel));
}

inline void wait_for_stream(StreamId stream) {
  {
    Lock lock(device_mutex);
    streams.wait_for_stream(stream);
  }
  streams.raise_failure();
}

}  // namespace sim
