// What torch asks of a device: the current stream, events, and the hooks of an accelerator.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include "memory.h"

namespace sim {

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return DEVICE_TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return the_device(); }
  c10::Device getDevice() const override { return the_device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Lock lock(device_mutex);
    return stream(streams.create());
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(current_stream, next.id()));
  }
  bool queryStream(const c10::Stream& of) const override {
    Lock lock(device_mutex);
    return streams.is_idle(of.id());
  }
  void synchronizeStream(const c10::Stream& of) const override { wait_for_stream(of.id()); }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    {
      Lock lock(device_mutex);
      streams.wait_for_all();
    }
    streams.raise_failure();
  }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& of) const override {
    device_memory.recordStream(pointer, of);
  }

  // An event is a pointer to the place where it was recorded last; torch keeps it for us, null at first.
  void record(void** event, const c10::Stream& of, const c10::DeviceIndex, const c10::EventFlag) const override {
    Lock lock(device_mutex);
    if (*event == nullptr) *event = new PlaceRef();
    place(*event) = streams.record(of.id());
  }
  void block(void* event, const c10::Stream& of) const override {
    Lock lock(device_mutex);
    if (event != nullptr) streams.hold(of.id(), place(event));
  }
  bool queryEvent(void* event) const override {
    Lock lock(device_mutex);
    return event == nullptr || streams.is_reached(place(event));
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    {
      Lock lock(device_mutex);
      streams.wait_for(PlaceRef(place(event)));
    }
    streams.raise_failure();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    Lock lock(device_mutex);
    delete static_cast<PlaceRef*>(event);
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 1.0; }

 private:
  static c10::Stream stream(StreamId id) { return c10::Stream(c10::Stream::UNSAFE, the_device(), id); }
  static PlaceRef& place(void* event) { return *static_cast<PlaceRef*>(event); }
};

inline Guard guard;

// Random numbers come from the CPU's generator, so that a model draws the same ones on both.
class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator_; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  c10::Device getDeviceFromPtr(void*) const override { return the_device(); }
  bool isPinnedPtr(const void* pointer) const override { return pinned_memory.has(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    TORCH_CHECK(impl->resizable(), "Trying to resize storage that is not resizable");
    auto memory = device_memory.allocate(nbytes);
    if (size_t kept = std::min(nbytes, impl->nbytes())) device_memory.copy_data(memory.get(), impl->data(), kept);
    impl->set_data_ptr(std::move(memory));
    impl->set_nbytes(nbytes);
  }

 private:
  at::Generator generator_ = at::detail::getDefaultCPUGenerator();
};

inline Hooks hooks;

}  // namespace sim
