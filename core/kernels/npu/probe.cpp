// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/probe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/Logging.h>
#include <c10/util/StringUtil.h>

#include <array>
#include <cmath>
#include <functional>
#include <sstream>

#include "core/kernels/npu/paged_attention.h"
#include "core/kernels/npu/torch_npu_ops.h"

namespace xgdn::kernel::npu {
namespace {

// The process's own, on whose stream its calls run: fills and copies on another would have no order with them.
c10::Device current_device() {
  return c10::impl::VirtualGuardImpl(c10::DeviceType::PrivateUse1).getDevice();
}

at::TensorOptions on_device(at::ScalarType dtype) {
  return at::TensorOptions().dtype(dtype).device(current_device());
}

// What torch_npu and CANN have to say in their error: which call failed, from the first line, behind torch_npu's own
// source position; and why, from the first line with words behind torch_npu's mark of time and process.
std::string useful_lines(const std::string& text) {
  std::istringstream lines(text);
  std::string call, line, why;
  std::getline(lines, call);
  if (const size_t position = call.find("error: call "); position != std::string::npos) call.erase(0, position + 7);
  bool is_behind_the_mark = false;
  while (why.empty() && std::getline(lines, line)) {
    const size_t begin = line.find_first_not_of(" \t");
    if (is_behind_the_mark && begin != std::string::npos && !line.ends_with("Inner Error!")) why = line.substr(begin);
    is_behind_the_mark = is_behind_the_mark || line.starts_with("[ERROR]");
  }
  return why.empty() ? call : c10::str(call, ": ", why);
}

// Runs `trial`; its sentence, or what the error that it threw says.
std::string sentence_of(const std::function<std::string()>& trial) {
  try {
    return trial();
  } catch (const c10::Error& error) {
    return c10::str("it failed: ", useful_lines(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    return c10::str("it failed: ", error.what());
  }
}

bool is_near(const at::Tensor& t, std::initializer_list<int64_t> place, double want) {
  at::Tensor element = t;
  for (int64_t i : place) element = element.select(0, i);
  return std::abs(element.to(at::kDouble).item<double>() - want) < 1e-2;
}

// Two tokens of value 1 with the same key e0 = (1, 0, ..), beta 1, no decay, two slots: [1, 1] reads as two sequences
// of one token (both slots are written), or as one sequence that starts at token 1 (only the second is). In bounds both
// ways.
struct TwoTokens {
  explicit TwoTokens(at::ScalarType state_dtype, int64_t dim = 16)
      : qk(at::zeros({2, 1, dim}, on_device(at::kBFloat16))),
        v(at::ones({2, 1, dim}, on_device(at::kBFloat16))),
        beta(at::ones({2, 1}, on_device(at::kBFloat16))),
        g(at::zeros({2, 1}, on_device(at::kFloat))),
        state(at::zeros({2, 1, dim, dim}, on_device(state_dtype))),
        ones(at::ones({2}, on_device(at::kInt))) {
    qk.select(2, 0).fill_(1.0);
  }
  at::Tensor qk, v, beta, g, state, ones;
};

std::array<bool, 2> written_slots(const char* op, at::ScalarType state_dtype, bool has_start) {
  TwoTokens x(state_dtype);
  const at::Tensor lengths = has_start ? at::ones({3}, on_device(at::kInt)) : x.ones;
  if (has_start) lengths.select(0, 0).fill_(0);
  const at::Tensor slots = at::ones({2}, on_device(at::kInt));
  slots.select(0, 0).fill_(0);
  recurrent(op, {.q = x.qk,
                 .k = x.qk,
                 .v = x.v,
                 .state = x.state,
                 .beta = x.beta,
                 .scale = 1.0,
                 .lengths = lengths,
                 .state_indices = slots,
                 .num_accepted = x.ones,
                 .g = x.g});
  const at::Tensor state = x.state.cpu();
  return {is_near(state, {0, 0, 3, 0}, 1.0), is_near(state, {1, 0, 3, 0}, 1.0)};
}

// Empty when the op works, with its convention in `lengths`.
std::string try_recurrent(const char* op, at::ScalarType state_dtype, Lengths& lengths) {
  const std::string sentence = sentence_of([&]() -> std::string {
    const auto [first, second] = written_slots(op, state_dtype, /*has_start=*/false);
    if (!second) return c10::str(op, " left the states unwritten");
    lengths = first ? Lengths::kPerSequence : Lengths::kWithStart;
    return "";
  });
  if (sentence.empty()) return "";
  // A kernel that reads a start may refuse num_accepted for two sequences where it sees one.
  const std::string with_start = sentence_of([&]() -> std::string {
    const auto [first, second] = written_slots(op, state_dtype, /*has_start=*/true);
    return first && second ? "" : c10::str(op, " left the states unwritten");
  });
  if (with_start.empty()) lengths = Lengths::kWithStart;
  return with_start.empty() ? "" : sentence;
}

// One sequence of two tokens that starts from a state of 0.5 k0: u0 = 1 - 0.5, u1 = 0, final state 1 at column 0.
std::string try_chunk(at::ScalarType state_dtype, int64_t dim) {
  return sentence_of([&]() -> std::string {
    TwoTokens x(state_dtype, dim);
    const at::Tensor initial = at::zeros({1, 1, dim, dim}, on_device(state_dtype));
    initial.select(3, 0).fill_(0.5);
    const auto [o, final_state] = chunk({.q = x.qk,
                                         .k = x.qk,
                                         .v = x.v,
                                         .beta = x.beta,
                                         .initial_state = initial,
                                         .lengths = at::full({1}, 2, on_device(at::kInt)),
                                         .scale = 1.0,
                                         .g = x.g});
    const bool is_right = is_near(o.cpu(), {1, 0, 3}, 1.0) && is_near(final_state.cpu(), {0, 0, 3, 0}, 1.0) &&
                          is_near(final_state.cpu(), {0, 0, 3, 1}, 0.0) && is_near(initial.cpu(), {0, 0, 3, 0}, 0.5);
    return is_right ? "" : c10::str(kChunkOp, " returned other numbers than the rule gives");
  });
}

// Two sequences that see one and two rows of their contexts. All weights are equal, so each token reads the mean.
std::string try_attention() {
  return sentence_of([&]() -> std::string {
    const at::Tensor q = at::zeros({3, 2, 16}, on_device(at::kBFloat16));
    const at::Tensor k = at::zeros({4, 1, 16}, on_device(at::kBFloat16));
    const at::Tensor v = at::zeros({4, 1, 16}, on_device(at::kBFloat16));
    for (int64_t row = 0; row < 4; ++row) v.select(0, row).fill_(static_cast<double>(row));
    // Rows 0 and 1 are the first sequence's, which ends with one token: it sees both. Rows 2 and 3 are the second's.
    const at::Tensor out = attention({.q = q,
                                      .k = k,
                                      .v = v,
                                      .mask = causal_mask(current_device()),
                                      .token_ends = {1, 3},
                                      .context_ends = {2, 4}})
                               .cpu();
    const bool is_right = is_near(out, {0, 1, 5}, 0.5) && is_near(out, {1, 1, 5}, 2.0) && is_near(out, {2, 1, 5}, 2.5);
    return is_right ? "" : c10::str(kAttentionOp, " returned other numbers than attention gives");
  });
}

// Token 0 visits experts 1 and 0, token 1 visits 0 and 1, with weights 1 and 0.5. Expert e gives 2 e + 2 times
// silu(x) x, and the tokens differ, so that a place or a weight of another visit shows.
std::string try_experts() {
  return sentence_of([&]() -> std::string {
    constexpr int64_t kDim = 16;
    const at::Tensor x = at::ones({2, kDim}, on_device(at::kBFloat16));
    x.select(0, 0).fill_(0.5);
    const at::Tensor chosen = at::eye(2, at::kInt).to(current_device());
    const at::Tensor weights = at::ones({2, 2}, on_device(at::kBFloat16));
    weights.select(1, 1).fill_(0.5);
    const at::Tensor eye = at::eye(kDim, at::kBFloat16);
    const at::Tensor gate_up = at::stack({at::cat({eye, eye}), at::cat({eye, eye})}).to(current_device());
    const at::Tensor down = at::stack({eye * 2.0, eye * 4.0}).to(current_device());
    const Routed routed = route(x, chosen, 2);
    const at::Tensor between = swiglu(grouped_matmul(routed.rows, gate_up.transpose(1, 2), routed.counts));
    const at::Tensor rows = grouped_matmul(between, down.transpose(1, 2), routed.counts);
    const at::Tensor out = finalize_routing(rows, weights, routed.places).cpu();
    const auto expert = [](double value) { return value * value / (1.0 + std::exp(-value)); };
    const bool is_right = is_near(out, {0, 3}, 5.0 * expert(0.5)) && is_near(out, {1, 3}, 4.0 * expert(1.0));
    return is_right ? "" : "the routing ops returned other numbers than the mixture gives";
  });
}

// What is known of ops that xgdn recognises and does not call.
std::string look_alikes() {
  std::string found;
  if (is_registered(kVllmAscend310Op)) {
    found += c10::str("; found ", kVllmAscend310Op, ", which takes fp16 states and is not routed");
  }
  if (is_registered(kSglangOp)) {
    found += c10::str("; found ", kSglangOp, ", which takes packed inputs with beta logits and is not routed");
  }
  return found;
}

Capabilities probe() {
  Capabilities c;
  const std::string no_device = sentence_of([] {
    at::zeros({1}, on_device(at::kFloat));
    return "";
  });
  if (!no_device.empty()) {
    c.why_not_recurrent = c.why_not_chunk = c.why_not_attention = c.why_not_experts =
        c10::str("torch_npu has no device: ", no_device);
    return c;
  }
  c.why_not_recurrent = c10::str("torch_npu has no op ", kRecurrentOp);
  for (const char* op : {kRecurrentOp, kVllmAscendOp}) {
    if (!is_registered(op)) continue;
    c.why_not_recurrent = try_recurrent(op, at::kBFloat16, c.lengths);
    if (!c.why_not_recurrent.empty()) continue;
    c.recurrent_op = op;
    Lengths lengths = c.lengths;
    c.why_not_f32_state = try_recurrent(op, at::kFloat, lengths);
    break;
  }
  if (c.recurrent_op == nullptr) c.why_not_recurrent += look_alikes();
  if (!is_registered(kChunkOp)) {
    c.why_not_chunk = c10::str("torch_npu has no op ", kChunkOp);
  } else {
    c.why_not_chunk = try_chunk(at::kBFloat16, 128);
    if (c.why_not_chunk.empty()) {
      c.why_not_chunk_f32_state = try_chunk(at::kFloat, 128);
      c.why_not_chunk_head_dims = try_chunk(at::kBFloat16, 64);
    }
  }
  c.why_not_attention = try_attention();
  c.why_not_experts = try_experts();
  LOG(INFO) << "[xgdn] npu: " << c.describe();
  return c;
}

}  // namespace

std::string Capabilities::describe() const {
  const auto works = [](const std::string& why_not) {
    return why_not.empty() ? std::string("yes") : "no (" + why_not + ")";
  };
  const char* convention = lengths == Lengths::kPerSequence ? "L1..LB" : "start, L1..LB";
  return c10::str(
      "recurrent: ", recurrent_op != nullptr ? c10::str(recurrent_op, ", lengths ", convention) : why_not_recurrent,
      "; f32 state: ", recurrent_op != nullptr ? works(why_not_f32_state) : "no", "; chunk: ", works(why_not_chunk),
      why_not_chunk.empty() ? c10::str(", f32 state: ", works(why_not_chunk_f32_state),
                                       ", head dims below 128: ", works(why_not_chunk_head_dims))
                            : "",
      "; attention: ", works(why_not_attention), "; experts: ", works(why_not_experts));
}

std::optional<std::string> why_no_device() {
  if (!c10::is_privateuse1_backend_registered()) return "no PrivateUse1 backend is loaded (import torch_npu)";
  const std::string name = c10::get_privateuse1_backend();
  if (name != "npu") return c10::str("the PrivateUse1 backend of this process is '", name, "', expected 'npu'");
  return std::nullopt;
}

const Capabilities& capabilities() {
  static const Capabilities instance = probe();
  return instance;
}

}  // namespace xgdn::kernel::npu
