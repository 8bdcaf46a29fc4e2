// SPDX-License-Identifier: Apache-2.0
// The maths as plain loops on the CPU. Rounding: inputs are widened to double, all arithmetic is double, states and
// outputs are rounded once when they are written.
#include "core/kernels/reference/reference_backend.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/kernels/aten/host_backend.h"
#include "core/kernels/reference/delta_rule_head.h"

namespace xgdn::kernel {
namespace {

using reference::HeadTokens;
using reference::Matrix;
using reference::ReplayHead;

at::Tensor wide(const at::Tensor& t) {
  return t.to(at::kDouble).contiguous();
}

// The inputs of a delta-rule call in double, and how to pick one head of one sequence from them.
class Inputs {
 public:
  template <typename Params>
  Inputs(const Params& p, const GdnShape& s)
      : shape_(s),
        normalise_(p.use_qk_l2norm_in_kernel),
        q_(wide(p.q)),
        k_(wide(p.k)),
        v_(wide(p.v)),
        g_(wide(p.g)),
        beta_(wide(p.beta)),
        out_(at::empty({s.T, s.HV, s.V}, q_.options())) {}

  HeadTokens head(int64_t begin, int64_t end, int64_t h) const {
    const int64_t key_head = h / (shape_.HV / shape_.H);
    HeadTokens x(end - begin, shape_.K, shape_.V);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t - begin;
      copy_key(q_, t, key_head, x.q[i]);
      copy_key(k_, t, key_head, x.k[i]);
      std::copy_n(row(v_, t, h, shape_.HV, shape_.V), shape_.V, x.v[i]);
      x.g[i] = g_.const_data_ptr<double>()[t * shape_.HV + h];
      x.beta[i] = beta_.const_data_ptr<double>()[t * shape_.HV + h];
    }
    return x;
  }

  void write_outputs(const HeadTokens& x, int64_t begin, int64_t h) {
    for (int64_t i = 0; i < x.o.rows; ++i) {
      std::copy_n(x.o[i], shape_.V, out_.mutable_data_ptr<double>() + ((begin + i) * shape_.HV + h) * shape_.V);
    }
  }

  const at::Tensor& out() const { return out_; }

 private:
  static const double* row(const at::Tensor& t, int64_t token, int64_t head, int64_t heads, int64_t dim) {
    return t.const_data_ptr<double>() + (token * heads + head) * dim;
  }

  void copy_key(const at::Tensor& t, int64_t token, int64_t head, double* to) const {
    const double* from = row(t, token, head, shape_.H, shape_.K);
    const double norm = normalise_ ? std::sqrt(reference::dot(from, from, shape_.K) + kL2NormEps) : 1.0;
    for (int64_t c = 0; c < shape_.K; ++c) to[c] = from[c] / norm;
  }

  GdnShape shape_;
  bool normalise_;
  at::Tensor q_, k_, v_, g_, beta_, out_;
};

Matrix read_state(const at::Tensor& pool, int64_t slot, int64_t h) {
  const at::Tensor head = wide(pool.select(0, slot).select(0, h));
  Matrix S(head.size(0), head.size(1));
  std::copy_n(head.const_data_ptr<double>(), head.numel(), S.values.data());
  return S;
}

void write_state(const Matrix& S, const at::Tensor& pool, int64_t slot, int64_t h) {
  if (slot == kPadSlot) return;
  const at::Tensor head = at::empty({S.rows, S.cols}, at::kDouble);
  std::copy(S.values.begin(), S.values.end(), head.mutable_data_ptr<double>());
  pool.select(0, slot).select(0, h).copy_(head);
}

// Row `row` of a ring's k or u.
float* ring_row(const at::Tensor& pool, int64_t slot, int64_t head, int64_t row) {
  return pool.mutable_data_ptr<float>() + slot * pool.stride(0) + head * pool.stride(1) + row * pool.stride(2);
}

void read_ring(const ReplayRing& ring, int64_t slot, int64_t h, int64_t key_head, int64_t length, ReplayHead& head) {
  for (int64_t row = 0; row < length; ++row) {
    const float* k = ring_row(ring.k, slot, key_head, row);
    const float* u = ring_row(ring.u, slot, h, row);
    head.ring.push_back({.k = {k, k + head.S.cols}, .u = {u, u + head.S.rows}, .g = *ring_row(ring.g, slot, h, row)});
  }
}

void write_ring(const ReplayHead& head, const ReplayRing& ring, int64_t slot, int64_t h, int64_t key_head) {
  for (size_t i = 0; i < head.ring.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    std::copy(head.ring[i].k.begin(), head.ring[i].k.end(), ring_row(ring.k, slot, key_head, row));
    std::copy(head.ring[i].u.begin(), head.ring[i].u.end(), ring_row(ring.u, slot, h, row));
    *ring_row(ring.g, slot, h, row) = static_cast<float>(head.ring[i].g);
  }
}

// Whether numbers up to `largest` hold S.
bool is_finite(const Matrix& S, double largest) {
  return std::ranges::all_of(S.values, [&](double value) { return std::abs(value) <= largest; });
}

// All tokens of x; says whether S, of which a pool holds numbers up to `largest`, is a new one.
bool replay(HeadTokens& x, double scale, int64_t C, bool commit, double largest, ReplayHead& head) {
  bool is_folded = false;
  const auto length = [&] { return static_cast<int64_t>(head.ring.size()); };
  const auto fold = [&] {
    head.fold(C);
    is_folded = true;
  };
  if (length() >= C) fold();
  Matrix now = head.state_after(length());
  for (int64_t t = 0; t < x.o.rows; ++t) {
    head.append(x, t, scale, now);
    if (!commit || length() < C) continue;
    fold();
    if (!is_finite(head.S, largest)) std::fill_n(x.o[t], x.o.cols, std::numeric_limits<double>::quiet_NaN());
  }
  return is_folded;
}

class ReferenceBackend final : public HostBackend {
 public:
  using HostBackend::is_batch_invariant;
  using HostBackend::run;
  using HostBackend::why_not;

