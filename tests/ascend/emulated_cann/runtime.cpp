// SPDX-License-Identifier: Apache-2.0
// The runtime over host memory: as many devices as the switch DEVICES says, allocations that are poisoned and known,
// copies that are checked against them. The functions that torch_npu calls in this project's tests; the others are in
// unsupported.c and say so.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "emulated.h"

namespace emulated_cann {
namespace {

constexpr size_t kDeviceBytes = size_t{64} << 30;
constexpr int kNoDevice = -1;

bool device_is_set = false;
int current_device = 0;
int context = 0;

int num_devices() {
  const std::string count = setting("DEVICES");
  return count.empty() ? 1 : std::stoi(count);
}

class Memory {
 public:
  void* allocate(size_t bytes) {
    // As on the device, and so that vector loads of CPU kernels stay inside.
    constexpr size_t kAlignment = 512;
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* begin = std::aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
    if (begin == nullptr) return nullptr;
    std::memset(begin, kPoison, rounded);
    const std::lock_guard lock(mutex_);
    allocations_[static_cast<char*>(begin)] = {bytes, device_is_set ? current_device : kNoDevice};
    used_ += bytes;
    return begin;
  }

  bool release(void* begin) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = allocations_.find(static_cast<char*>(begin));
      if (found == allocations_.end()) return false;
      used_ -= found->second.bytes;
      allocations_.erase(found);
    }
    std::free(begin);
    return true;
  }

  // The device of the allocation that the bytes lie in, if they do.
  std::optional<int> device_of(const void* begin, size_t bytes) {
    const auto* first = static_cast<const char*>(begin);
    const std::lock_guard lock(mutex_);
    auto after = allocations_.upper_bound(const_cast<char*>(first));
    if (after == allocations_.begin()) return std::nullopt;
    const auto& [address, allocation] = *--after;
    if (first + bytes > address + allocation.bytes) return std::nullopt;
    return allocation.device;
  }

  bool holds(const void* begin, size_t bytes) { return device_of(begin, bytes).has_value(); }

  size_t used() {
    const std::lock_guard lock(mutex_);
    return used_;
  }

 private:
  struct Allocation {
    size_t bytes;
    int device;
  };

  std::mutex mutex_;
  std::map<char*, Allocation> allocations_;
  size_t used_ = 0;
};

Memory& device_memory() {
  static auto* const memory = new Memory;
  return *memory;
}

Memory& host_memory() {
  static auto* const memory = new Memory;
  return *memory;
}

int allocate(Memory& memory, const char* where, void** begin, size_t bytes) {
  *begin = memory.allocate(bytes);
  if (*begin == nullptr) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "no memory for " + std::to_string(bytes) + " B");
  record("{\"kind\": \"alloc\", \"where\": \"" + std::string(where) + "\", \"bytes\": " + std::to_string(bytes) + "}");
  return ACL_SUCCESS;
}

int release(Memory& memory, const char* call, void* begin) {
  if (begin == nullptr || memory.release(begin)) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_PARAM_INVALID, std::string(call) + ": expected an address that was allocated, got another");
}

const char* direction_of(bool to_device, bool from_device) {
  if (to_device) return from_device ? "D2D" : "H2D";
  return from_device ? "D2H" : "H2H";
}

const char* direction_of(aclrtMemcpyKind kind) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST:
      return "H2H";
    case ACL_MEMCPY_HOST_TO_DEVICE:
      return "H2D";
    case ACL_MEMCPY_DEVICE_TO_HOST:
      return "D2H";
    case ACL_MEMCPY_DEVICE_TO_DEVICE:
      return "D2D";
    default:
      return nullptr;  // by the addresses
  }
}

int copy(const char* call, void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind, bool is_async) {
  const auto refuse = [&](const std::string& what) { return fail(ACL_ERROR_RT_PARAM_INVALID, call + (": " + what)); };
  if (bytes > room) {
    return refuse("expected room for " + std::to_string(bytes) + " B, got " + std::to_string(room));
  }
  const char* direction = direction_of(device_memory().holds(to, bytes), device_memory().holds(from, bytes));
  const char* stated = direction_of(kind);
  if (stated != nullptr && std::strcmp(stated, direction) != 0) {
    return refuse("asked for a copy " + std::string(stated) + " of " + std::to_string(bytes) +
                  " B, but by the allocations it is " + direction);
  }
  if ((direction[0] == 'H' && device_memory().holds(from, 1)) ||
      (direction[2] == 'H' && device_memory().holds(to, 1))) {
    return refuse("the copy of " + std::to_string(bytes) + " B leaves its device allocation");
  }
  std::memmove(to, from, bytes);
  record("{\"kind\": \"copy\", \"direction\": \"" + std::string(direction) + "\", \"bytes\": " + std::to_string(bytes) +
         ", \"async\": " + (is_async ? "true" : "false") + "}");
  return ACL_SUCCESS;
}

