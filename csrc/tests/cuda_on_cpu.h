// As much of CUDA C++ as our kernels use, on one CPU thread: each GPU thread is a fiber that runs
// until it waits for others. All blocks of a launch are alive at once, and their shared memory
// begins as NaN. Where every fiber waits, a barrier was not reached by all: that is an error.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

namespace kvpo::cuda {

using std::isfinite;

class Grid {
public:
  struct Index {
    unsigned x;
  };

  Grid(unsigned blocks, unsigned threads, size_t shared_bytes)
      : blocks_(blocks), threads_(threads) {
    all_.size = static_cast<int>(blocks * threads);
    for (unsigned b = 0; b < blocks; ++b) {
      block_barriers_.push_back({static_cast<int>(threads), 0, 0});
      shared_.emplace_back(new Line[shared_bytes / sizeof(Line) + 1]);
      std::memset(static_cast<void*>(shared_.back().get()), 0xff, shared_bytes);
      for (unsigned w = 0; w < threads / 32; ++w)
        warps_.push_back({{32, 0, 0}, {}});
    }
  }

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    current_ = this;
    for (unsigned i = 0; i < blocks_ * threads_; ++i) {
      fibers_.emplace_back(new Fiber);
      prepare(*fibers_.back());
    }
    for (size_t done = 0; done < fibers_.size();) {
      moved_ = false;
      done = 0;
      for (fiber_ = 0; fiber_ < fibers_.size(); ++fiber_) {
        Fiber& f = *fibers_[fiber_];
        if (!f.done)
          resume(f);
        done += f.done;
      }
      if (!moved_ && done < fibers_.size())
        fail("every thread waits");
    }
    current_ = nullptr;
  }

  static Grid& current() { return *current_; }
  Index thread() const { return {static_cast<unsigned>(fiber_ % threads_)}; }
  Index block() const { return {static_cast<unsigned>(fiber_ / threads_)}; }
  Index size() const { return {blocks_}; }
  void* shared() { return shared_[block().x].get(); }
  void wait_for_block() { wait(block_barriers_[block().x]); }
  void wait_for_grid() { wait(all_); }

  template <typename T> T from_lane_xor(T value, int mask) {
    Warp& warp = warps_[fiber_ / 32];
    const size_t lane = fiber_ % 32;
    std::memcpy(&warp.values[lane], &value, sizeof(T));
    wait(warp.barrier);
    std::memcpy(&value, &warp.values[lane ^ static_cast<size_t>(mask)], sizeof(T));
    wait(warp.barrier); // all have read
    return value;
  }

private:
  struct alignas(16) Line {
    char bytes[16];
  };
  struct Fiber {
    ucontext_t context;
    bool done = false;
    char stack[48 << 10];
  };
  struct Barrier {
    int size, arrived, generation;
  };
  struct Warp {
    Barrier barrier;
    double values[32];
  };

  [[noreturn]] static void fail(const char* what) {
    std::printf("FAILED: %s\n", what);
    std::exit(1);
  }

  static void prepare(Fiber& f) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = sizeof(f.stack);
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Grid::enter, 0);
  }

  static void enter() {
    Grid& grid = *current_;
    grid.switched(nullptr);
    (*grid.kernel_)();
    grid.moved_ = true;
    grid.fibers_[grid.fiber_]->done = true;
    grid.leave(true);
  }

  void wait(Barrier& barrier) {
    moved_ = true;
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    while (barrier.generation == generation)
      leave(false);
    moved_ = true;
  }

  void resume(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack, sizeof(f.stack));
    swapcontext(&scheduler_, &f.context);
    switched(fake);
#else
    swapcontext(&scheduler_, &f.context);
#endif
  }

  void leave(bool forever) {
    Fiber& f = *fibers_[fiber_];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake, scheduler_stack_, scheduler_size_);
    swapcontext(&f.context, &scheduler_);
    switched(fake);
#else
    (void)forever;
    swapcontext(&f.context, &scheduler_);
#endif
  }

  // On the other side of a switch; a fiber comes from the scheduler.
  void switched(void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
    if (scheduler_stack_ == nullptr)
      scheduler_stack_ = bottom, scheduler_size_ = size;
#else
    (void)fake;
#endif
  }

  inline static Grid* current_ = nullptr;
  unsigned blocks_, threads_;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  size_t fiber_ = 0;
  bool moved_ = false;
  Barrier all_{0, 0, 0};
  std::vector<Barrier> block_barriers_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Line[]>> shared_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

#define threadIdx (::kvpo::cuda::Grid::current().thread())
#define blockIdx (::kvpo::cuda::Grid::current().block())
#define gridDim (::kvpo::cuda::Grid::current().size())

inline void __syncthreads() {
  Grid::current().wait_for_block();
}
inline void __threadfence() {}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return Grid::current().from_lane_xor(value, mask);
}
template <typename T> T __ldcg(const T* from) {
  return *from;
}
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

inline void* shared_memory() {
  return Grid::current().shared();
}
inline void grid_barrier() {
  Grid::current().wait_for_grid();
}
inline uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

} // namespace kvpo::cuda
