// SPDX-License-Identifier: Apache-2.0
// The two gated delta rule ops as the vendor documents them, in plain loops and fp32. One token of a value head, which
// reads key head h / (Nv / Nk):
//   S <- exp(g) S,   S <- S + beta (v - S k) k^T,   out = S (scale q)
//
// recurrent: sequence n with accepted tokens a starts from state[indices[first + a - 1]] and leaves its state after its
//   token t in state[indices[first + t]].
// chunk: sequence n starts from initial[n] and leaves final[n].
//
// Switches: STRICT=0 lifts the documented limits; FP32_STATE=1 is a newer CANN (fp32 state and head dims up to 512 in
// the recurrent op, any up to 128 in the chunk op); LENGTHS=bplus1 is a custom op package in the recurrent op's place,
// with other lengths, types and limits (run_custom_package); CHUNK_BROKEN=1 is a CANN whose
// chunk op refuses every call; SOC=Ascend950.. takes an fp32 state in the chunk op.
#include <ATen/ops/from_blob.h>

#include <cmath>
#include <vector>

#include "checks.h"
#include "op.h"

namespace emulated_cann {
namespace {

bool newer_cann() {
  return is_on("FP32_STATE");
}
bool custom_package() {
  return setting("LENGTHS") == "bplus1";
}

// Rows, heads and head dims, which every tensor must agree on.
struct Sizes {
  int64_t T, Nk, Nv, Dk, Dv;
};

struct ShapeCheck {
  int status;

  void operator()(const char* name, const OptionalTensor& t, at::IntArrayRef expected) const {
    if (!t) return;
    require(t->sizes() == expected, status, name, ": expected shape ", expected, ", got ", t->sizes());
    require(t->numel() > 0, status, name, " not support empty tensor, got ", t->sizes());
  }
};

Sizes sizes_of(const Tensor& query, const Tensor& value, int status) {
  require(query.dim() == 3, status, "The number of dimensions of query should be 3, but it is ", query.dim(), ".");
  require(value.dim() == 3, status, "The number of dimensions of value should be 3, but it is ", value.dim(), ".");
  return {query.size(0), query.size(1), value.size(1), query.size(2), value.size(2)};
}

void check_limit(const char* name, int64_t value, int64_t most, int status) {
  require(value > 0 && value <= most, status, name, " should be greater than 0 and less than or equal to ", most,
          ", but ", name, " is ", value, ".");
}

void check_inputs(const ShapeCheck& check, const Sizes& s, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& beta, const OptionalTensor& g, const Tensor& out) {
  check("query", query, {s.T, s.Nk, s.Dk});
  check("key", key, {s.T, s.Nk, s.Dk});
  check("value", value, {s.T, s.Nv, s.Dv});
  check("beta", beta, {s.T, s.Nv});
  check("g", g, {s.T, s.Nv});
  check("out", out, {s.T, s.Nv, s.Dv});
  require(s.Nv % s.Nk == 0, check.status, "Nv should be an integer multiple of Nk, but Nv is ", s.Nv, ", Nk is ", s.Nk,
          ".");
  check_type("query", query, {at::kBFloat16});
  check_type("key", key, {at::kBFloat16});
  check_type("value", value, {at::kBFloat16});
  check_type("beta", beta, {at::kBFloat16});
  check_type("g", g, {at::kFloat});
  check_type("out", out, {at::kBFloat16});
}

// Each sequence's first token and length.
struct Piece {
  int64_t first, length;
};

std::vector<Piece> pieces_of(const Tensor& lengths, int64_t num_tokens, int64_t least, int64_t most) {
  const Tensor host = lengths.contiguous();
  std::vector<Piece> pieces;
  int64_t first = 0;
  for (int64_t n = 0; n < host.numel(); ++n) {
    const int64_t length = host.const_data_ptr<int32_t>()[n];
    require_value(length >= least && length <= most,
                  c10::str("actual_seq_lengths[", n, "]: expected ", least, "..", most, ", got ", length));
    pieces.push_back({first, length});
    first += length;
  }
  require_value(first == num_tokens, c10::str("actual_seq_lengths: expected a sum of T=", num_tokens, ", got ", first));
  return pieces;
}

void require_range(const char* name, const Tensor& t, double least, double most) {
  const double low = t.min().item<double>();
  const double high = t.max().item<double>();
  require_value(low >= least && high <= most,
                c10::str(name, ": expected values in [", least, ", ", most, "], got [", low, ", ", high, "]"));
}

void check_values(const Tensor& query, const Tensor& key, const Tensor& beta, const OptionalTensor& g) {
  require_range("query", query, -1.0, 1.0);
  require_range("key", key, -1.0, 1.0);
  require_range("beta", beta, 0.0, 1.0);
  if (g) require_range("g", *g, -INFINITY, 0.0);
}

// The operands of both ops in fp32, with the strides resolved.
struct Operands {
  Sizes s;
  Tensor q, k, v, beta, g, gk;  // contiguous, fp32; g and gk may be undefined
  float scale;
  Tensor out;

