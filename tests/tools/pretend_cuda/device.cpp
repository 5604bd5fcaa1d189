// PyTorch's device type CUDA in host memory, for a PyTorch that was built without CUDA: allocators,
// streams and events that only say what happened, generators, and the operators that allocate or
// view. Every other operator is run on the host by operators.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace pretend {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;
using Address = uintptr_t;

struct Block {
  size_t bytes;
  int64_t generation;  // two allocations never have the same
  int64_t stream;      // that was current
  bool of_graph;       // allocated in a capture, never reused
};

std::mutex mutex;  // of all that follows
std::map<Address, Block> blocks;
std::map<Address, size_t> pinned;
int64_t generations = 0, live_bytes = 0, peak_bytes = 0, streams = 1, events = 1;
// What happened since Python last asked: (what, event or address, stream or generation).
std::vector<std::tuple<std::string, int64_t, int64_t>> happened;

std::atomic<bool> capturing{false};
thread_local int64_t current_stream = 0;
thread_local DeviceIndex current_device = 0;

void tell(const std::string& what, int64_t a, int64_t b) {
  std::lock_guard<std::mutex> lock(mutex);
  happened.emplace_back(what, a, b);
}

void refuse_in_capture(const char* what) {
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing: ", what);
}

// The entry of a map from addresses to extents in which p lies, or its end.
template <class Map, class Bytes>
typename Map::iterator around(Map& map, Address p, Bytes bytes) {
  auto after = map.upper_bound(p);
  if (after == map.begin()) return map.end();
  auto found = std::prev(after);
  return p < found->first + bytes(found->second) ? found : map.end();
}

void* allocated(size_t bytes) {
  void* p = std::aligned_alloc(512, (std::max<size_t>(bytes, 1) + 511) / 512 * 512);
  TORCH_CHECK(p, "the pretended device is out of memory");
  return p;
}

void release(void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(reinterpret_cast<Address>(p));
  if (found == blocks.end()) return;
  live_bytes -= found->second.bytes;
  if (found->second.of_graph) return;  // its graph replays into it
  happened.emplace_back("free", found->first, found->second.generation);
  std::memset(p, 0xFF, found->second.bytes);
  blocks.erase(found);
  std::free(p);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    Device device(DeviceType::CUDA, current_device);
    if (n == 0) return {nullptr, nullptr, &release, device};
    void* p = allocated(n);
    std::memset(p, 0xFF, n);  // NaN in every floating-point type
    std::lock_guard<std::mutex> lock(mutex);
    blocks[reinterpret_cast<Address>(p)] = {n, ++generations, current_stream, capturing};
    live_bytes += n;
    peak_bytes = std::max(peak_bytes, live_bytes);
    return {p, p, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

void unpin(void* p) {
  std::lock_guard<std::mutex> lock(mutex);
  pinned.erase(reinterpret_cast<Address>(p));
  std::free(p);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = allocated(n);
    std::lock_guard<std::mutex> lock(mutex);
    pinned[reinterpret_cast<Address>(p)] = n;
    return {p, p, &unpin, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(mutex);
  auto bytes = [](size_t n) { return std::max<size_t>(n, 1); };
  return around(pinned, reinterpret_cast<Address>(data), bytes) != pinned.end();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current_device); }
  Device exchangeDevice(Device d) const override {
    Device before = getDevice();
    setDevice(d);
    return before;
  }
  void setDevice(Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.index() >= 0) current_device = d.index();
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream stream(int64_t id) const {
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, 0), id);
  }
  Stream getStream(Device) const override { return stream(current_stream); }
  Stream getDefaultStream(Device) const override { return stream(0); }
  Stream exchangeStream(Stream s) const override {
    return stream(std::exchange(current_stream, s.id()));
  }
  void record(void** event, const Stream& s, const DeviceIndex, const c10::EventFlag)
      const override {
    std::lock_guard<std::mutex> lock(mutex);
    if (!*event) *event = reinterpret_cast<void*>(events++);
    happened.emplace_back("record", reinterpret_cast<int64_t>(*event), s.id());
  }
  void block(void* event, const Stream& s) const override {
    tell("wait", reinterpret_cast<int64_t>(event), s.id());
  }
  bool queryEvent(void*) const override {
    refuse_in_capture("cudaEventQuery");
    return true;
  }
  bool queryStream(const Stream&) const override {
    refuse_in_capture("cudaStreamQuery");
    return true;
  }
  bool isStreamCapturing(const Stream&) const override { return capturing; }
  void synchronizeStream(const Stream& s) const override {
    refuse_in_capture("cudaStreamSynchronize");
    tell("synchronize stream", 0, s.id());
  }
  void synchronizeEvent(void* event) const override {
    refuse_in_capture("cudaEventSynchronize");
    tell("synchronize event", reinterpret_cast<int64_t>(event), 0);
  }
  void synchronizeDevice(const DeviceIndex) const override {
    refuse_in_capture("cudaDeviceSynchronize");
    tell("synchronize", 0, 0);
  }
  void recordDataPtrOnStream(const c10::DataPtr& p, const Stream& s) const override {
    tell("record_stream", reinterpret_cast<int64_t>(p.get()), s.id());
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

at::Generator new_generator() {
  return at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val);
}

