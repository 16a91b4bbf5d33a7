// SPDX-License-Identifier: Apache-2.0
#include "standin_device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <torch/types.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace xattn::test {
namespace {

using at::Tensor;

const c10::Device kDevice(c10::kPrivateUse1, 0);

std::atomic<int> no_waiting = 0;

void check_waiting(const std::string& what) {
  TORCH_CHECK(no_waiting == 0, what, " would wait for the device");
}

// ---- Memory -----------------------------------------------------------------------------------------------------------------

// Blocks of whole pages. Several operators may have one open, since backward runs on threads of its own.
class Memory : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), size = (bytes / page + 1) * page;
    void* block = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(block != MAP_FAILED, "no memory for a block of ", size, " bytes");
    const std::lock_guard lock(mutex_);
    blocks_[block] = {size, 0};
    return {block, block, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  void open(void* block) { change(block, 1); }
  void close(void* block) { change(block, -1); }

  static Memory& get() {
    static auto* memory = new Memory;  // outlives every tensor
    return *memory;
  }

 private:
  struct Block {
    size_t size;
    int users;
  };

  static void release(void* block) {
    auto& memory = get();
    const std::lock_guard lock(memory.mutex_);
    munmap(block, memory.blocks_.at(block).size);
    memory.blocks_.erase(block);
  }

  void change(void* block, int users) {
    if (!block) return;
    const std::lock_guard lock(mutex_);
    auto& found = blocks_.at(block);
    found.users += users;
    mprotect(block, found.size, found.users > 0 ? PROT_READ | PROT_WRITE : PROT_NONE);
  }

  std::mutex mutex_;
  std::map<void*, Block> blocks_;
};

// ---- Operators --------------------------------------------------------------------------------------------------------------

Tensor tensor_over(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.dim() == 0) impl->set_wrapped_number(like.unsafeGetTensorImpl()->is_wrapped_number());
  return tensor;
}

// The arguments of one operator as tensors on the CPU over the same memory, which is open as long as it lives.
class Opened {
 public:
  Opened() = default;
  ~Opened() {
    for (const auto& [impl, pair] : storages_) Memory::get().close(pair.memory);
  }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

  Tensor on_cpu(const Tensor& x) {
    if (!x.defined() || !x.is_privateuseone()) {
      has_values_on_cpu_ |= x.defined() && x.dim() > 0;
      return x;
    }
    const auto found = std::ranges::find_if(tensors_, [&x](const auto& pair) { return pair.first.is_same(x); });
    if (found != tensors_.end()) return found->second;
    const auto& storage = x.storage();
    auto [place, is_new] = storages_.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new) {
      auto* memory = storage.mutable_data();
      Memory::get().open(memory);
      place->second = {memory, storage,
                       c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                                    c10::DataPtr(memory, c10::Device(c10::kCPU)), c10::GetAllocator(c10::kCPU), true)};
    }
    return tensors_.emplace_back(x, tensor_over(place->second.cpu, x, c10::DispatchKey::CPU)).second;
  }

  // A result as a tensor on the device: an argument itself, a view of one, or a new one with a copy of the values.
  Tensor on_device(const Tensor& y) {
    if (!y.defined()) return y;
    for (const auto& [device, cpu] : tensors_) {
      if (!cpu.is_same(y)) continue;
      if (y.storage().data() != device.storage().data()) {  // resized
        released_.push_back(device.storage().set_data_ptr(copied(y.storage())));
        device.storage().set_nbytes(y.storage().nbytes());
      }
      device.unsafeGetTensorImpl()->set_sizes_and_strides(y.sizes(), y.strides(), y.storage_offset());
      return device;
    }
    for (const auto& [impl, pair] : storages_) {
      if (y.storage().is_alias_of(pair.cpu)) return tensor_over(pair.device, y, c10::DispatchKey::PrivateUse1);
    }
    c10::Storage storage(c10::Storage::use_byte_size_t(), y.storage().nbytes(), copied(y.storage()), &Memory::get(), true);
    return tensor_over(std::move(storage), y, c10::DispatchKey::PrivateUse1);
  }

  bool mixes_devices() const { return has_values_on_cpu_ && !tensors_.empty(); }

 private:
  struct Pair {
    void* memory = nullptr;
    c10::Storage device, cpu;
  };

  static c10::DataPtr copied(const c10::Storage& cpu) {
    auto memory = Memory::get().allocate(cpu.nbytes());
    Memory::get().open(memory.get());
    std::memcpy(memory.get(), cpu.data(), cpu.nbytes());
    Memory::get().close(memory.get());
    return memory;
  }

  std::map<c10::StorageImpl*, Pair> storages_;
  std::vector<std::pair<Tensor, Tensor>> tensors_;  // on the device, on the CPU
  std::vector<c10::DataPtr> released_;              // when all is closed
  bool has_values_on_cpu_ = false;
};

