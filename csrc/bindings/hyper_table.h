// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Rows of hyper-parameters: one for each (group, step count).
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "member.h"
#include "options.h"

namespace fusedopt {
namespace {

// A row, to be found again by the group's next parameter.
struct CachedRow {
  const void* work;
  float taken;
  NumberValues numbers;  // with the host
  bool first, float64;
  int lineage;
  int index;
};

// One parameter group.
struct Group {
  const RuleInfo* rule;
  int variant;  // among all variants of all rules
  bool capturable;
  size_t size;    // members
  bool measures;  // them, before they are stepped
  GroupOptions options;
  std::vector<CachedRow> rows;  // of the step at hand
  uint64_t read_in = 0;         // the step in which the options were last read

  const VariantInfo& variant_info() const { return registry().variants[variant]; }
};

class HyperTable {
 public:
  explicit HyperTable(std::string optimizer) : optimizer_(std::move(optimizer)) {}

  void add_group(const RuleInfo& rule, const py::dict& group, bool capturable) {
    Group added{&rule, 0, capturable, 0, false, {}, {}};
    OptionReader::of(rule).read(optimizer_, group.ptr(), groups_.size(), added.options);
    added.measures = rule.measures(added.options.values.data());
    added.variant = rule.first_variant + rule.variant(added.options.values.data());
    groups_.push_back(std::move(added));
  }

  const std::string& optimizer() const { return optimizer_; }
  std::vector<Group>& groups() { return groups_; }
  const std::vector<Group>& groups() const { return groups_; }
  const Group& of(const Entry& e) const { return groups_[e.group]; }

  bool measures() const {
    for (const Group& group : groups_)
      if (group.measures) return true;
    return false;
  }

  void begin_step(bool device_counts) {
    ++step_;
    rows_on_device_ = device_counts;
  }

  // Reads a group's options, once in a step; false where they ask for other states, or for
  // parameters to be measured that were not.
  bool read(PyObject* group, size_t g) {
    Group& of = groups_[g];
    if (of.read_in == step_) return true;
    of.read_in = step_;
    OptionReader::of(*of.rule).read(optimizer_, group, g, of.options);
    rows_on_device_ = rows_on_device_ || of.options.any_on_device;
    of.rows.clear();
    if (of.rule->measures(of.options.values.data()) != of.measures) return false;
    return of.rule->first_variant + of.rule->variant(of.options.values.data()) == of.variant;
  }

  // A device makes all of its rows, or none.
  bool makes_rows(c10::Device device) const {
    return rows_on_device_ && device.type() == kAccelerator;
  }

  // The row for a parameter's group and step count.
  int row(const Entry& e, DeviceWork& work) {
    const float taken = e.count == nullptr || e.device_counts ? 0 : *e.count;
    const bool first = e.device_counts || e.first;
    const int lineage = e.device_counts ? e.lineage : -1;
    const bool host_has_numbers = e.numbers != nullptr && !e.device_counts;
    const NumberValues numbers = host_has_numbers ? e.numbers->values() : NumberValues{};
    Group& group = groups_[e.group];
    auto& cached = group.rows;
    // A group's parameters have few step counts, and those of the last ones most likely.
    constexpr int kMostLookedAt = 8;
    for (auto it = cached.rbegin(); it != cached.rend() && it - cached.rbegin() < kMostLookedAt;
         ++it)
      if (it->taken == taken && it->lineage == lineage && it->first == first &&
          it->float64 == e.float64 && it->work == &work && it->numbers == numbers)
        return it->index;
    const int index = make_row(e, group, taken, numbers, first, work);
    cached.push_back({&work, taken, numbers, first, e.float64, lineage, index});
    return index;
  }

 private:
  int make_row(const Entry& e, Group& group, float taken, const NumberValues& numbers, bool first,
               DeviceWork& work) {
    const RuleInfo& rule = *group.rule;
    GroupOptions& options = group.options;
    const bool host_has_numbers = e.numbers != nullptr && !e.device_counts;
    // What numbers become may depend on any option.
    if (options.any_on_device && (host_has_numbers || !all_on(work.device, options)))
      OptionReader::of(rule).fetch(optimizer_, e.group, options);
    for (size_t i = 0; host_has_numbers && i < rule.numbers.size(); ++i)
      options.values[rule.numbers[i]] = numbers[i];
    const int index = int(work.notes.size());
    const bool source_of_row = makes_rows(work.device);
    HyperRow row{};
    // What a device is to make differs from this in no way that matters for zeros: in first steps,
    // a rule may not divide by what is zero later on.
    constexpr double late = 1e6;
    rule.row(options.values.data(), source_of_row ? late : double(taken) + 1,
             source_of_row ? e.first : first, e.float64, row);
    RowNote note{&rule, e.float64, group.variant_info().zero_stays_zero(row, e.float64)};
    if (host_has_numbers) {
      if (source_of_row) rule.row(options.values.data(), double(taken) + 1, first, e.float64, row);
      for (size_t i = 0; i < rule.numbers.size(); ++i)
        note.next_numbers[i] = rule.next(int(i), e.float64, row);
    }
    work.notes.push_back(note);
    if (!source_of_row) {
      work.rows.push_back(row);
      return index;
    }
    RowSource source{};
    for (size_t i = 0; i < rule.options.size(); ++i) set_option(source, options, int(i));
    for (size_t i = 0; e.numbers != nullptr && e.device_counts && i < rule.numbers.size(); ++i)
      source.set(rule.numbers[i], OptionKind::float32, e.numbers->address(int(i)));
    source.count = e.device_counts ? e.count : nullptr;
    source.taken = taken;
    source.row = uint32_t(index);
    source.first = first;
    source.float64 = e.float64;
    work.sources.push_back(source);
    work.source_rules.push_back(number_of(rule));
    return index;
  }

  static bool all_on(c10::Device device, const GroupOptions& options) {
    for (const py::object& value : options.on_device)
      if (value && THPVariable_Unpack(value.ptr()).device() != device) return false;
    return true;
  }

  static void set_option(RowSource& source, const GroupOptions& options, int i) {
    if (!options.on_device[i]) {
      source.set(i, options.values[i]);
      return;
    }
    const at::Tensor& tensor = THPVariable_Unpack(options.on_device[i].ptr());
    const bool wide = tensor.scalar_type() == at::kDouble;
    source.set(i, wide ? OptionKind::float64 : OptionKind::float32, tensor.const_data_ptr());
  }

  std::string optimizer_;
  std::vector<Group> groups_;
  uint64_t step_ = 0;
  bool rows_on_device_ = false;
};

}  // namespace
}  // namespace fusedopt
