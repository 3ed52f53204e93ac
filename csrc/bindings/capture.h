// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Whether a step can be part of a CUDA graph.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "hyper_table.h"

namespace fusedopt {
namespace {

// Whether a step over these members (by position) is being captured. It is then replayed as it was,
// and what the host knows of it would stay for ever, for which this throws.
bool is_captured(const Works& works, const std::vector<size_t>& active,
                 const std::vector<size_t>& outdated, const std::vector<Member>& members,
                 const std::vector<Entry>& entries, const HyperTable& table) {
  const std::string& optimizer = table.optimizer();
  const auto describe = [&](size_t at) { return optimizer + ": " + members[at].name; };
  std::optional<c10::Device> capturing;
  for (const auto& work : works)
    if (!work.spans.empty() && is_capturing(work.device)) capturing = work.device;
  if (!capturing) return false;
  for (const size_t at : active) {
    const Member& m = members[at];
    if (!table.of(entries[at]).capturable || (entries[at].count != nullptr && !m.on_device))
      throw std::runtime_error(
          describe(at) +
          " is to be stepped in a CUDA graph, which would replay today's step count for ever; "
          "construct " +
          optimizer + " with capturable=True, and a tensor as lr where a scheduler changes it");
    if (m.device != *capturing)
      throw std::runtime_error(describe(at) + " is on " + text(m.device) +
                               " and no part of the CUDA graph that is captured on " +
                               text(*capturing) + "; give it an optimizer of its own");
  }
  for (const size_t at : outdated)
    throw std::runtime_error(describe(at) +
                             " was changed since the last step, which a CUDA graph would find at "
                             "each replay; take a step before capture begins");
  return true;
}

}  // namespace
}  // namespace fusedopt
