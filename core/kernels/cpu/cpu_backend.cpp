// SPDX-License-Identifier: Apache-2.0
// The cpu backend: each op's tensors as its kernel's arguments, and how its work is cut into items.
#include "core/kernels/cpu/cpu_backend.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "core/kernels/aten/host_backend.h"
#include "core/kernels/cpu/causal_conv1d.h"
#include "core/kernels/cpu/chunk_gated_delta_rule.h"
#include "core/kernels/cpu/copy_slots.h"
#include "core/kernels/cpu/expert_products.h"
#include "core/kernels/cpu/expert_sums.h"
#include "core/kernels/cpu/gates.h"
#include "core/kernels/cpu/gdn_decode_step.h"
#include "core/kernels/cpu/gdn_gating.h"
#include "core/kernels/cpu/instruction_sets.h"
#include "core/kernels/cpu/linear.h"
#include "core/kernels/cpu/linear_f32.h"
#include "core/kernels/cpu/linear_rows.h"
#include "core/kernels/cpu/paged_attention.h"
#include "core/kernels/cpu/quantized_linear.h"
#include "core/kernels/cpu/recurrent_gated_delta_rule.h"
#include "core/kernels/cpu/replay_gated_delta_rule.h"
#include "core/kernels/cpu/rms_norm.h"
#include "core/kernels/cpu/rms_norm_gated.h"
#include "core/kernels/cpu/store_kv.h"
#include "core/kernels/cpu/threads.h"
#include "core/kernels/op_tensor_args.h"
#include "core/kernels/step_memory.h"

namespace xgdn::kernel {
namespace {

using cpu::parallel_dynamic;
using cpu::parallel_ranges;
using cpu::threads_for;

// How many elements of a copy take as long as one of a norm or of an exponential. At 1.4 ns each, measured on a Zen 3,
// a norm of 32 tokens of 1,024 is worth eight threads.
constexpr int64_t kPointwiseCost = 4;

// Few items are split into blocks of V rows.
void run_delta_rule(cpu::RecurrentGatedDeltaRuleArgs args, const GdnShape& s) {
  const int64_t threads = threads_for(std::max(s.T, s.N) * s.HV * s.V * s.K);
  const int64_t items = std::max<int64_t>(args.N * args.HV, 1);
  const int64_t steps = args.V / cpu::kHeadDimStep;
  const int64_t blocks = threads == 1 ? 1 : std::clamp<int64_t>((2 * threads + items - 1) / items, 1, steps);
  args.v_block = (steps + blocks - 1) / blocks * cpu::kHeadDimStep;

  parallel_dynamic(threads, cpu::num_work_items(args),
                   [&](int64_t begin, int64_t end) { cpu::recurrent_gated_delta_rule(args, begin, end); });
}

// The operands of "fast" are split (chunk_gated_delta_rule.cpp), so that it has 2.4 times the multiply-adds of "exact":
// only tiles make up for that.
const cpu::BFloat16Products* chunk_products(const ChunkGatedDeltaRuleParams& p) {
  const cpu::BFloat16Products* products = cpu::bfloat16_products();
  return may_be_fast(p) && products != nullptr && products->are_tiles ? products : nullptr;
}

// The value heads of a key head share an item unless their states outgrow the cache or threads would have nothing to
// do; then V is split as well.
void run_chunks(cpu::ChunkGatedDeltaRuleArgs args, const GdnShape& s) {
  constexpr int64_t kItemState = 1 << 18;  // elements
  args.heads_per_item = s.HV / s.H;
  args.v_block = s.V;
  const int64_t threads = threads_for(std::max(s.T, s.N) * s.HV * s.V * s.K);
  const int64_t wanted = threads == 1 ? 1 : 2 * threads;
  const int64_t group = s.HV / s.H;
  while (args.heads_per_item > 1 &&
         (args.heads_per_item * s.K * s.V > kItemState || cpu::num_work_items(args) < wanted)) {
    do --args.heads_per_item;
    while (group % args.heads_per_item != 0);
  }
  const int64_t items = std::max<int64_t>(cpu::num_work_items(args), 1);
  const int64_t step = 2 * cpu::kHeadDimStep;  // what a product takes at once
  const int64_t steps = (s.V + step - 1) / step;
  const int64_t blocks = std::clamp<int64_t>((wanted + items - 1) / items, 1, steps);
  args.v_block = (steps + blocks - 1) / blocks * step;
  parallel_dynamic(threads, cpu::num_work_items(args), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) cpu::chunk_gated_delta_rule(args, item);
  });
}

