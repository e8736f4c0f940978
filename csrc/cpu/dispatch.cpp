// From the public entry points of the CPU kernels to the build for this machine's instruction set.
#include "isa.h"
#include "kvpo/norm_rope.h"
#include "kvpo/peak_flops.h"
#include "kvpo/routed_attention.h"
#include "kvpo/store_frames.h"
#include "kvpo/tve_grpo.h"

// For `void kvpo::cpu::f(const Args&)` declared in a header, the kernel file defines
// `kvpo::cpu::<isa>::f`. Each use of the macro declares those and defines the choice.
#if KVPO_X86
#define KVPO_DISPATCH(f, Args)                                                                     \
  namespace portable {                                                                             \
  void f(const Args&);                                                                             \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  void f(const Args&);                                                                             \
  }                                                                                                \
  namespace avx512 {                                                                               \
  void f(const Args&);                                                                             \
  }                                                                                                \
  namespace avx512_bf16 {                                                                          \
  void f(const Args&);                                                                             \
  }                                                                                                \
  void f(const Args& args) {                                                                       \
    switch (isa()) {                                                                               \
    case Isa::kAvx512Bf16:                                                                         \
      return avx512_bf16::f(args);                                                                 \
    case Isa::kAvx512:                                                                             \
      return avx512::f(args);                                                                      \
    case Isa::kAvx2:                                                                               \
      return avx2::f(args);                                                                        \
    case Isa::kPortable:                                                                           \
      return portable::f(args);                                                                    \
    }                                                                                              \
  }
#else
#define KVPO_DISPATCH(f, Args)                                                                     \
  namespace portable {                                                                             \
  void f(const Args&);                                                                             \
  }                                                                                                \
  void f(const Args& args) {                                                                       \
    portable::f(args);                                                                             \
  }
#endif

namespace kvpo::cpu {
KVPO_DISPATCH(peak_flops, PeakFlops)
KVPO_DISPATCH(routed_attention_forward, RoutedAttentionForward)
KVPO_DISPATCH(routed_attention_backward, RoutedAttentionBackward)
KVPO_DISPATCH(norm_rope_forward, NormRopeForward)
KVPO_DISPATCH(norm_rope_backward, NormRopeBackward)
KVPO_DISPATCH(norm_rope_write, NormRopeWrite)
KVPO_DISPATCH(store_frames, StoreFrames)
KVPO_DISPATCH(velocity_energy, VelocityEnergy)
KVPO_DISPATCH(velocity_gradient, VelocityGradient)
KVPO_DISPATCH(tve_grpo, TveGrpo)
} // namespace kvpo::cpu