  // Advances S [Dv, Dk] of value head h by token t and writes the token's row of the output.
  void step(int64_t t, int64_t h, std::vector<float>& S) const {
    const int64_t row = t * s.Nv + h;
    const int64_t key_row = t * s.Nk + h / (s.Nv / s.Nk);
    const float* const q_row = q.const_data_ptr<float>() + key_row * s.Dk;
    const float* const k_row = k.const_data_ptr<float>() + key_row * s.Dk;
    const float* const v_row = v.const_data_ptr<float>() + row * s.Dv;
    const float* const gk_row = gk.defined() ? gk.const_data_ptr<float>() + row * s.Dk : nullptr;
    const float alpha = g.defined() ? std::exp(g.const_data_ptr<float>()[row]) : 1.0F;
    const float strength = beta.const_data_ptr<float>()[row];
    std::vector<float> read(static_cast<size_t>(s.Dv));
    for (int64_t i = 0; i < s.Dv; ++i) {
      float* const S_row = S.data() + i * s.Dk;
      float predicted = 0.0F;
      for (int64_t j = 0; j < s.Dk; ++j) {
        S_row[j] *= gk_row == nullptr ? alpha : alpha * std::exp(gk_row[j]);
        predicted += S_row[j] * k_row[j];
      }
      const float u = strength * (v_row[i] - predicted);
      float sum = 0.0F;
      for (int64_t j = 0; j < s.Dk; ++j) {
        S_row[j] += u * k_row[j];
        sum += S_row[j] * (scale * q_row[j]);
      }
      read[i] = sum;
    }
    out.select(0, t).select(0, h).copy_(at::from_blob(read.data(), {s.Dv}, at::kFloat));
  }
};

Tensor wide(const Tensor& t) {
  return t.to(at::kFloat).contiguous();
}
Tensor wide(const OptionalTensor& t) {
  return t ? wide(*t) : Tensor();
}

// One head's state, from and to a [Dv, Dk] view.
std::vector<float> load(const Tensor& head) {
  const Tensor values = wide(head);
  return {values.const_data_ptr<float>(), values.const_data_ptr<float>() + values.numel()};
}
void store(const Tensor& head, std::vector<float>& S) {
  head.copy_(at::from_blob(S.data(), head.sizes(), at::kFloat));
}

void check_recurrent(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& beta,
                     const Tensor& state, const Tensor& lengths, const Tensor& indices, const OptionalTensor& g,
                     const OptionalTensor& gk, const OptionalTensor& accepted, float, const Tensor& out) {
  const Sizes s = sizes_of(query, value, kInvalidParameter);
  const ShapeCheck check{kInvalidParameter};
  check_inputs(check, s, query, key, value, beta, g, out);
  require(state.dim() == 4, kInvalidParameter, "The number of dimensions of state should be 4, but it is ", state.dim(),
          ".");
  check("state", state, {state.size(0), s.Nv, s.Dv, s.Dk});
  require(lengths.dim() == 1, kInvalidParameter,
          "The number of dimensions of actual_seq_lengths should be 1, but it is ", lengths.dim(), ".");
  const int64_t batch = lengths.size(0) - (custom_package() ? 1 : 0);
  require(batch > 0, kInvalidParameter, "B should greater than 0, but B is ", batch, ".");
  check("ssm_state_indices", indices, {s.T});
  check("gk", gk, {s.T, s.Nv, s.Dk});
  if (!custom_package()) check("num_accepted_tokens", accepted, {batch});
  if (newer_cann() || custom_package()) {
    check_type("state", state, {at::kBFloat16, at::kFloat});
  } else {
    check_type("state", state, {at::kBFloat16});
  }
  check_type("actual_seq_lengths", lengths, {at::kInt});
  check_type("ssm_state_indices", indices, {at::kInt});
  check_type("gk", gk, {at::kFloat});
  check_type("num_accepted_tokens", accepted, {at::kInt});
  require(state.stride(3) == 1 && state.stride(2) == s.Dk, kInvalidParameter,
          "state: only dimensions 0 and 1 may be non-contiguous, got strides ", state.strides());
  if (!strict()) return;
  check_limit("Nk", s.Nk, 256, kInvalidParameter);
  check_limit("Nv", s.Nv, 256, kInvalidParameter);
  const int64_t most = newer_cann() || custom_package() ? 512 : 256;
  check_limit("Dk", s.Dk, most, kInvalidParameter);
  check_limit("Dv", s.Dv, most, kInvalidParameter);
  if (custom_package()) return;
  require(accepted.has_value(), kNullPointer, "expected a tensor num_accepted_tokens, got nullptr");
  require(state.size(0) >= s.T, kInvalidParameter,
          "BlockNum should be greater than or equal to T, Current values: BlockNum=", state.size(0), ", T=", s.T, ".");
}

// The slots that a sequence reads and writes.
class SlotTable {
 public:
  SlotTable(const Tensor& indices, const OptionalTensor& accepted, int64_t num_blocks)
      : indices_(indices.contiguous()), num_blocks_(num_blocks) {
    if (accepted) accepted_ = accepted->contiguous();
  }