template <class F>
void change_tensors(c10::IValue& value, const F& change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorList().copy();
    for (size_t i = 0; i < list.size(); ++i) list.set(i, change(list.get(i)));
    value = list;
  } else if (value.isOptionalTensorList()) {
    auto list = value.toOptionalTensorList().copy();
    for (size_t i = 0; i < list.size(); ++i) {
      if (const std::optional<Tensor> tensor = list.get(i)) list.set(i, change(*tensor));
    }
    value = list;
  }
}

bool depends_on_values(std::string_view name, const c10::ArrayRef<c10::IValue>& arguments) {
  constexpr std::array kNames = {
      "aten::_local_scalar_dense", "aten::equal",    "aten::nonzero",  "aten::masked_select", "aten::_unique2",
      "aten::unique_dim",          "aten::bincount", "aten::is_set_to"};
  if (std::ranges::find(kNames, name) != kNames.end()) return true;
  bool by_mask = false;
  for (auto value : arguments) {
    if (!value.isOptionalTensorList()) continue;
    change_tensors(value, [&by_mask](const Tensor& index) {
      by_mask |= index.defined() && (index.scalar_type() == at::kBool || index.scalar_type() == at::kByte);
      return index;
    });
  }
  return by_mask;
}

// Runs any operator by its kernel for the CPU.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const auto count = op.schema().arguments().size();
  if (depends_on_values(name, torch::jit::last(*stack, count))) check_waiting(name);
  Opened opened;
  for (auto i = stack->size() - count; i < stack->size(); ++i) {
    auto& argument = (*stack)[i];
    if (argument.isDevice()) argument = c10::Device(c10::kCPU);
    change_tensors(argument, [&opened](const Tensor& x) { return opened.on_cpu(x); });
  }
  TORCH_CHECK(!opened.mixes_devices(), name, " has tensors on the device and on the CPU");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    change_tensors((*stack)[i], [&opened](const Tensor& y) { return opened.on_device(y); });
  }
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.is_cpu() != to.is_cpu() && from.numel() > 0) check_waiting("a copy between the device and the CPU");
  Opened opened;
  auto destination = opened.on_cpu(to);
  destination.copy_(opened.on_cpu(from));
  return to;
}

using Type = std::optional<at::ScalarType>;
using Place = std::optional<c10::Device>;

Tensor empty(at::IntArrayRef sizes,
             Type type,
             std::optional<at::Layout>,
             Place,
             std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &Memory::get(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(type), format);
}

Tensor empty_strided(
    at::IntArrayRef sizes, at::IntArrayRef strides, Type type, std::optional<at::Layout>, Place, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &Memory::get(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(type));
}

// scaled_dot_product_attention: by plain operators.
int64_t choose_plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

// ---- The device -------------------------------------------------------------------------------------------------------------

struct Guard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kPrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

struct Hooks : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

}  // namespace

c10::Device standin() {
  static const bool is_registered = [] {
    c10::register_privateuse1_backend("standin");
    c10::SetAllocator(c10::kPrivateUse1, &Memory::get());
    static Guard guard;
    static const c10::impl::DeviceGuardImplRegistrar registrar(c10::kPrivateUse1, &guard);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    static auto any = torch::Library(torch::Library::IMPL, "_", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
    any.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
    static auto aten = torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
    aten.impl("empty.memory_format", &empty);
    aten.impl("empty_strided", &empty_strided);
    aten.impl("_copy_from", &copy_from);
    aten.impl("_fused_sdp_choice", &choose_plain_attention);
    return true;
  }();
  (void)is_registered;
  return kDevice;
}

void move_to_standin(torch::nn::Module& module) {
  auto all = module.parameters();
  for (const auto& buffer : module.buffers()) all.push_back(buffer);
  for (const auto& tensor : all) {
    const auto moved = tensor.detach().contiguous().to(standin());
    auto* impl = tensor.unsafeGetTensorImpl();
    impl->_change_backend_component_keys(standin());
    impl->set_storage_keep_dtype(moved.storage());
  }
}

NoWaiting::NoWaiting() {
  ++no_waiting;
}

NoWaiting::~NoWaiting() {
  --no_waiting;
}

}  // namespace xattn::test