void run_conv(const CausalConv1dArgs& args, const ConvShape& s) {
  const int64_t count = cpu::num_work_items(args);
  const int64_t elements = std::max(s.T, s.N) * s.D / std::max<int64_t>(count, 1);
  parallel_ranges(count, elements, [&](int64_t begin, int64_t end) { cpu::causal_conv1d(args, begin, end); });
}

void run_norm(const RmsNormArgs& args, int64_t num_rows) {
  parallel_ranges(num_rows, kPointwiseCost * args.D,
                  [&](int64_t begin, int64_t end) { cpu::rms_norm(args, begin, end); });
}

// Which products the cpu backend computes itself.
template <class Params>
bool has_products(const Params& p, const LinearShape& s) {
  return p.x.scalar_type() == at::kBFloat16 && s.D % cpu::kLinearDepthStep == 0;
}

// Which of them go to tiles. The others are multiplied row by row.
bool has_tiles(const LinearParams& p, const LinearShape& s) {
  const cpu::BFloat16Products* products = cpu::bfloat16_products();
  return products != nullptr && products->are_tiles && s.O % cpu::kLinearWidthStep == 0 && p.x.stride(0) % 2 == 0 &&
         p.out.stride(0) % 2 == 0;
}

constexpr int64_t kTokensOfPart = 256;  // for which a block of weights is loaded at least

// Calls f(args, begin, end) for blocks of outputs, `neighbours` at once where they share loads; with too few of them
// for the threads, one at once and for parts of the tokens. Threads take them as they come: with many of them one is
// always disturbed, and the others would wait for it.
template <class Args, class F>
void parallel_products(const Args& args, int64_t neighbours, const F& f) {
  constexpr int64_t kItemsPerThread = 4;
  const int64_t threads = threads_for(std::max<int64_t>(args.T, 1) * args.D * args.O);
  const int64_t blocks = cpu::num_work_items(args);
  const int64_t most_parts = std::max<int64_t>(args.T / kTokensOfPart, 1);
  if (threads > 1 && blocks / neighbours * most_parts < 2 * threads) neighbours = 1;
  const int64_t columns = (blocks + neighbours - 1) / neighbours;
  const int64_t wanted = threads == 1 ? 1 : (kItemsPerThread * threads + columns - 1) / columns;
  const int64_t parts = std::min(wanted, most_parts);
  const int64_t part = (args.T + parts - 1) / parts;
  const int64_t tokens = (part + cpu::kPanelPair - 1) / cpu::kPanelPair * cpu::kPanelPair;
  parallel_dynamic(threads, columns * parts, [&](int64_t begin, int64_t end) {
    if (parts == 1) return f(args, begin * neighbours, std::min(end * neighbours, blocks));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t token = item % parts * tokens, block = item / parts * neighbours;
      const int64_t count = std::min(tokens, args.T - token);
      if (count > 0) f(of_tokens(args, token, count), block, std::min(block + neighbours, blocks));
    }
  });
}

// Calls f(args, begin, end, next item) over the blocks of outputs of few tokens, for which weights are read at the
// memory's pace: in ranges that are long enough for it, and so many that threads end at the same time.
template <class Args, class F>
void parallel_streams(const Args& args, const F& f) {
  constexpr int64_t kLeastRanges = 4, kMostRanges = 16;  // of a thread
  constexpr int64_t kLongItems = 8;
  const int64_t threads = threads_for(std::max<int64_t>(args.T, 1) * args.D * args.O);
  const int64_t items = cpu::num_work_items(args);
  const int64_t least = std::clamp<int64_t>(items / (kLeastRanges * threads), 1, kLongItems);
  const int64_t range = std::max(items / (kMostRanges * threads), least);
  cpu::parallel_ahead(threads, (items + range - 1) / range, [&](int64_t index, int64_t next) {
    f(args, index * range, std::min((index + 1) * range, items), next * range);
  });
}

