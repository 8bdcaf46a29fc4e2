// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "ops_api.h"
#include "sequences.h"

namespace xllm::kernel::gdn {
namespace {

namespace ops = ::xgdn::kernel;
using ::xgdn::ShapeError, ::xgdn::UnsupportedError;

constexpr int64_t kPrefill = 0, kUpdate = 1;  // run_mode
constexpr int64_t kSilu = 1;                  // activation_mode

at::Tensor rows_of(const at::Tensor& x) {
  return x.reshape({-1, x.size(-1)});
}

at::Tensor taps_of(const at::Tensor& weight) {
  return weight.t().contiguous();
}

std::optional<at::Tensor> defined(const std::optional<at::Tensor>& t) {
  return t && t->defined() ? t : std::nullopt;
}

// The integers of a call, which xLLM keeps on the host, copied to the device at once.
class HostIntegers {
 public:
  void add(at::IntArrayRef values) {
    begins_.push_back(static_cast<int64_t>(values_.size()));
    for (const int64_t value : values) values_.push_back(static_cast<int32_t>(value));
  }
  void copy_to(at::Device device) {
    begins_.push_back(static_cast<int64_t>(values_.size()));
    copied_ = at::tensor(values_, at::kInt).to(device);
  }
  at::Tensor operator[](size_t i) const { return copied_.slice(0, begins_[i], begins_[i + 1]); }

 private:
  std::vector<int32_t> values_;
  std::vector<int64_t> begins_;
  at::Tensor copied_;
};

}  // namespace

void causal_conv1d_out(const at::Tensor& output, const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& conv_state, const std::optional<at::Tensor>& bias_opt,
                       const at::IntArrayRef query_start_loc_opt, const at::IntArrayRef cache_indices_opt,
                       const at::IntArrayRef initial_state_mode_opt, const at::IntArrayRef num_accepted_tokens_opt,
                       int64_t activation_mode, int64_t pad_slot_id, int64_t run_mode) {
  const char* op = "causal_conv1d";
  const size_t num = cache_indices_opt.size();
  const auto expect_one_each = [&](const char* argument, size_t got) {
    expect<ShapeError>(got == num, op, argument, c10::str(num, " values (one for each of cache_indices)"), got);
  };
  expect<UnsupportedError>(run_mode == kPrefill || run_mode == kUpdate, op, "run_mode", "0 or 1", run_mode);
  expect<UnsupportedError>(activation_mode == 0 || activation_mode == kSilu, op, "activation_mode", "0 or 1",
                           activation_mode);
  expect<ShapeError>(query_start_loc_opt.size() == num + 1, op, "query_start_loc",
                     c10::str(num + 1, " values (one more than cache_indices)"), query_start_loc_opt.size());
  expect<ShapeError>(output.sizes() == x.sizes(), op, "output", x.sizes(), output.sizes());
  std::vector<int64_t> slots(cache_indices_opt.begin(), cache_indices_opt.end());
  std::replace(slots.begin(), slots.end(), pad_slot_id, int64_t{ops::kPadSlot});

  const bool is_verification = run_mode == kUpdate && !num_accepted_tokens_opt.empty();
  const at::IntArrayRef per_sequence = run_mode == kPrefill ? initial_state_mode_opt : num_accepted_tokens_opt;
  if (run_mode == kPrefill) expect_one_each("initial_state_mode", initial_state_mode_opt.size());
  if (is_verification) expect_one_each("num_accepted_tokens", num_accepted_tokens_opt.size());
  HostIntegers integers;
  for (const at::IntArrayRef values : {query_start_loc_opt, at::IntArrayRef(slots), per_sequence}) integers.add(values);
  integers.copy_to(x.device());
  const at::Tensor out = output.view({-1, output.size(-1)});
  if (run_mode == kPrefill) {
    ops::causal_conv1d({.x = rows_of(x),
                        .weight = taps_of(weight),
                        .conv_state = conv_state,
                        .cu_seqlens = integers[0],
                        .state_indices = integers[1],
                        .out = out,
                        .bias = defined(bias_opt),
                        .has_initial_state = integers[2].ne(0),
                        .silu = activation_mode == kSilu});
    return;
  }
  int64_t max_len = 0;
  for (size_t n = 0; n < num; ++n) max_len = std::max(max_len, query_start_loc_opt[n + 1] - query_start_loc_opt[n]);
  const bool has_padding = std::any_of(slots.begin(), slots.end(), [](int64_t slot) { return slot < 0; });
  ops::causal_conv1d_update({.x = rows_of(x),
                             .weight = taps_of(weight),
                             .conv_state = conv_state,
                             .cu_seqlens = integers[0],
                             .state_indices = integers[1],
                             .out = out,
                             .host = {.max_len = max_len, .may_have_padding = has_padding},
                             .bias = defined(bias_opt),
                             .num_accepted = is_verification ? std::optional(integers[2]) : std::nullopt,
                             .silu = activation_mode == kSilu});
}

at::Tensor causal_conv1d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& conv_state,
                         const std::optional<at::Tensor>& bias_opt, const at::IntArrayRef query_start_loc_opt,
                         const at::IntArrayRef cache_indices_opt, const at::IntArrayRef initial_state_mode_opt,
                         const at::IntArrayRef num_accepted_tokens_opt, int64_t activation_mode, int64_t pad_slot_id,
                         int64_t run_mode) {
  const at::Tensor output = at::empty_like(x, at::MemoryFormat::Contiguous);
  causal_conv1d_out(output, x, weight, conv_state, bias_opt, query_start_loc_opt, cache_indices_opt,
                    initial_state_mode_opt, num_accepted_tokens_opt, activation_mode, pad_slot_id, run_mode);
  return output;
}

