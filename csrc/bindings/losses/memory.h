// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Memory for gradients as large as logits.
#pragma once

#include "../torch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusedopt {
namespace {

// Large memory is new to the process each time, and its first use a page fault for each 4 KB of it,
// which takes longer than a loss. Where the system lets programs ask for them, pages of 2 MB are
// asked for; that it may refuse makes no other difference.
at::Tensor on_large_pages(const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (!fresh.is_cpu() || fresh.nbytes() < 2 * kPage) return fresh;
  const auto first = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + fresh.nbytes()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return fresh;
}

}  // namespace
}  // namespace fusedopt