cpu::LinearCall linear_call(const LinearParams& p, const LinearShape& s) {
  return {.T = s.T,
          .D = s.D,
          .O = s.O,
          .x = in_rows(p.x),
          .weight = static_cast<const uint16_t*>(p.weight.const_data_ptr()),
          .weight_stride = p.weight.stride(0),
          .bias = p.bias ? in_heads(*p.bias) : InRows(),
          .out = out_columns(p.out)};
}

// Without tiles. One token costs a pass over the weights, where products of panels would cost what 16 tokens do.
void run_rows(const LinearParams& p, const LinearShape& s) {
  cpu::LinearRowsArgs args = {linear_call(p, s)};
  const bool is_widened = cpu::bfloat16_products() == nullptr;
  const at::Tensor widened =
      allocate_temporary({is_widened ? s.T : 0, cpu::widened_stride(s.D)}, p.x.options().dtype(at::kFloat));
  if (is_widened) {
    args.widened = widened.mutable_data_ptr<float>();
    parallel_ranges(s.T, s.D, [&](int64_t begin, int64_t end) { cpu::widen_tokens(args, begin, end); });
  }
  if (s.T >= 2 * kTokensOfPart) {  // tokens, too, may be split among the threads
    return parallel_products(args, cpu::num_neighbours(args), [](const auto& part, int64_t begin, int64_t end) {
      cpu::linear_rows(part, begin, end, cpu::num_work_items(part));
    });
  }
  parallel_streams(args, cpu::linear_rows);
}

// Few tokens of f32 cost a pass over the weights; on a Zen 4 MKL takes 1.2 to 4.5 times as long for 1 to 8 of them.
bool has_few_f32(const LinearParams& p, const LinearShape& s) {
  return p.x.scalar_type() == at::kFloat && s.D % cpu::kLinearF32DepthStep == 0 && s.T > 0 &&
         s.T <= cpu::kLinearF32MostTokens;
}

void run_few_f32(const LinearParams& p, const LinearShape& s) {
  const cpu::LinearF32Args args = {.T = s.T,
                                   .D = s.D,
                                   .O = s.O,
                                   .x = p.x.const_data_ptr<float>(),
                                   .x_stride = p.x.stride(0),
                                   .weight = p.weight.const_data_ptr<float>(),
                                   .weight_stride = p.weight.stride(0),
                                   .bias = p.bias ? p.bias->const_data_ptr<float>() : nullptr,
                                   .out = p.out.mutable_data_ptr<float>(),
                                   .out_stride = p.out.stride(0)};
  cpu::parallel_ahead(threads_for(s.T * s.D * s.O), num_work_items(args),
                      [&](int64_t item, int64_t next) { cpu::linear_f32(args, item, next); });
}

void run_products(const LinearParams& p, const LinearShape& s) {
  cpu::LinearArgs args = {linear_call(p, s), cpu::bfloat16_products()};
  const at::Tensor packed = allocate_temporary({cpu::packed_size(args)}, p.x.options());
  args.packed = static_cast<uint16_t*>(packed.mutable_data_ptr());
  parallel_ranges(cpu::num_panels(args), s.D * static_cast<int64_t>(cpu::kPanel),
                  [&](int64_t begin, int64_t end) { cpu::pack_tokens(args, begin, end); });
  if (s.T > cpu::kFewTokens) return parallel_products(args, cpu::num_neighbours(args), cpu::linear);
  cpu::parallel_ahead(threads_for(std::max<int64_t>(s.T, 1) * s.D * s.O), cpu::num_few_items(args),
                      [&](int64_t item, int64_t next) { cpu::linear_of_few(args, item, next); });
}

cpu::Codes format_of(const at::Tensor& codes) {
  switch (codes.scalar_type()) {
    case at::kChar:
      return cpu::Codes::kInt8;
    case at::kByte:
      return cpu::Codes::kInt4;
    default:
      return cpu::Codes::kFloat8;
  }
}

