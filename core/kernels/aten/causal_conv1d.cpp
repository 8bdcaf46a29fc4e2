// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/causal_conv1d.h"

#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "core/kernels/aten/indexing.h"

namespace xgdn::kernel::aten {
namespace {

using at::indexing::None;
using at::indexing::Slice;

at::Tensor as_index(const at::Tensor& t) {
  return t.to(at::kLong);
}

// What both convolutions share: the rows before each sequence, the taps, the activation.
struct ConvCall {
  at::Tensor x;           // [T, D]
  at::Tensor weight;      // [D, W]
  at::Tensor conv_state;  // [S, R, D]
  at::Tensor out;         // [T, D]
  std::optional<at::Tensor> bias;
  bool silu;
  at::Tensor read;     // [N] i64
  at::Tensor write;    // [N] i64
  at::Tensor starts;   // [N] i64
  at::Tensor lengths;  // [N] i64
  at::Tensor history;  // [N, W-1, D] rows before the sequence, zeros where it starts from nothing
  TokenPlaces places;
};

template <typename Params>
ConvCall conv_call(const Params& p, const ConvShape& s, const at::Tensor& history_offset) {
  ConvCall c{.x = p.x, .weight = p.weight, .conv_state = p.conv_state, .out = p.out, .bias = p.bias, .silu = p.silu};
  c.read = as_index(p.state_indices);
  c.write = as_index(p.write_indices.value_or(p.state_indices));
  const at::Tensor cu = as_index(p.cu_seqlens);
  c.starts = cu.index({Slice(None, -1)});
  c.lengths = cu.index({Slice(1, None)}) - c.starts;
  const at::Tensor tap = at::arange(s.W - 1, cu.options());
  c.history = p.conv_state.index({c.read.clamp_min(0).unsqueeze(1), history_offset.unsqueeze(1) + tap.unsqueeze(0)});
  c.places = token_places(p.cu_seqlens, s.T);
  return c;
}

void convolve(const ConvCall& c, const ConvShape& s) {
  const at::Tensor token = at::arange(s.T, c.places.position.options());
  at::Tensor sum;
  for (int64_t tap = 0; tap < s.W; ++tap) {
    const int64_t back = s.W - 1 - tap;
    const at::Tensor position = c.places.position - back;
    const at::Tensor inside = position.ge(0).unsqueeze(1);
    const at::Tensor from_x = c.x.index({(token - back).clamp_min(0)});
    const at::Tensor before = c.history.index({c.places.sequence, (position + (s.W - 1)).clamp(0, s.W - 2)});
    const at::Tensor input = at::where(inside, from_x.to(at::kFloat), before.to(at::kFloat));
    const at::Tensor product = input * c.weight.select(1, tap).to(at::kFloat);
    sum = sum.defined() ? sum + product : product;
  }
  if (c.bias) sum = sum + c.bias->to(at::kFloat);
  if (c.silu) sum = at::silu(sum);
  const at::Tensor valid = c.read.ge(0).index({c.places.sequence}).unsqueeze(1);
  c.out.copy_(at::where(valid, sum, at::zeros({}, sum.options())));
}

// Slot rows r < count[n] become entry first[n] + r of [history | inputs]; the other rows stay.
void write_history(const ConvCall& c, const ConvShape& s, const at::Tensor& first, const at::Tensor& count,
                   const at::Tensor& unchanged) {
  const at::Tensor row = at::arange(s.R, c.starts.options()).unsqueeze(0);
  const at::Tensor entry = first.unsqueeze(1) + row;  // [N, R]
  const at::Tensor sequence = at::arange(s.N, c.starts.options()).unsqueeze(1);
  const at::Tensor from_history = c.history.index({sequence, entry.clamp(0, s.W - 2)});
  const at::Tensor token = (c.starts.unsqueeze(1) + entry - (s.W - 1)).clamp(0, std::max<int64_t>(s.T - 1, 0));
  const at::Tensor pool_rows = c.conv_state.index({c.write.clamp_min(0)});
  at::Tensor rows = from_history;
  if (s.T > 0) {
    const at::Tensor is_history = entry.lt(s.W - 1).unsqueeze(-1);
    rows = at::where(is_history, from_history, c.x.index({token}).to(c.conv_state.scalar_type()));
  }
  rows = at::where(row.lt(count.unsqueeze(1)).unsqueeze(-1), rows, pool_rows);
  rows = at::where(along(unchanged, rows), c.conv_state.index({c.read.clamp_min(0)}), rows);
  write_slots(c.conv_state, c.write, c.read.ge(0).logical_and(c.write.ge(0)), rows);
}

}  // namespace

void causal_conv1d(const CausalConv1dParams& p, const ConvShape& s) {
  if (s.N == 0) return;
  const at::Tensor no_offset = at::zeros({s.N}, p.state_indices.options().dtype(at::kLong));
  ConvCall c = conv_call(p, s, no_offset);
  if (p.has_initial_state) {
    c.history = at::where(along(*p.has_initial_state, c.history), c.history, at::zeros({}, c.history.options()));
  }
  convolve(c, s);
  write_history(c, s, /*first=*/c.lengths, /*count=*/at::full_like(c.lengths, s.W - 1),
                /*unchanged=*/at::zeros_like(c.read, at::kBool));
}

void causal_conv1d_update(const CausalConv1dUpdateParams& p, const ConvShape& s) {
  if (s.N == 0) return;
  const at::Tensor offset =
      p.num_accepted ? as_index(*p.num_accepted) - 1 : at::zeros({s.N}, p.state_indices.options().dtype(at::kLong));
  const ConvCall c = conv_call(p, s, offset);
  convolve(c, s);
  write_history(c, s, /*first=*/at::ones_like(c.lengths), /*count=*/c.lengths + (s.W - 2),
                /*unchanged=*/c.lengths.eq(0));
}

}  // namespace xgdn::kernel::aten