at::Tensor causal_conv1d_update(CausalConv1dUpdateParams& params) {
  const char* op = "causal_conv1d_update";
  const bool is_blockwise = params.block_idx_last_scheduled_token || params.initial_state_idx ||
                            (params.conv_state_indices && params.conv_state_indices->dim() != 1);
  expect<UnsupportedError>(!is_blockwise, op, "conv_state_indices", "one slot for each sequence",
                           "the slots of a block-wise prefix cache");
  expect<UnsupportedError>(!params.initial_state_mode, op, "initial_state_mode", "none", "a tensor");
  const at::Tensor x = rows_of(params.x);
  const int64_t length = params.x.dim() == 3 ? params.x.size(1) : std::max(params.max_query_len, 1);
  const int64_t num = params.x.dim() == 3 ? params.x.size(0) : x.size(0) / length;
  expect<ShapeError>(params.query_start_loc || num * length == x.size(0), op, "max_query_len",
                     c10::str("a divisor of T=", x.size(0), " (set by x)"), length);
  const Sequences sequences = params.query_start_loc ? decoded_sequences_at(*params.query_start_loc, x.size(0))
                                                     : equal_sequences(num, length, x.device());
  const at::Tensor slots = params.conv_state_indices ? i32(*params.conv_state_indices)
                                                     : at::arange(sequences.num(), x.options().dtype(at::kInt));
  const at::Tensor output = at::empty_like(x, at::MemoryFormat::Contiguous);
  if (x.size(0) == 0) return output.view(params.x.sizes());
  ops::causal_conv1d_update(
      {.x = x,
       .weight = taps_of(params.weight),
       .conv_state = params.conv_state,
       .cu_seqlens = sequences.cu_seqlens,
       .state_indices = params.pad_slot_id < 0 ? slots : slots.masked_fill(slots.eq(params.pad_slot_id), ops::kPadSlot),
       .out = output,
       .host = sequences.host(),
       .bias = defined(params.bias),
       .num_accepted = params.num_accepted_tokens ? std::optional(i32(*params.num_accepted_tokens)) : std::nullopt,
       .silu = params.activation});
  return output.view(params.x.sizes());
}

}  // namespace xllm::kernel::gdn