void run_quantized(const QuantizedLinearParams& p, const QuantizedLinearShape& s) {
  const int64_t groups = s.D / s.group_size;
  const at::Tensor& scales = p.weight.scales;
  cpu::QuantizedLinearArgs args = {.T = s.T,
                                   .D = s.D,
                                   .O = s.O,
                                   .group_size = s.group_size,
                                   .format = format_of(p.weight.codes),
                                   .x = in_rows(p.x),
                                   .codes = static_cast<const uint8_t*>(p.weight.codes.const_data_ptr()),
                                   .scales = in_rows(scales),
                                   .zeros = pointer<int8_t>(p.weight.zeros),
                                   .order = pointer<int32_t>(p.weight.order),
                                   .activation_bits = p.weight.activation_bits,
                                   .bias = p.bias ? in_heads(*p.bias) : InRows(),
                                   .out = out_columns(p.out)};
  const bool is_float = args.format == cpu::Codes::kFloat8;
  const at::Tensor tokens = allocate_temporary({s.T, token_stride(args)}, p.x.options().dtype(at::kByte));
  const at::Tensor token_scales = allocate_temporary({is_float ? 0 : s.T, groups}, p.x.options().dtype(at::kFloat));
  const at::Tensor token_starts = allocate_temporary({is_float ? 0 : s.T, groups}, p.x.options().dtype(at::kInt));
  args.by_tiles = cpu::takes_tiles(args.format, s.T);
  args.tokens = tokens.mutable_data_ptr();
  args.token_scales = token_scales.mutable_data_ptr<float>();
  args.token_starts = token_starts.mutable_data_ptr<int32_t>();
  parallel_ranges(s.T, s.D, [&](int64_t begin, int64_t end) { cpu::prepare_tokens(args, begin, end); });
  if (s.T <= cpu::kQuantizedFewTokens) return parallel_streams(args, cpu::quantized_linear);
  parallel_products(args, num_neighbours(args), [](const auto& part, int64_t begin, int64_t end) {
    cpu::quantized_linear(part, begin, end, cpu::num_work_items(part));
  });
}

// Which experts the cpu backend computes itself.
bool has_products(const MoeExpertsParams& p, const ExpertsShape& s) {
  return p.x.scalar_type() == at::kBFloat16 && s.D % cpu::kLinearDepthStep == 0 && s.I % cpu::kLinearDepthStep == 0;
}

// Rows or tiles, as `linear` of one weight.
std::unique_ptr<cpu::ExpertProduct> expert_product(const at::Tensor& weight) {
  const cpu::LinearCall call = {.D = weight.size(2),
                                .O = weight.size(1),
                                .weight = static_cast<const uint16_t*>(weight.const_data_ptr()),
                                .weight_stride = weight.size(2)};
  const cpu::BFloat16Products* products = cpu::bfloat16_products();
  if (products != nullptr && products->are_tiles) {
    return std::make_unique<cpu::ExpertTiles>(cpu::LinearArgs{call, products});
  }
  return std::make_unique<cpu::ExpertRows>(cpu::LinearRowsArgs{call}, /*widens=*/products == nullptr);
}

std::unique_ptr<cpu::ExpertProduct> expert_product(const QuantizedWeight& weight, int64_t D, int64_t O,
                                                   int64_t group_size) {
  const cpu::QuantizedLinearArgs args = {.D = D,
                                         .O = O,
                                         .group_size = group_size,
                                         .format = format_of(weight.codes),
                                         .codes = static_cast<const uint8_t*>(weight.codes.const_data_ptr()),
                                         .scales = in_rows(weight.scales.flatten(0, 1)),
                                         .zeros = pointer<int8_t>(weight.zeros),
                                         .activation_bits = weight.activation_bits};
  return std::make_unique<cpu::QuantizedExperts>(args);
}

// Memory for the visits, and the visits in it. Threads take panels as they come.
at::Tensor arrange(cpu::ExpertProduct& product, const cpu::ExpertVisits& visits, const InRows& x, const int64_t* rows,
                   int64_t D, const at::TensorOptions& options) {
  at::Tensor memory = allocate_temporary({product.num_bytes(visits)}, options.dtype(at::kByte));
  product.set_memory(memory.mutable_data_ptr(), visits);
  parallel_dynamic(threads_for(kPointwiseCost * visits.size() * D), static_cast<int64_t>(visits.panels.size()),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t panel = begin; panel < end; ++panel) product.arrange(x, rows, panel);
                   });
  return memory;
}

