// SPDX-License-Identifier: Apache-2.0
// How a C++ function becomes a pair of aclnn entry points.
//
//   ACLNN(Muls, [](Tensor self, Scalar other, Tensor out) { write(out, self * other); })
//
// exports aclnnMulsGetWorkspaceSize(self, other, out, &workspace_size, &executor), which checks the arguments, and
// aclnnMuls(workspace, workspace_size, executor, stream), which writes the ledger's line and runs the function. Tensors
// are views of the emulated device's memory with the strides that torch_npu delivered; a view that leaves its
// allocation is refused. The switch ABSENT hides ops from dlsym, as a CANN without them; FAIL makes their kernels fail:
// as on a device, after the thread that asked for them has gone on and waits.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "emulated.h"

struct aclTensor {
  at::Tensor view;  // undefined for a tensor of a list that is absent
};
struct aclScalar {
  at::Scalar value;
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclTensorList {
  std::vector<const aclTensor*> items;
};
struct aclOpExecutor {
  std::string name;
  std::string ledger_line;
  std::function<void()> run;
  pid_t asked_by = gettid();  // torch_npu's task queue launches in a thread of its own
};

namespace emulated_cann {

using at::Scalar;
using at::ScalarType;
using at::Tensor;
using IntArray = std::vector<int64_t>;
using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

inline constexpr uint64_t kWorkspaceBytes = 4096;

// A refusal with an aclnn status of its own.
struct Refusal {
  int status;
  std::string sentence;
};

ScalarType scalar_type(int acl_data_type);

// As JSON.
std::string show(const Tensor& t);
std::string show(const Scalar& s);
std::string show(const IntArray& values);
std::string show(const TensorList& tensors);

// out <- result, converted to out's type; the shapes must agree.
void write(const Tensor& out, const Tensor& result);

// An argument as it comes through the C interface, and as the op wants it.
template <typename T>
struct Argument {  // int64_t, int8_t, bool, float, double
  using C = T;
  static T take(C c) { return c; }
  static std::string json(const T& value) { return std::to_string(value); }
};

template <>
struct Argument<const char*> {
  using C = const char*;
  static const char* take(C c) { return c; }
  static std::string json(const char* text) { return quoted(text == nullptr ? "" : text); }
};

// A text that the vendor's page calls reserved, which torch_npu may leave uninitialised: never read.
struct Reserved {};

template <>
struct Argument<Reserved> {
  using C = const char*;
  static Reserved take(C) { return {}; }
  static std::string json(Reserved) { return "null"; }
};

template <>
struct Argument<ScalarType> {
  using C = int;
  static ScalarType take(C c) { return scalar_type(c); }
  static std::string json(ScalarType type) { return quoted(c10::toString(type)); }
};

template <typename T, typename Object>
struct ObjectArgument {
  using C = const Object*;
  static std::string json(const T& value) { return show(value); }

 protected:
  static const Object& held(C c) {
    if (c == nullptr) throw Refusal{kNullPointer, "a required argument is nullptr"};
    return *c;
  }
};

template <>
struct Argument<Tensor> : ObjectArgument<Tensor, aclTensor> {
  static Tensor take(C c) { return held(c).view; }
};

template <>
struct Argument<Scalar> : ObjectArgument<Scalar, aclScalar> {
  static Scalar take(C c) { return held(c).value; }
};

template <>
struct Argument<IntArray> : ObjectArgument<IntArray, aclIntArray> {
  static IntArray take(C c) { return held(c).values; }
};

template <>
struct Argument<TensorList> : ObjectArgument<TensorList, aclTensorList> {
  static TensorList take(C c) {
    TensorList tensors;
    for (const aclTensor* item : held(c).items) tensors.push_back(item == nullptr ? Tensor() : item->view);
    return tensors;
  }
};

template <typename T>
struct Argument<std::optional<T>> {
  using C = typename Argument<T>::C;
  static std::optional<T> take(C c) { return c == nullptr ? std::nullopt : std::optional(Argument<T>::take(c)); }
  static std::string json(const std::optional<T>& value) { return value ? Argument<T>::json(*value) : "null"; }
};

int launch(void* workspace, uint64_t workspace_size, aclOpExecutor* executor, void* stream);

// Runs what may throw; turns what was thrown into a status and a sentence.
int guarded(const std::string& name, const std::function<void()>& work);

// Whether the switch, a list of ops without their prefix, names this one.
bool switch_names(const char* name, const std::string& op);

template <typename Op, typename Run = decltype(Op::kRun)>
struct Prepare;

template <typename Op, typename... Args>
struct Prepare<Op, void (*const)(Args...)> {
  static int call(typename Argument<Args>::C... c, uint64_t* workspace_size, aclOpExecutor** executor) {
    return guarded(Op::kName, [&] { prepare(workspace_size, executor, Argument<Args>::take(c)...); });
  }

 private:
  static void prepare(uint64_t* workspace_size, aclOpExecutor** executor, Args... args) {
    if constexpr (requires { Op::kCheck; }) Op::kCheck(args...);
    std::string line = "{\"kind\": \"op\", \"name\": \"" + std::string(Op::kName) + "\", \"args\": [";
    std::string comma;
    ((line += std::exchange(comma, ", ") + Argument<Args>::json(args)), ...);
    *workspace_size = kWorkspaceBytes;
    *executor = new aclOpExecutor{Op::kName, line + "]}", [args...] { Op::kRun(args...); }};
  }
};

using AnyFunction = void (*)();

template <typename Op>
AnyFunction phase_one() {
  return switch_names("ABSENT", Op::kName) ? nullptr : reinterpret_cast<AnyFunction>(&Prepare<Op>::call);
}

template <typename Op>
AnyFunction phase_two() {
  return switch_names("ABSENT", Op::kName) ? nullptr : reinterpret_cast<AnyFunction>(&launch);
}

}  // namespace emulated_cann

// The C signature follows from the function's parameters, which only a template can express, and a template has no C
// name: so the names are indirect functions, resolved by dlsym.
#define EMULATED_CANN_EXPORT(name)                                                           \
  extern "C" {                                                                               \
  [[gnu::visibility("hidden")]] emulated_cann::AnyFunction emulated_cann_first_##name() {    \
    return emulated_cann::phase_one<emulated_cann::ops::name>();                             \
  }                                                                                          \
  [[gnu::visibility("hidden")]] emulated_cann::AnyFunction emulated_cann_second_##name() {   \
    return emulated_cann::phase_two<emulated_cann::ops::name>();                             \
  }                                                                                          \
  void aclnn##name##GetWorkspaceSize() __attribute__((ifunc("emulated_cann_first_" #name))); \
  void aclnn##name() __attribute__((ifunc("emulated_cann_second_" #name)));                  \
  }

#define ACLNN(name, ...)                                \
  namespace emulated_cann::ops {                        \
  struct name {                                         \
    static constexpr const char* kName = "aclnn" #name; \
    static constexpr auto kRun = +__VA_ARGS__;          \
  };                                                    \
  }                                                     \
  EMULATED_CANN_EXPORT(name)

// With a check of the arguments in phase one, which throws a Refusal.
#define ACLNN_CHECKED(name, check, run)                 \
  namespace emulated_cann::ops {                        \
  struct name {                                         \
    static constexpr const char* kName = "aclnn" #name; \
    static constexpr auto kCheck = check;               \
    static constexpr auto kRun = +run;                  \
  };                                                    \
  }                                                     \
  EMULATED_CANN_EXPORT(name)
