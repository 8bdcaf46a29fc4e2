// SPDX-License-Identifier: Apache-2.0
// One value head of one sequence, in double: the recurrence and its chunk form, as in docs/gated_delta_rule.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace xgdn::kernel::reference {

/// Row-major [rows, cols].
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<double> values;

  Matrix(int64_t r, int64_t c) : rows(r), cols(c), values(static_cast<size_t>(r * c), 0.0) {}
  double* operator[](int64_t r) { return values.data() + r * cols; }
  const double* operator[](int64_t r) const { return values.data() + r * cols; }
};

inline double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

/// The tokens of a sequence for one value head. q, k: [len, K]; v, o: [len, V]; g, beta: [len].
struct HeadTokens {
  Matrix q, k, v, o;
  std::vector<double> g, beta;

  HeadTokens(int64_t len, int64_t K, int64_t V) : q(len, K), k(len, K), v(len, V), o(len, V), g(len), beta(len) {}
};

/// Token t of the recurrence: u = beta (v - alpha S k), S <- alpha S + u k^T, o = scale S q.
inline void step(HeadTokens& x, int64_t t, double scale, Matrix& S) {
  const double alpha = std::exp(x.g[t]);
  for (int64_t row = 0; row < S.rows; ++row) {
    double* s = S[row];
    const double u = x.beta[t] * (x.v[t][row] - alpha * dot(s, x.k[t], S.cols));
    for (int64_t c = 0; c < S.cols; ++c) s[c] = alpha * s[c] + u * x.k[t][c];
    x.o[t][row] = scale * dot(s, x.q[t], S.cols);
  }
}

/// Tokens [begin, end) as one chunk. With G_i the sum of g over the chunk up to i and D_ij = exp(G_i - G_j), j <= i:
///   (I + A) u = beta (v - exp(G) S k),  A_ij = beta_i D_ij (k_i . k_j), j < i     forward substitution
///   o_i = scale (exp(G_i) S q_i + sum_{j <= i} D_ij (q_i . k_j) u_j)
///   S  <- exp(G_last) S + sum_j D_last,j u_j k_j^T
/// Only differences of G with j <= i are exponentiated, so nothing overflows.
inline void chunk(HeadTokens& x, int64_t begin, int64_t end, double scale, Matrix& S) {
  const int64_t len = end - begin;
  std::vector<double> G(static_cast<size_t>(len));
  double total = 0;
  for (int64_t i = 0; i < len; ++i) G[i] = total += x.g[begin + i];

  Matrix u(len, S.rows);
  for (int64_t i = 0; i < len; ++i) {
    const int64_t t = begin + i;
    for (int64_t row = 0; row < S.rows; ++row) {
      u[i][row] = x.beta[t] * (x.v[t][row] - std::exp(G[i]) * dot(S[row], x.k[t], S.cols));
    }
    for (int64_t j = 0; j < i; ++j) {
      const double a = x.beta[t] * std::exp(G[i] - G[j]) * dot(x.k[t], x.k[begin + j], S.cols);
      for (int64_t row = 0; row < S.rows; ++row) u[i][row] -= a * u[j][row];
    }
  }
  for (int64_t i = 0; i < len; ++i) {
    const int64_t t = begin + i;
    for (int64_t row = 0; row < S.rows; ++row) x.o[t][row] = scale * std::exp(G[i]) * dot(S[row], x.q[t], S.cols);
    for (int64_t j = 0; j <= i; ++j) {
      const double a = scale * std::exp(G[i] - G[j]) * dot(x.q[t], x.k[begin + j], S.cols);
      for (int64_t row = 0; row < S.rows; ++row) x.o[t][row] += a * u[j][row];
    }
  }
  for (int64_t row = 0; row < S.rows; ++row) {
    for (int64_t c = 0; c < S.cols; ++c) {
      double s = std::exp(total) * S[row][c];
      for (int64_t j = 0; j < len; ++j) s += std::exp(total - G[j]) * u[j][row] * x.k[begin + j][c];
      S[row][c] = s;
    }
  }
}

/// A value head of a sequence on a replay state: S after the last fold, and the tokens since then.
struct ReplayHead {
  struct Row {
    std::vector<double> k, u;
    double G;
  };
  Matrix S;
  std::vector<Row> ring;

  /// The state after the first `count` tokens of the ring.
  Matrix state_after(int64_t count) const {
    Matrix after = S;
    if (count == 0) return after;
    const double total = ring[count - 1].G;
    for (int64_t row = 0; row < S.rows; ++row) {
      for (int64_t c = 0; c < S.cols; ++c) {
        double s = std::exp(total) * S[row][c];
        for (int64_t j = 0; j < count; ++j) s += std::exp(total - ring[j].G) * ring[j].u[row] * ring[j].k[c];
        after[row][c] = s;
      }
    }
    return after;
  }

  /// Puts the first `count` tokens into S.
  void fold(int64_t count) {
    S = state_after(count);
    ring.erase(ring.begin(), ring.begin() + count);
  }

  /// Token t of x: steps `now`, the state after the ring, and appends a row whose G starts anew where `is_first`.
  void append(HeadTokens& x, int64_t t, double scale, bool is_first, Matrix& now) {
    Row row{.k = std::vector<double>(x.k[t], x.k[t] + S.cols), .u = {}, .G = x.g[t]};
    for (int64_t v = 0; v < S.rows; ++v) {
      row.u.push_back(x.beta[t] * (x.v[t][v] - std::exp(x.g[t]) * dot(now[v], x.k[t], S.cols)));
    }
    if (!is_first) row.G += ring.back().G;
    step(x, t, scale, now);
    ring.push_back(std::move(row));
  }
};

}  // namespace xgdn::kernel::reference