// A region each for the blocks of all experts, of gate_up and then of down; those between them are one thread's in a
// decode step. Experts are read once for as many visits as take 128 MiB in f32. What an expert gives is rounded to the
// type of x, as each product of `linear` is; the sum of a token is f32.
template <class Params>
void run_experts(const Params& p, const ExpertsShape& s, cpu::ExpertProduct& gate_up, cpu::ExpertProduct& down) {
  constexpr int64_t kMostElements = 1 << 25;
  const int64_t step = std::max<int64_t>(kMostElements / (std::max<int64_t>(s.A, 1) * s.D), 1);
  for (int64_t token = 0; token < s.T; token += step) {
    const int64_t T = std::min(step, s.T - token);
    const at::Tensor x = p.x.narrow(0, token, T), weights = p.weights.narrow(0, token, T);
    const cpu::ExpertVisits visits =
        cpu::sort_by_expert(p.chosen.template const_data_ptr<int64_t>() + token * s.A, T, s.A, s.E);
    const at::Tensor gated = allocate_temporary({visits.size(), 2 * s.I}, x.options());
    const int64_t elements = visits.size() * s.D * s.I;
    {
      const at::Tensor memory = arrange(gate_up, visits, in_rows(x), visits.tokens.data(), s.D, x.options());
      const cpu::GatedExpertsArgs args = {.I = s.I, .visits = &visits, .gate_up = &gate_up, .out = out_columns(gated)};
      parallel_dynamic(threads_for(2 * elements), cpu::num_work_items(visits, s.I),
                       [&](int64_t begin, int64_t end) { cpu::gated_experts(args, begin, end); });
    }
    const at::Tensor memory = arrange(down, visits, in_rows(gated), nullptr, s.I, x.options());
    const at::Tensor outputs = allocate_temporary({visits.size(), s.D}, x.options());
    const cpu::ExpertOutputsArgs args = {.D = s.D, .visits = &visits, .down = &down, .out = out_columns(outputs)};
    parallel_dynamic(threads_for(elements), cpu::num_work_items(visits, s.D),
                     [&](int64_t begin, int64_t end) { cpu::expert_outputs(args, begin, end); });
    const cpu::ExpertSumsArgs sums = {.A = s.A,
                                      .D = s.D,
                                      .visits = visits.visits.data(),
                                      .outputs = in_rows(outputs),
                                      .weights = in_scalars(weights),
                                      .out = out_rows(p.out.narrow(0, token, T))};
    parallel_ranges(T, s.A * s.D, [&](int64_t begin, int64_t end) { cpu::expert_sums(sums, begin, end); });
  }
}

cpu::KvRows cache_rows(const at::Tensor& cache) {
  return {.are_int8 = cache.scalar_type() == at::kChar,
          .bytes = cache.size(3) * static_cast<int64_t>(cache.itemsize())};
}

// Products of bf16 round the weights; where f32 vectors are as fast, nothing is had for it.
const cpu::BFloat16Products* attention_products(const PagedAttentionParams& p) {
  const cpu::BFloat16Products* products = cpu::bfloat16_products();
  return p.q.scalar_type() == at::kBFloat16 && products != nullptr && products->are_faster ? products : nullptr;
}

// Pairs of a token and a row that it sees.
int64_t work_of(const cpu::AttentionBlock& b) {
  return b.num_tokens * std::max<int64_t>(b.context_len + b.num_tokens / 2, 0);
}

// Tokens of a block: what fills it, or less where threads would have nothing to do.
int64_t attention_block_size(const PagedAttentionParams& p, const AttentionShape& s) {
  constexpr int64_t kItemsPerThread = 4;
  constexpr int64_t kFewestTokens = 8;
  const int64_t most = std::max<int64_t>(cpu::kAttentionRows / (s.HQ / s.HKV), 1);
  const int64_t wanted = kItemsPerThread * at::get_num_threads();
  return std::clamp(p.q.size(0) * s.HKV / wanted, std::min(kFewestTokens, most), most);
}

