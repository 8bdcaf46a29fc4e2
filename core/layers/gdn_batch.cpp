// SPDX-License-Identifier: Apache-2.0
#include "core/layers/gdn_batch.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

namespace xgdn {

void set_lengths(Segment& segment, const at::Tensor& cu_seqlens_cpu) {
  const at::Tensor& t = cu_seqlens_cpu;
  const auto got = [&](const auto& value) { return c10::str(", got ", value); };
  constexpr const char* kExpected = "[Segment] cu_seqlens_cpu: expected ";
  if (t.scalar_type() != at::kInt) throw DtypeError(c10::str(kExpected, "Int", got(c10::toString(t.scalar_type()))));
  if (!t.device().is_cpu()) throw DeviceError(c10::str(kExpected, "a tensor on cpu", got(t.device().str())));
  if (t.dim() != 1 || t.numel() < 1) throw ShapeError(c10::str(kExpected, "[N+1]", got(t.sizes())));
  if (!t.is_contiguous()) throw ShapeError(c10::str(kExpected, "a contiguous tensor", got("strides "), t.strides()));
  kernel::check_storage("Segment", "cu_seqlens_cpu", t);

  const int32_t* cu = t.const_data_ptr<int32_t>();
  if (cu[0] != 0) throw RangeError(c10::str(kExpected, "to start at 0", got(cu[0])));
  segment.host.max_len = 1;
  for (int64_t n = 0; n + 1 < t.numel(); ++n) {
    if (cu[n + 1] < cu[n]) {
      throw RangeError(c10::str(kExpected, "values that never fall (", cu[n], " before)", got(cu[n + 1])));
    }
    segment.host.max_len = std::max<int64_t>(segment.host.max_len, cu[n + 1] - cu[n]);
  }
  segment.num_tokens = cu[t.numel() - 1];
  segment.host.cu_seqlens = t;
  segment.cu_seqlens = t.to(segment.state_slots.read.device());
}

GdnBatch join(std::vector<Segment> segments) {
  GdnBatch batch{.segments = std::move(segments)};
  for (const Segment& segment : batch.segments) batch.num_tokens += segment.num_tokens;
  return batch;
}

}  // namespace xgdn