  std::string_view name() const override { return "reference"; }

  bool is_batch_invariant(const RecurrentGatedDeltaRuleParams&, const GdnShape&) const override { return true; }
  bool is_batch_invariant(const ChunkGatedDeltaRuleParams&, const GdnShape&) const override { return true; }
  bool is_batch_invariant(const ReplayGatedDeltaRuleParams&, const ReplayShape&) const override { return true; }
  bool is_batch_invariant(const MaterializeStateParams&, const ReplayShape&) const override { return true; }
  bool is_batch_invariant(const CopySlotsParams&, const SlotsShape&) const override { return true; }
  bool is_batch_invariant(const StoreKvParams&, const KvShape&) const override { return true; }

  void run(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const override {
    Inputs inputs(p, s);
    const double scale = p.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.K)));
    const int32_t* cu = p.cu_seqlens.const_data_ptr<int32_t>();
    const int32_t* table = p.state_indices.const_data_ptr<int32_t>();
    const int32_t* write = p.write_indices.value_or(p.state_indices).const_data_ptr<int32_t>();
    for (int64_t n = 0; n < s.N; ++n) {
      const int64_t column = p.num_accepted ? p.num_accepted->const_data_ptr<int32_t>()[n] - 1 : 0;
      const int32_t read_slot = table[n * s.L + column];
      for (int64_t h = 0; h < s.HV; ++h) {
        HeadTokens x = inputs.head(cu[n], cu[n + 1], h);
        if (read_slot != kPadSlot) {
          Matrix S = read_state(p.state, read_slot, h);
          for (int64_t t = 0; t < x.o.rows; ++t) {
            reference::step(x, t, scale, S);
            if (p.num_accepted) write_state(S, p.state, table[n * s.L + t], h);
          }
          if (!p.num_accepted) write_state(S, p.state, write[n], h);
        }
        inputs.write_outputs(x, cu[n], h);
      }
    }
    p.out.copy_(inputs.out());
  }

  void run(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const override {
    Inputs inputs(p, s);
    const double scale = p.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.K)));
    const int32_t* cu = p.cu_seqlens.const_data_ptr<int32_t>();
    const int32_t* read = p.state_indices.const_data_ptr<int32_t>();
    const int32_t* write = p.write_indices.value_or(p.state_indices).const_data_ptr<int32_t>();
    const int32_t* offsets = p.chunk_offsets.const_data_ptr<int32_t>();
    const int32_t* chunks = p.chunk_indices.const_data_ptr<int32_t>();
    for (int64_t n = 0; n < s.N; ++n) {
      const bool has_initial = !p.has_initial_state || p.has_initial_state->const_data_ptr<bool>()[n];
      for (int64_t h = 0; h < s.HV; ++h) {
        HeadTokens x = inputs.head(cu[n], cu[n + 1], h);
        if (read[n] != kPadSlot) {
          Matrix S = has_initial ? read_state(p.state, read[n], h) : Matrix(s.V, s.K);
          for (int64_t row = offsets[n]; row < offsets[n + 1]; ++row) {
            const int64_t begin = chunks[2 * row + 1] * kChunkSize;
            reference::chunk(x, begin, std::min(begin + kChunkSize, x.o.rows), scale, S);
          }
          write_state(S, p.state, write[n], h);
        }
        inputs.write_outputs(x, cu[n], h);
      }
    }
    p.out.copy_(inputs.out());
  }

  void run(const ReplayGatedDeltaRuleParams& p, const ReplayShape& shape) const override {
    const GdnShape& s = shape.rule;
    Inputs inputs(p, s);
    const double scale = p.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.K)));
    const int64_t C = p.chunk_size;
    const double largest = p.state.scalar_type() == at::kFloat ? 0x1.fffffep127 : 0x1.fep127;
    const int32_t* cu = p.cu_seqlens.const_data_ptr<int32_t>();
    const int32_t* read = p.state_indices.const_data_ptr<int32_t>();
    const int32_t* write = p.write_indices.value_or(p.state_indices).const_data_ptr<int32_t>();
    const int32_t* rings = p.ring_indices.const_data_ptr<int32_t>();
    const int32_t* written_rings = p.ring_write_indices.value_or(p.ring_indices).const_data_ptr<int32_t>();
    for (int64_t n = 0; n < s.N; ++n) {
      const bool has_initial = !p.has_initial_state || p.has_initial_state->const_data_ptr<bool>()[n];
      int64_t length = 0;
      if (read[n] != kPadSlot && has_initial) {
        length = p.ring.length.const_data_ptr<int32_t>()[rings[n]];
        if (p.num_accepted) length += p.num_accepted->const_data_ptr<int32_t>()[n];
      }
      const bool is_written = read[n] != kPadSlot && write[n] != kPadSlot && written_rings[n] != kPadSlot;
      std::vector<ReplayHead> heads;  // all are read before one is written: value heads share the ring's keys
      for (int64_t h = 0; h < s.HV && read[n] != kPadSlot; ++h) {
        heads.push_back({.S = has_initial ? read_state(p.state, read[n], h) : Matrix(s.V, s.K), .ring = {}});
        read_ring(p.ring, rings[n], h, h / (s.HV / s.H), length, heads.back());
      }
      for (int64_t h = 0; h < s.HV; ++h) {
        HeadTokens x = inputs.head(cu[n], cu[n + 1], h);
        if (read[n] != kPadSlot) {
          ReplayHead& head = heads[static_cast<size_t>(h)];
          const bool is_folded = replay(x, scale, C, p.commit, largest, head);
          if (is_written && (is_folded || !has_initial || write[n] != read[n]))
            write_state(head.S, p.state, write[n], h);
          if (is_written) write_ring(head, p.ring, written_rings[n], h, h / (s.HV / s.H));
        }
        inputs.write_outputs(x, cu[n], h);
      }
      if (!is_written) continue;
      if (p.commit) length += cu[n + 1] - cu[n];
      p.ring.length.mutable_data_ptr<int32_t>()[written_rings[n]] = static_cast<int32_t>(length % C);
    }
    p.out.copy_(inputs.out());
  }

  void run(const MaterializeStateParams& p, const ReplayShape& shape) const override {
    const GdnShape& s = shape.rule;
    const int32_t* read = p.state_indices.const_data_ptr<int32_t>();
    const int32_t* write = p.write_indices.const_data_ptr<int32_t>();
    for (int64_t n = 0; n < s.N; ++n) {
      if (read[n] == kPadSlot || write[n] == kPadSlot) continue;
      const int64_t length = p.lengths.const_data_ptr<int32_t>()[n];
      for (int64_t h = 0; h < s.HV; ++h) {
        ReplayHead head{.S = read_state(p.state, read[n], h), .ring = {}};
        read_ring(p.ring, p.ring_indices.const_data_ptr<int32_t>()[n], h, h / (s.HV / s.H), length, head);
        write_state(head.state_after(length), p.state, write[n], h);
      }
    }
  }

  void run(const CopySlotsParams& p, const SlotsShape& s) const override {
    const int32_t* from = p.from_indices.const_data_ptr<int32_t>();
    const int32_t* to = p.to_indices.const_data_ptr<int32_t>();
    for (int64_t n = 0; n < s.N; ++n) {
      if (from[n] == kPadSlot || to[n] == kPadSlot) continue;
      for (const at::Tensor& pool : p.pools) pool.select(0, to[n]).copy_(pool.select(0, from[n]));
    }
  }

  void run(const StoreKvParams& p, const KvShape& s) const override {
    const int32_t* rows = p.slot_mapping.const_data_ptr<int32_t>();
    for (const auto& [cache, tokens] : {std::pair{p.k_cache, p.k}, std::pair{p.v_cache, p.v}}) {
      const at::Tensor stored = aten::cache_rows(tokens, cache.scalar_type());
      for (int64_t t = 0; t < s.T; ++t) {
        if (rows[t] == kPadSlot) continue;
        cache.select(0, rows[t] / s.B).select(0, rows[t] % s.B).copy_(stored.select(0, t));
      }
    }
  }
};

}  // namespace

const Backend* reference_backend() {
  static const ReferenceBackend backend;
  return &backend;
}

}  // namespace xgdn::kernel
