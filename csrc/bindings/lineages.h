// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Parameters that have taken the same steps, where only the device knows how many.
#pragma once

#include <vector>

namespace fusedopt {
namespace {

class Lineages {
 public:
  bool empty() const { return lineages_.empty(); }

  // Another parameter of a lineage.
  void add(int lineage) {
    if (lineages_.size() <= size_t(lineage)) lineages_.resize(lineage + 1, {0, 0});
    ++lineages_[lineage].members;
  }

  // The lineages of those parameters that took a step. Where not all of a lineage did, those that
  // did are a lineage of their own from now on.
  void part(const std::vector<int*>& stepped) {
    for (const int* lineage : stepped) ++lineages_[*lineage].stepped;
    const size_t before = lineages_.size();
    std::vector<int> successor(before, -1);
    for (int* lineage : stepped) {
      const Lineage from = lineages_[*lineage];
      if (from.stepped == from.members) continue;
      int& to = successor[*lineage];
      if (to < 0) {
        to = int(lineages_.size());
        lineages_.push_back({from.stepped, 0});
      }
      *lineage = to;
    }
    for (size_t i = 0; i < before; ++i) {
      if (successor[i] >= 0) lineages_[i].members -= lineages_[i].stepped;
      lineages_[i].stepped = 0;
    }
  }

 private:
  struct Lineage {
    int members, stepped;
  };

  std::vector<Lineage> lineages_;
};

}  // namespace
}  // namespace fusedopt
