// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Whether parameters to be stepped, some of which were given other memory, may overlap now.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "member.h"

namespace fusedopt {
namespace {

// Looks at where they begin and end; whether those with gaps do overlap, Python finds out when
// another plan is made.
bool may_overlap(const std::vector<size_t>& active, const std::vector<Entry>& entries) {
  std::vector<std::pair<const char*, const char*>> extents;
  for (const size_t at : active) {
    if (entries[at].span.numel == 0) continue;
    const at::Tensor& local = THPVariable_Unpack(entries[at].local);
    int64_t last = 0;
    for (int64_t d = 0; d < local.dim(); ++d) last += (local.size(d) - 1) * local.stride(d);
    const char* const begin = static_cast<const char*>(local.unsafeGetTensorImpl()->data());
    extents.emplace_back(begin, begin + (last + 1) * int64_t(local.element_size()));
  }
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i)
    if (extents[i].first < extents[i - 1].second) return true;
  return false;
}

}  // namespace
}  // namespace fusedopt
