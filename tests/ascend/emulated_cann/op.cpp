// SPDX-License-Identifier: Apache-2.0
// The objects of the aclnn interface, and the launch that all ops share.
#include "op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>

#include <chrono>
#include <fstream>
#include <sstream>
#include <thread>

namespace emulated_cann {
namespace {

template <typename Items, typename Show>
std::string list(const Items& items, Show show_one) {
  std::string out = "[";
  for (size_t i = 0; i < items.size(); ++i) out += (i == 0 ? "" : ", ") + show_one(items[i]);
  return out + "]";
}

// Bytes from a tensor's first element to the end of its furthest one.
int64_t span_bytes(at::IntArrayRef sizes, at::IntArrayRef strides, size_t element_size) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return (last + 1) * static_cast<int64_t>(element_size);
}

bool is_asleep(pid_t thread) {
  std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/stat");
  std::string stat;
  if (!std::getline(file, stat)) return true;  // it has ended
  return stat[stat.rfind(')') + 2] == 'S';     // "17 (python) S 1 ..."
}

// Until the thread waits, and not only for a moment. torch_npu's task queue ends with the first error; a task that it
// is given in that very moment stays in it, and whoever then waits for the queue to be empty waits for ever.
void await_asleep(pid_t thread) {
  constexpr int kLooks = 20;
  for (int in_a_row = 0; in_a_row < kLooks; in_a_row = is_asleep(thread) ? in_a_row + 1 : 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace

ScalarType scalar_type(int acl_data_type) {
  switch (acl_data_type) {
    case 0:
      return at::kFloat;
    case 1:
      return at::kHalf;
    case 2:
      return at::kChar;
    case 3:
      return at::kInt;
    case 4:
      return at::kByte;
    case 6:
      return at::kShort;
    case 9:
      return at::kLong;
    case 11:
      return at::kDouble;
    case 12:
      return at::kBool;
    case 27:
      return at::kBFloat16;
    default:
      throw Refusal{kInvalidParameter, "aclDataType " + std::to_string(acl_data_type) + " is not emulated"};
  }
}

std::string show(const Tensor& t) {
  if (!t.defined()) return "null";
  return "{\"shape\": " + show(t.sizes().vec()) + ", \"strides\": " + show(t.strides().vec()) +
         ", \"dtype\": " + quoted(c10::toString(t.scalar_type())) +
         ", \"data\": " + std::to_string(reinterpret_cast<uintptr_t>(t.const_data_ptr())) + "}";
}

std::string show(const Scalar& s) {
  if (s.isIntegral(/*includeBool=*/true)) return std::to_string(s.toLong());
  const double value = s.toDouble();
  if (std::isfinite(value)) {
    std::ostringstream out;
    out << value;
    return out.str();
  }
  return quoted(std::to_string(value));  // JSON has no infinities
}

std::string show(const IntArray& values) {
  return list(values, [](int64_t v) { return std::to_string(v); });
}

std::string show(const TensorList& tensors) {
  return list(tensors, [](const Tensor& t) { return show(t); });
}

void write(const Tensor& out, const Tensor& result) {
  TORCH_CHECK(out.sizes() == result.sizes(), "the caller's output is ", out.sizes(), ", the result ", result.sizes());
  out.copy_(result);
}

bool switch_names(const char* name, const std::string& op) {
  return lists(name, op.substr(std::string("aclnn").size()));
}

int guarded(const std::string& name, const std::function<void()>& work) {
  try {
    work();
    return kOk;
  } catch (const Refusal& refusal) {
    return fail(refusal.status, name + ": " + refusal.sentence);
  } catch (const c10::Error& error) {
    return fail(kInnerError, name + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(kInnerError, name + ": " + error.what());
  }
}

int launch(void* workspace, uint64_t workspace_size, aclOpExecutor* executor, void* stream) {
  const std::unique_ptr<aclOpExecutor> owned(executor);
  await_stream(stream);
  return guarded(owned->name, [&] {
    record(owned->ledger_line);
    if (workspace_size != kWorkspaceBytes || !on_device(workspace, workspace_size)) {
      throw Refusal{kInvalidParameter, "the workspace is not what phase one asked for"};
    }
    if (switch_names("FAIL", owned->name)) {
      if (owned->asked_by != gettid()) await_asleep(owned->asked_by);
      throw Refusal{kKernelException, "the kernel fails, as the switch FAIL asks"};
    }
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    owned->run();
  });
}

}  // namespace emulated_cann

using namespace emulated_cann;

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t rank, int type, const int64_t* strides, int64_t offset, int,
                           const int64_t*, uint64_t, void* storage) {
  auto tensor = std::make_unique<aclTensor>();
  const int status = guarded("aclCreateTensor", [&] {
    const ScalarType dtype = scalar_type(type);
    const at::IntArrayRef shape(sizes, rank);
    const at::IntArrayRef step(strides, rank);
    char* first = static_cast<char*>(storage) + offset * static_cast<int64_t>(c10::elementSize(dtype));
    const int64_t bytes = span_bytes(shape, step, c10::elementSize(dtype));
    if (bytes > 0 && !on_device(first, static_cast<size_t>(bytes))) {
      throw Refusal{kInvalidParameter, "a view of " + std::to_string(bytes) + " B leaves its device allocation"};
    }
    tensor->view = at::from_blob(first, shape, step, at::TensorOptions().dtype(dtype).device(at::kCPU));
  });
  return status == kOk ? tensor.release() : nullptr;
}

aclScalar* aclCreateScalar(void* value, int type) {
  auto scalar = std::make_unique<aclScalar>();
  const int status = guarded("aclCreateScalar", [&] {
    scalar->value = at::from_blob(value, {}, at::TensorOptions().dtype(scalar_type(type))).item();
  });
  return status == kOk ? scalar.release() : nullptr;
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new aclIntArray{{values, values + count}};
}
aclTensorList* aclCreateTensorList(const aclTensor* const* items, uint64_t count) {
  return new aclTensorList{{items, items + count}};
}

int aclDestroyTensor(const aclTensor* tensor) {
  delete tensor;
  return kOk;
}
int aclDestroyScalar(const aclScalar* scalar) {
  delete scalar;
  return kOk;
}
int aclDestroyIntArray(const aclIntArray* array) {
  delete array;
  return kOk;
}
// A list owns its tensors.
int aclDestroyTensorList(const aclTensorList* list) {
  if (list == nullptr) return kOk;
  for (const aclTensor* item : list->items) delete item;
  delete list;
  return kOk;
}

int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* rank) {
  if (tensor == nullptr) return fail(kNullPointer, "aclGetViewShape: the tensor is nullptr");
  const at::IntArrayRef shape = tensor->view.sizes();
  *sizes = new int64_t[shape.size()];  // the caller's, who deletes it
  std::copy(shape.begin(), shape.end(), *sizes);
  *rank = shape.size();
  return kOk;
}
}