// The sequences, cut into blocks of at most `num_tokens` tokens. Those with the most work come first: they must not be
// what the last thread begins with.
std::vector<cpu::AttentionBlock> attention_blocks(const PagedAttentionParams& p, int64_t num_tokens) {
  const int32_t* cu = p.cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* contexts = p.context_lens.const_data_ptr<int32_t>();
  const int32_t* tables = p.block_table.const_data_ptr<int32_t>();
  std::vector<cpu::AttentionBlock> blocks;
  for (int64_t n = 0; n < p.context_lens.numel(); ++n) {
    for (int64_t token = cu[n]; token < cu[n + 1]; token += num_tokens) {
      blocks.push_back({.token = token,
                        .num_tokens = std::min(num_tokens, cu[n + 1] - token),
                        .context_len = contexts[n] - (cu[n + 1] - 1 - token),
                        .blocks = tables + n * p.block_table.stride(0)});
    }
  }
  std::stable_sort(blocks.begin(), blocks.end(), [](const auto& a, const auto& b) { return work_of(a) > work_of(b); });
  return blocks;
}

std::optional<std::string> why_not_head_dims(const GdnShape& s) {
  for (const auto& [letter, size] : {std::pair{'K', s.K}, std::pair{'V', s.V}}) {
    if (size % cpu::kHeadDimStep != 0 || size < cpu::kHeadDimStep || size > cpu::kMaxHeadDim) {
      return c10::str("its kernels take ", letter, " in multiples of ", cpu::kHeadDimStep, " up to ", cpu::kMaxHeadDim,
                      ", got ", size);
    }
  }
  return std::nullopt;
}

class CpuBackend final : public HostBackend {
 public:
  CpuBackend() { cpu::limit_highway_targets(); }

  using HostBackend::is_batch_invariant;
  using HostBackend::run;
  using HostBackend::why_not;

  std::string_view name() const override { return "cpu"; }

  bool copies_contexts() const override { return false; }

  std::optional<std::string> why_not(const RecurrentGatedDeltaRuleParams&, const GdnShape& s) const override {
    return why_not_head_dims(s);
  }
  std::optional<std::string> why_not(const ChunkGatedDeltaRuleParams&, const GdnShape& s) const override {
    return why_not_head_dims(s);
  }
  std::optional<std::string> why_not(const ReplayGatedDeltaRuleParams&, const ReplayShape& s) const override {
    return why_not_head_dims(s.rule);
  }
  std::optional<std::string> why_not(const MaterializeStateParams&, const ReplayShape& s) const override {
    return why_not_head_dims(s.rule);
  }
  std::optional<std::string> why_not(const PackedDecodeParams&, const GdnShape& s) const override {
    return why_not_head_dims(s);
  }
  std::optional<std::string> why_not(const GdnDecodeStepParams&, const DecodeStepShape& s) const override {
    return why_not_head_dims(s.rule);
  }

  bool is_batch_invariant(const RecurrentGatedDeltaRuleParams&, const GdnShape&) const override { return true; }
  bool is_batch_invariant(const ChunkGatedDeltaRuleParams&, const GdnShape&) const override { return true; }
  bool is_batch_invariant(const ReplayGatedDeltaRuleParams&, const ReplayShape&) const override { return true; }
  bool is_batch_invariant(const MaterializeStateParams&, const ReplayShape&) const override { return true; }
  bool is_batch_invariant(const PackedDecodeParams&, const GdnShape&) const override { return true; }
  bool is_batch_invariant(const CausalConv1dParams&, const ConvShape&) const override { return true; }
  bool is_batch_invariant(const CausalConv1dUpdateParams&, const ConvShape&) const override { return true; }
  bool is_batch_invariant(const GdnGatingParams&, const GdnShape&) const override { return true; }
  bool is_batch_invariant(const RmsNormGatedParams&, const GdnShape&) const override { return true; }
  bool is_batch_invariant(const RmsNormParams&, const NormShape&) const override { return true; }
  bool is_batch_invariant(const SiluAndMulParams&, const LinearShape&) const override { return true; }
  bool is_batch_invariant(const SigmoidAndMulParams&, const NormShape&) const override { return true; }
  bool is_batch_invariant(const GdnDecodeStepParams&, const DecodeStepShape&) const override { return true; }
  bool is_batch_invariant(const CopySlotsParams&, const SlotsShape&) const override { return true; }
  bool is_batch_invariant(const StoreKvParams&, const KvShape&) const override { return true; }
  bool is_batch_invariant(const QuantizedLinearParams&, const QuantizedLinearShape&) const override { return true; }
  bool is_batch_invariant(const LinearParams& p, const LinearShape& s) const override { return has_products(p, s); }
  bool is_batch_invariant(const RmsNormLinearParams& p, const LinearShape& s) const override {
    return has_products(p, s);
  }
  bool is_batch_invariant(const PagedAttentionParams&, const AttentionShape&) const override { return true; }
  bool is_batch_invariant(const MoeExpertsParams& p, const ExpertsShape& s) const override {
    return has_products(p, s);
  }
  bool is_batch_invariant(const QuantizedMoeExpertsParams&, const QuantizedExpertsShape&) const override {
    return true;
  }

