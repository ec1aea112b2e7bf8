// A simulated accelerator for torch: a device made of RAM that behaves like one. See docs/simulated-device.md.
//
//     streams.h      kernels that wait to be run, and in which order they may be
//     memory.h       device memory that the host cannot touch, with a hard capacity; page-locked host memory
//     interface.h    what torch asks of a device
//     operators.h    the kernels of the CPU, run late
//     device.cpp     registers all that, and what Python may ask
//
// One translation unit: torch's headers take longer to compile than all of this.
#include <ATen/autocast_mode.h>
#include "operators.h"

namespace sim {
namespace {

c10::impl::DeviceGuardImplRegistrar registrar(DEVICE_TYPE, &guard);

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("is_set_to", at::native::is_set_to);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage_offset);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("record_stream", record_stream);
  library.impl("dropout", dropout);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) { library.impl("dropout", dropout); }

// What autocast does is not to be tested here, only what it is used around: a few of its casts do.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // torch's macros want this name
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel_of_cpu>());
}

}  // namespace
}  // namespace sim

// For ctypes: no exception leaves these.
extern "C" {

void sim_register() {
  c10::SetAllocator(sim::DEVICE_TYPE, &sim::device_memory);
  at::RegisterPrivateUse1HooksInterface(&sim::hooks);
}

// Use the CPU's kernel of an operator that torch would take apart into others on any other device.
void sim_use_kernel_of_cpu(const char* name) {
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  library.impl(name, torch::CppFunction::makeFromBoxedFunction<&sim::kernel_of_cpu>());
}

void sim_seed(uint64_t seed, double eager, double lazy) {
  sim::Lock lock(sim::device_mutex);
  sim::streams.seed(seed);
  sim::streams.eager = eager;
  sim::streams.lazy = lazy;
}

void sim_set_capacity(size_t nbytes) {
  sim::Lock lock(sim::device_mutex);
  sim::device_memory.capacity = nbytes;
}

size_t sim_pending() {
  sim::Lock lock(sim::device_mutex);
  return sim::streams.pending();
}
}