const at::Generator& default_generator() {
  static at::Generator generator = new_generator();
  return generator;
}

struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return pretend::current_device; }
  DeviceIndex getCurrentDevice() const override { return pretend::current_device; }
  void setCurrentDevice(DeviceIndex i) const override { pretend::current_device = i; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return new_generator(); }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, 0); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
};

// ----------------------------------------------------------------- what allocates and what views

constexpr c10::DispatchKeySet kCUDA(c10::DispatchKey::CUDA);

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &device_memory, kCUDA, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &device_memory, kCUDA, c10::dtype_or_default(dtype));
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", [](at::Tensor& self, at::Storage source) -> at::Tensor& {
    return at::native::set_(self, std::move(source));
  });
  m.impl("set_.source_Tensor", at::native::set_tensor_);
}

// ------------------------------------------------------------------------------------ for Python

at::Tensor on_host(
    c10::DataPtr data, size_t bytes, caffe2::TypeMeta dtype, at::IntArrayRef sizes,
    at::IntArrayRef strides, int64_t offset) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), nullptr, false);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  out.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return out;
}

// A CPU tensor over the memory of a tensor of the device, which it keeps alive.
at::Tensor host(const at::Tensor& t) {
  auto* kept = new c10::Storage(t.storage());
  auto drop = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::DataPtr data(kept->mutable_data(), kept, drop, Device(DeviceType::CPU));
  auto out = on_host(
      std::move(data), kept->nbytes(), t.dtype(), t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) out.unsafeGetTensorImpl()->_set_conj(true);
  if (t.is_neg()) out.unsafeGetTensorImpl()->_set_neg(true);
  return out;
}

// A CPU tensor over memory at an address, which it does not keep alive.
at::Tensor at_address(
    Address p, size_t bytes, at::ScalarType dtype, std::vector<int64_t> sizes,
    std::vector<int64_t> strides, int64_t offset) {
  c10::DataPtr data(reinterpret_cast<void*>(p), Device(DeviceType::CPU));
  return on_host(
      std::move(data), bytes, c10::scalarTypeToTypeMeta(dtype), sizes, strides, offset);
}

using Found = std::tuple<Address, size_t, int64_t, int64_t, bool>;

std::optional<Found> block_at(Address p) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = around(blocks, p, [](const Block& b) { return b.bytes; });
  if (found == blocks.end()) return std::nullopt;
  const Block& b = found->second;
  return Found(found->first, b.bytes, b.generation, b.stream, b.of_graph);
}

int64_t next(int64_t& counter) {
  std::lock_guard<std::mutex> lock(mutex);
  return counter++;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("host", &host);
  m.def("at_address", &at_address);
  m.def("block_at", &block_at);
  m.def("is_pinned", [](Address p) { return is_pinned(reinterpret_cast<void*>(p)); });
  m.def("tell", &tell);
  m.def("happened", [] {
    std::lock_guard<std::mutex> lock(mutex);
    return std::exchange(happened, {});
  });
  m.def("new_stream", [] { return next(streams); });
  m.def("new_event", [] { return next(events); });
  m.def("current_stream", [] { return current_stream; });
  m.def("set_stream", [](int64_t id) { current_stream = id; });
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int i) { current_device = i; });
  m.def("is_capturing", [] { return capturing.load(); });
  m.def("set_capturing", [](bool on) { capturing = on; });
  m.def("default_generator", &default_generator);
  m.def("memory", [] {
    std::lock_guard<std::mutex> lock(mutex);
    return std::make_tuple(live_bytes, peak_bytes);
  });
  m.def("reset_peak", [] {
    std::lock_guard<std::mutex> lock(mutex);
    peak_bytes = live_bytes;
  });
}

}  // namespace pretend

namespace at {
using CUDAHooks = pretend::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