  void run(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const override {
    run_delta_rule({op_args(p, s)}, s);
  }

  void run(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const override {
    run_chunks({delta_rule_args(p, s),
                /*has_initial_state=*/pointer<bool>(p.has_initial_state),
                /*products=*/chunk_products(p)},
               s);
  }

  void run(const ReplayGatedDeltaRuleParams& p, const ReplayShape& shape) const override {
    const GdnShape& s = shape.rule;
    const ReplayGatedDeltaRuleArgs args = op_args(p, shape);
    parallel_dynamic(threads_for(std::max(s.T, s.N) * s.HV * s.V * s.K), cpu::num_work_items(args),
                     [&](int64_t begin, int64_t end) { cpu::replay_gated_delta_rule(args, begin, end); });
    cpu::write_ring_lengths(args);
  }

  void run(const MaterializeStateParams& p, const ReplayShape& shape) const override {
    const GdnShape& s = shape.rule;
    const ReplayGatedDeltaRuleArgs args = op_args(p, shape);
    const auto* lengths = p.lengths.const_data_ptr<int32_t>();
    parallel_dynamic(threads_for(s.N * s.HV * s.V * s.K), cpu::num_work_items(args),
                     [&](int64_t begin, int64_t end) { cpu::materialize_state(args, lengths, begin, end); });
  }

  void run(const PackedDecodeParams& p, const GdnShape& s) const override { run_delta_rule({op_args(p, s)}, s); }

  void run(const CausalConv1dParams& p, const ConvShape& s) const override { run_conv(op_args(p, s), s); }

  void run(const CausalConv1dUpdateParams& p, const ConvShape& s) const override { run_conv(op_args(p, s), s); }

  void run(const GdnGatingParams& p, const GdnShape& s) const override {
    const GdnGatingArgs args = op_args(p, s);
    parallel_ranges(s.T, kPointwiseCost * s.HV, [&](int64_t begin, int64_t end) { cpu::gdn_gating(args, begin, end); });
  }

  void run(const GdnDecodeStepParams& p, const DecodeStepShape& shape) const override {
    const GdnShape& s = shape.rule;
    const DecodeStepArgs args = op_args(p, shape);
    parallel_dynamic(threads_for(s.N * s.HV * s.V * s.K), cpu::num_work_items(args),
                     [&](int64_t begin, int64_t end) { cpu::gdn_decode_step(args, begin, end); });
    if (args.has_replay_states()) cpu::write_ring_lengths(replay_args(args));
  }

  void run(const RmsNormParams& p, const NormShape& s) const override { run_norm(op_args(p, s), s.T * s.H); }

  void run(const SiluAndMulParams& p, const LinearShape& s) const override {
    const SiluAndMulArgs args = op_args(p, s);
    parallel_ranges(s.T, kPointwiseCost * s.O,
                    [&](int64_t begin, int64_t end) { cpu::silu_and_mul(args, begin, end); });
  }

  void run(const SigmoidAndMulParams& p, const NormShape& s) const override {
    const SigmoidAndMulArgs args = op_args(p, s);
    parallel_ranges(s.T * s.H, kPointwiseCost * s.D,
                    [&](int64_t begin, int64_t end) { cpu::sigmoid_and_mul(args, begin, end); });
  }

  void run(const LinearParams& p, const LinearShape& s) const override {
    if (has_few_f32(p, s)) return run_few_f32(p, s);
    if (!has_products(p, s)) return aten::linear(p);
    has_tiles(p, s) ? run_products(p, s) : run_rows(p, s);
  }

  void run(const QuantizedLinearParams& p, const QuantizedLinearShape& s) const override { run_quantized(p, s); }

  void run(const RmsNormLinearParams& p, const LinearShape& s) const override {
    const at::Tensor normed = allocate_temporary({s.T, s.D}, p.x.options());
    run_norm(norm_args(p, s, normed), s.T);
    aten::linear_of_normed(*this, p, s, normed);
  }

  void run(const MoeExpertsParams& p, const ExpertsShape& s) const override {
    if (!has_products(p, s)) return aten::moe_experts(p, s);
    run_experts(p, s, *expert_product(p.gate_up), *expert_product(p.down));
  }

  void run(const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s) const override {
    const auto [T, A, E, D, I] = s.experts;
    run_experts(p, s.experts, *expert_product(p.gate_up, D, 2 * I, s.gate_up_group_size),
                *expert_product(p.down, I, D, s.down_group_size));
  }

  void run(const PagedAttentionParams& p, const AttentionShape& s) const override {
    const cpu::PagedAttentionArgs args = {.HQ = s.HQ,
                                          .HKV = s.HKV,
                                          .D = s.D,
                                          .B = p.k.size(1),
                                          .q = in_rows(p.q),
                                          .cache_rows = cache_rows(p.k),
                                          .k = p.k.const_data_ptr(),
                                          .v = p.v.const_data_ptr(),
                                          .out = out_rows(p.out),
                                          .scale = static_cast<float>(p.scale.value_or(1.0 / std::sqrt(s.D))),
                                          .products = attention_products(p)};
    const std::vector<cpu::AttentionBlock> blocks = attention_blocks(p, attention_block_size(p, s));
    int64_t elements = 0;
    for (const cpu::AttentionBlock& b : blocks) elements += work_of(b) * s.HQ * s.D;
    parallel_dynamic(threads_for(elements), static_cast<int64_t>(blocks.size()) * s.HKV,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t item = begin; item < end; ++item) {
                         cpu::paged_attention(args, blocks[static_cast<size_t>(item / s.HKV)], item % s.HKV);
                       }
                     });
  }

