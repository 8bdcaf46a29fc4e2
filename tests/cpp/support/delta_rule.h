// SPDX-License-Identifier: Apache-2.0
// Inputs of a delta-rule call and its truth: the token recurrence in double, as plain loops.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "tests/cpp/support/compare.h"

namespace xgdn::testing {

struct Case {
  std::vector<int64_t> lengths;
  int64_t H = 1;
  int64_t HV = 2;
  int64_t K = 64;
  int64_t V = 64;
  double lowest_gate = -0.5;
};

inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  for (int64_t length : c.lengths) out << length << '+';
  return out << " H" << c.H << " HV" << c.HV << " K" << c.K << " V" << c.V << " g" << c.lowest_gate;
}

/// Slot n + 1 belongs to sequence n; the slots around them and `out` are NaN.
struct DeltaRule {
  Case c;
  at::Tensor q, k, v, g, beta, state, before, cu_seqlens, slots, out;

  DeltaRule(const Case& which, at::ScalarType dtype, at::ScalarType state_dtype) : c(which) {
    std::vector<int32_t> ends{0}, names;
    for (int64_t length : c.lengths) {
      ends.push_back(ends.back() + static_cast<int32_t>(length));
      names.push_back(static_cast<int32_t>(names.size()) + 1);
    }
    const int64_t T = ends.back();
    const int64_t N = static_cast<int64_t>(c.lengths.size());
    q = at::randn({T, c.H, c.K}).to(dtype);
    k = at::randn({T, c.H, c.K}).to(dtype);
    v = at::randn({T, c.HV, c.V}).to(dtype);
    g = at::rand({T, c.HV}) * c.lowest_gate;
    beta = at::rand({T, c.HV});
    state = at::full({N + 2, c.HV, c.V, c.K}, kNaN).to(state_dtype);
    state.narrow(0, 1, N).copy_(at::randn({N, c.HV, c.V, c.K}));
    before = state.clone();
    cu_seqlens = i32(ends);
    slots = i32(names);
    out = at::full({T, c.HV, c.V}, kNaN).to(dtype);
  }

  /// `terms`: what o would be if nothing cancelled, sums of the magnitudes of what its sums add.
  struct Truth {
    at::Tensor o;      // [T, HV, V]
    at::Tensor S;      // [N, HV, V, K]  final states
    at::Tensor terms;  // [T, HV, V]
  };

  /// The token recurrence, q and k normalised.
  Truth truth() const {
    const at::Tensor Q = normalised(q), Key = normalised(k), value = v.to(at::kDouble), gate = g.to(at::kDouble),
                     rate = beta.to(at::kDouble);
    const int64_t N = static_cast<int64_t>(c.lengths.size());
    const at::Tensor S = before.narrow(0, 1, N).to(at::kDouble).contiguous();
    const at::Tensor o = at::zeros({q.size(0), c.HV, c.V}, at::kDouble), terms = at::zeros_like(o);
    const double scale = 1.0 / std::sqrt(static_cast<double>(c.K));
    int64_t t = 0;
    for (int64_t n = 0; n < N; ++n) {
      for (const int64_t end = t + c.lengths[n]; t < end; ++t) {
        for (int64_t h = 0; h < c.HV; ++h) {
          const int64_t key_head = h / (c.HV / c.H);
          const double* q_row = Q.const_data_ptr<double>() + (t * c.H + key_head) * c.K;
          const double* k_row = Key.const_data_ptr<double>() + (t * c.H + key_head) * c.K;
          const double* v_row = value.const_data_ptr<double>() + (t * c.HV + h) * c.V;
          const double alpha = std::exp(gate.const_data_ptr<double>()[t * c.HV + h]);
          const double b = rate.const_data_ptr<double>()[t * c.HV + h];
          for (int64_t row = 0; row < c.V; ++row) {
            double* s = S.mutable_data_ptr<double>() + ((n * c.HV + h) * c.V + row) * c.K;
            double predicted = 0, read = 0, magnitude = 0;
            for (int64_t i = 0; i < c.K; ++i) predicted += alpha * s[i] * k_row[i];
            const double u = b * (v_row[row] - predicted);
            for (int64_t i = 0; i < c.K; ++i) {
              s[i] = alpha * s[i] + u * k_row[i];
              read += s[i] * q_row[i];
              magnitude += std::abs(s[i] * q_row[i]);
            }
            const int64_t at = (t * c.HV + h) * c.V + row;
            o.mutable_data_ptr<double>()[at] = scale * read;
            terms.mutable_data_ptr<double>()[at] = scale * magnitude;
          }
        }
      }
    }
    return {o, S, terms};
  }

  /// The sequences' slots as the call left them.
  at::Tensor final_states() const { return state.narrow(0, 1, static_cast<int64_t>(c.lengths.size())); }

  bool other_slots_untouched() const {
    const int64_t last = state.size(0) - 1;
    return same_bits(state[0], before[0]) && same_bits(state[last], before[last]);
  }

 private:
  static at::Tensor normalised(const at::Tensor& t) {
    const at::Tensor wide = t.to(at::kDouble);
    return (wide / (wide.square().sum(-1, /*keepdim=*/true) + 1e-6).sqrt()).contiguous();
  }
};

}  // namespace xgdn::testing