  int64_t written(int64_t token) const {
    const int64_t slot = indices_.const_data_ptr<int32_t>()[token];
    require_value(slot >= 0 && slot < num_blocks_,
                  c10::str("ssm_state_indices[", token, "]: expected 0..", num_blocks_ - 1, ", got ", slot));
    return slot;
  }

  int64_t accepted(int64_t n) const { return accepted_.defined() ? accepted_.const_data_ptr<int32_t>()[n] : 1; }

  int64_t read(int64_t n, const Piece& piece) const {
    const int64_t count = accepted(n);
    require_value(count >= 1 && count <= piece.length,
                  c10::str("num_accepted_tokens[", n, "]: expected 1..", piece.length, ", got ", count));
    return written(piece.first + count - 1);
  }

 private:
  Tensor indices_;
  Tensor accepted_;
  int64_t num_blocks_;
};

void advance(const Operands& operands, const Tensor& state, const SlotTable& slots, const std::vector<Piece>& pieces) {
  for (size_t n = 0; n < pieces.size(); ++n) {
    const Piece& piece = pieces[n];
    if (piece.length == 0) continue;
    const int64_t from = slots.read(static_cast<int64_t>(n), piece);
    for (int64_t h = 0; h < operands.s.Nv; ++h) {
      std::vector<float> S = load(state.select(0, from).select(0, h));
      for (int64_t t = piece.first; t < piece.first + piece.length; ++t) {
        operands.step(t, h, S);
        store(state.select(0, slots.written(t)).select(0, h), S);
      }
    }
  }
}

// The custom package's meaning of lengths: [first token, L1..LB]. It skips empty sequences, and returns in silence at
// the first whose length or accepted tokens it cannot take.
void run_custom_package(const Operands& operands, const Tensor& state, const SlotTable& slots, const Tensor& lengths) {
  constexpr int64_t kMostTokens = 16;
  const Tensor host = lengths.contiguous();
  std::vector<Piece> pieces;
  int64_t first = host.const_data_ptr<int32_t>()[0];
  for (int64_t n = 0; n + 1 < host.numel(); ++n) {
    const int64_t length = std::max(host.const_data_ptr<int32_t>()[n + 1], 0);
    const bool is_inside = first >= 0 && first + length <= operands.s.T;
    const bool is_accepted = slots.accepted(n) >= 1 && slots.accepted(n) <= length;
    if (length > kMostTokens || (length > 0 && !(is_inside && is_accepted))) break;
    pieces.push_back({first, length});
    first += length;
  }
  advance(operands, state, slots, pieces);
}

void run_recurrent(Tensor query, Tensor key, Tensor value, Tensor beta, Tensor state, Tensor lengths, Tensor indices,
                   OptionalTensor g, OptionalTensor gk, OptionalTensor accepted, float scale, Tensor out) {
  const Operands operands{sizes_of(query, value, kInvalidParameter),
                          wide(query),
                          wide(key),
                          wide(value),
                          wide(beta),
                          wide(g),
                          wide(gk),
                          scale,
                          out};
  const SlotTable slots(indices, accepted, state.size(0));
  if (custom_package()) return run_custom_package(operands, state, slots, lengths);
  const int64_t T = operands.s.T;
  const auto pieces = strict() ? pieces_of(lengths, T, 1, 8) : pieces_of(lengths, T, 0, T);
  if (strict()) check_values(query, key, beta, g);
  advance(operands, state, slots, pieces);
}

void check_chunk(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& beta, const Tensor& initial,
                 const Tensor& lengths, float, const OptionalTensor& g, const Tensor& out, const Tensor& final_state) {
  require(!is_on("CHUNK_BROKEN"), kInvalidParameter, "this CANN's chunk op does not work, as CHUNK_BROKEN asks");
  const Sizes s = sizes_of(query, value, kTilingError);
  const ShapeCheck check{kTilingError};
  check_inputs(check, s, query, key, value, beta, g, out);
  require(lengths.dim() == 1, kTilingError, "The number of dimensions of actual_seq_lengths should be 1, but it is ",
          lengths.dim(), ".");
  const int64_t batch = lengths.size(0);
  require(batch > 0, kTilingError, "B should greater than 0, but B is ", batch, ".");
  check("initial_state", initial, {batch, s.Nv, s.Dv, s.Dk});
  check("final_state", final_state, {batch, s.Nv, s.Dv, s.Dk});
  check_type("actual_seq_lengths", lengths, {at::kInt});
  for (const auto& [name, state] : {std::pair{"initial_state", initial}, std::pair{"final_state", final_state}}) {
    if (is_ascend950()) {
      check_type(name, state, {at::kBFloat16, at::kFloat});
    } else {
      check_type(name, state, {at::kBFloat16});
    }
  }
  require(out.is_contiguous() && final_state.is_contiguous(), kInvalidParameter,
          "out and final_state: expected contiguous tensors, got strides ", out.strides(), " and ",
          final_state.strides());
  if (!strict()) return;
  check_limit("Nk", s.Nk, 64, kTilingError);
  check_limit("Nv", s.Nv, 64, kTilingError);
  check_limit("Dk", s.Dk, 128, kTilingError);
  check_limit("Dv", s.Dv, 128, kTilingError);
  require(newer_cann() || (s.Dk == 128 && s.Dv == 128), kTilingError, "Dk and Dv should be 128, but Dk is ", s.Dk,
          ", Dv is ", s.Dv, ".");
}

void run_chunk(Tensor query, Tensor key, Tensor value, Tensor beta, Tensor initial, Tensor lengths, float scale,
               OptionalTensor g, Tensor out, Tensor final_state) {
  const Operands operands{sizes_of(query, value, kTilingError),
                          wide(query),
                          wide(key),
                          wide(value),
                          wide(beta),
                          wide(g),
                          Tensor(),
                          scale,
                          out};
  const auto pieces = pieces_of(lengths, operands.s.T, 0, operands.s.T);
  if (strict()) check_values(query, key, beta, g);
  for (size_t n = 0; n < pieces.size(); ++n) {
    const auto sequence = static_cast<int64_t>(n);
    for (int64_t h = 0; h < operands.s.Nv; ++h) {
      std::vector<float> S = load(initial.select(0, sequence).select(0, h));
      for (int64_t t = pieces[n].first; t < pieces[n].first + pieces[n].length; ++t) operands.step(t, h, S);
      store(final_state.select(0, sequence).select(0, h), S);
    }
  }
}

}  // namespace
}  // namespace emulated_cann

ACLNN_CHECKED(RecurrentGatedDeltaRule, check_recurrent, run_recurrent)
ACLNN_CHECKED(ChunkGatedDeltaRule, check_chunk, run_chunk)