  void run(const CopySlotsParams& p, const SlotsShape& s) const override {
    cpu::CopySlotsArgs args = {
        .N = s.N, .from = p.from_indices.const_data_ptr<int32_t>(), .to = p.to_indices.const_data_ptr<int32_t>()};
    int64_t bytes = 0;
    for (const at::Tensor& pool : p.pools) {
      if (pool.numel() == 0) continue;
      const auto item = static_cast<int64_t>(pool.itemsize());
      args.pools.push_back({.data = static_cast<char*>(pool.mutable_data_ptr()),
                            .slot_stride = pool.stride(0) * item,
                            .slot_size = pool.numel() / s.S * item});
      bytes += s.N * args.pools.back().slot_size;
    }
    parallel_dynamic(threads_for(bytes / size_of(DType::kFloat32)), cpu::num_work_items(args),
                     [&](int64_t begin, int64_t end) { cpu::copy_slots(args, begin, end); });
  }

  void run(const StoreKvParams& p, const KvShape& s) const override {
    const cpu::StoreKvArgs args = {.HKV = s.HKV,
                                   .D = s.D,
                                   .k = in_rows(p.k),
                                   .v = in_rows(p.v),
                                   .cache_rows = cache_rows(p.k_cache),
                                   .k_cache = p.k_cache.mutable_data_ptr(),
                                   .v_cache = p.v_cache.mutable_data_ptr(),
                                   .rows = p.slot_mapping.const_data_ptr<int32_t>()};
    parallel_ranges(s.T, 2 * s.HKV * s.D, [&](int64_t begin, int64_t end) { cpu::store_kv(args, begin, end); });
  }

  void run(const RmsNormGatedParams& p, const GdnShape& s) const override {
    const RmsNormGatedArgs args = op_args(p, s);
    parallel_ranges(s.T * s.HV, kPointwiseCost * s.V,
                    [&](int64_t begin, int64_t end) { cpu::rms_norm_gated(args, begin, end); });
  }
};

}  // namespace

const Backend* cpu_backend() {
  static const CpuBackend backend;
  return &backend;
}

}  // namespace xgdn::kernel