int fill(const char* call, void* begin, size_t room, int32_t value, size_t bytes) {
  if (bytes > room || !device_memory().holds(begin, bytes)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, call + (": expected " + std::to_string(bytes) + " B of one allocation"));
  }
  std::memset(begin, value, bytes);
  record("{\"kind\": \"fill\", \"bytes\": " + std::to_string(bytes) + "}");
  return ACL_SUCCESS;
}

std::mutex options_mutex;
std::map<int, int64_t> system_options;

}  // namespace

bool on_device(const void* begin, size_t bytes) {
  return device_memory().holds(begin, bytes);
}

std::optional<int> device_of(const void* begin, size_t bytes) {
  return device_memory().device_of(begin, bytes);
}

}  // namespace emulated_cann

using namespace emulated_cann;

extern "C" {

int emulated_cann_unsupported(const char* name) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, std::string(name) + " is not emulated");
}

aclError aclInit(const char*) {
  return ACL_SUCCESS;
}
aclError aclFinalize() {
  return ACL_SUCCESS;
}

// The device. Before it is set there is no context, and torch_npu relies on being told so.

aclError aclrtGetDevice(int32_t* device) {
  *device = current_device;
  return device_is_set ? ACL_SUCCESS : ACL_ERROR_RT_CONTEXT_NULL;
}
aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= num_devices()) {
    return fail(ACL_ERROR_RT_INVALID_DEVICEID,
                "expected a device below " + std::to_string(num_devices()) + ", got " + std::to_string(device));
  }
  device_is_set = true;
  current_device = device;
  return ACL_SUCCESS;
}
aclError aclrtResetDevice(int32_t) {
  device_is_set = false;
  return ACL_SUCCESS;
}
aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = static_cast<uint32_t>(num_devices());
  return ACL_SUCCESS;
}
const char* aclrtGetSocName() {
  static const std::string name = setting("SOC").empty() ? "Ascend910B2" : setting("SOC");
  return name.c_str();
}
aclError aclrtGetCurrentContext(aclrtContext* current) {
  *current = &context;
  return device_is_set ? ACL_SUCCESS : ACL_ERROR_RT_CONTEXT_NULL;
}
aclError aclrtSetCurrentContext(aclrtContext) {
  return ACL_SUCCESS;
}
aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 0;
  return ACL_SUCCESS;
}

// Options: remembered, because torch_npu reads back what it has set.

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  const std::lock_guard lock(options_mutex);
  system_options[option] = value;
  return ACL_SUCCESS;
}
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  const std::lock_guard lock(options_mutex);
  *value = system_options[option];
  return ACL_SUCCESS;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  return aclrtSetSysParamOpt(option, value);
}
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) {
  return ACL_SUCCESS;
}
aclError aclrtSetOpExecuteTimeOut(uint32_t) {
  return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t) {
  return ACL_SUCCESS;
}
aclError aclSetCompileopt(aclCompileOpt, const char*) {
  return ACL_SUCCESS;
}

// Memory.

aclError aclrtMalloc(void** begin, size_t bytes, aclrtMemMallocPolicy) {
  return allocate(device_memory(), "device", begin, bytes);
}
aclError aclrtMallocAlign32(void** begin, size_t bytes, aclrtMemMallocPolicy) {
  return allocate(device_memory(), "device", begin, bytes);
}
// Without its cache torch_npu synchronises the device before each free. That belongs to the free, and not to the code
// under test, which on a device runs with the cache.
aclError aclrtFree(void* begin) {
  replace_last(sync_line("device"), "{\"kind\": \"free\"}");
  return release(device_memory(), "aclrtFree", begin);
}
aclError aclrtMallocHost(void** begin, size_t bytes) {
  return allocate(host_memory(), "host", begin, bytes);
}
aclError aclrtMallocHostWithCfg(void** begin, uint64_t bytes, aclrtMallocConfig*) {
  return allocate(host_memory(), "host", begin, bytes);
}
aclError aclrtFreeHost(void* begin) {
  return release(host_memory(), "aclrtFreeHost", begin);
}
aclError aclrtPointerGetAttributes(const void* begin, aclrtPtrAttributes* attributes) {
  *attributes = {};
  attributes->location.type = on_device(begin, 1)             ? ACL_MEM_LOCATION_TYPE_DEVICE
                              : host_memory().holds(begin, 1) ? ACL_MEM_LOCATION_TYPE_HOST
                                                              : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return ACL_SUCCESS;
}
aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  *total = kDeviceBytes;
  *free = kDeviceBytes - device_memory().used();
  return ACL_SUCCESS;
}
aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  return copy("aclrtMemcpy", to, room, from, bytes, kind, false);
}
aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  await_stream(stream);
  return copy("aclrtMemcpyAsync", to, room, from, bytes, kind, true);
}
aclError aclrtMemset(void* begin, size_t room, int32_t value, size_t bytes) {
  return fill("aclrtMemset", begin, room, value, bytes);
}
aclError aclrtMemsetAsync(void* begin, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  await_stream(stream);
  return fill("aclrtMemsetAsync", begin, room, value, bytes);
}
}
