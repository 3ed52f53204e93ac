// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The spans of a step: of each parameter one, several, or a part of one.
#pragma once

#include "gathered.h"
#include "hyper_table.h"
#include "member.h"

namespace fusedopt {
namespace {

class Spans {
 public:
  explicit Spans(HyperTable& table) : table_(table) {}

  Works works;         // of all devices
  bool clips = false;  // whether the norm of the gradients is wanted

  void clear() {
    for (auto& work : works) work.clear();
  }

  int64_t count() const {
    size_t count = 0;
    for (const auto& work : works) count += work.spans.size();
    return int64_t(count);
  }

  // Of a parameter whose gradient has been checked.
  void add(Entry& e, Member& m, const void* grad) { add(e, m, e.coding, grad); }

  // Likewise of one without elements, whose steps are counted.
  void add_none(Entry& e) {
    if (e.device_counts) e.work->advance(e.count);
    if (e.numbers != nullptr) take_row(e);
    if (table_.of(e).measures) e.work->add_measured(e.position, e.cut > 0);
  }

  // Likewise, of one whose gradient lies in another order.
  void add_copied(Entry& e, Member& m, const at::Tensor& grad) {
    add(e, m, e.coding, gathered_.copy(grad, m.order));
  }

  // The span of a parameter that, or some of whose states, do not lie in one order without gaps:
  // what lies otherwise is gathered, and put back afterwards.
  void add_gathered(Entry& e, Member& m, const at::Tensor& local, const at::Tensor& grad) {
    Entry there = e;
    if (!m.dense) there.span.param = gathered_.borrow(local, m.order);
    for (int k = 0; k < e.tensor_count && !m.in_order; ++k) {
      const at::Tensor& state = THPVariable_Unpack(e.tensors[k]);
      if (!is_in(m.order, state)) there.span.states[k] = gathered_.borrow(state, m.order);
    }
    add(there, m, e.coding,
        is_in(m.order, grad) ? grad.unsafeGetTensorImpl()->data() : gathered_.copy(grad, m.order));
  }

  // After the step.
  void put_back() { gathered_.put_back(); }
  // Lets go of all that it held.
  void release() { gathered_.clear(); }

 private:
  int take_row(const Entry& e) {
    const int row = table_.row(e, *e.work);
    if (e.numbers != nullptr) e.numbers->take(row, e.device_counts, *e.work);
    return row;
  }

  // The coding is that of the entry that the plan has.
  void add(const Entry& e, Member& m, Coding& coding, const void* grad) {
    DeviceWork& work = *e.work;
    if (e.device_counts) work.advance(e.count);
    Span span = e.span;
    span.grad = grad;
    span.row = take_row(e);
    if (e.coded) {
      if (e.count != nullptr && !e.device_counts) coding.step = uint32_t(*e.count) + 1;
      span.coding = &coding;
    }
    if (clips) work.add_gradient(e.cut, grad, span.numel, e.grad_dtype);
    const bool measured = table_.of(e).measures;
    if (measured) work.add_measured(e.position, e.cut > 0);
    if (e.coded && !m.pieces.empty()) {
      add_pieces(span, e, m, work, measured);
      return;
    }
    span.first_chunk = uint32_t(work.measured_chunks);
    if (measured) work.measure(span);
    if (work.spans.empty() || !extend(work.spans.back(), work.open_padding, span, e)) {
      span.offset = work.spans.empty() ? 0 : work.spans.back().offset + work.spans.back().numel;
      work.spans.push_back(span);
    }
    // Padding belongs to a flat buffer only where all of the streams are in one.
    const bool padded = e.padding > 0 && grad == e.flat_grad && work.notes[span.row].keeps_zero;
    work.open_padding = padded ? e.padding : 0;
  }

  // The pieces of a span in codes that lies in several places of the whole parameter.
  static void add_pieces(const Span& whole, const Entry& e, Member& m, DeviceWork& work,
                         bool measured) {
    const StreamBytes bytes(e.coding);
    int64_t begin = 0;
    for (size_t i = 0; i < m.pieces.size(); ++i) {
      Span span = whole;
      span.numel = m.ends[i] - begin;
      span.param = static_cast<char*>(whole.param) + begin * bytes.param;
      span.grad = static_cast<const char*>(whole.grad) + begin * bytes.grad;
      for (int k = 0; k < e.tensor_count; ++k)
        span.states[k] = static_cast<char*>(whole.states[k]) + begin * bytes.state;
      m.pieces[i].step = whole.coding->step;
      m.pieces[i].grad = whole.coding->grad;
      span.coding = &m.pieces[i];
      span.offset = work.spans.empty() ? 0 : work.spans.back().offset + work.spans.back().numel;
      span.first_chunk = uint32_t(work.measured_chunks);
      if (measured) work.measure(span);
      work.spans.push_back(span);
      begin = m.ends[i];
    }
    work.open_padding = 0;
  }

  // Lengthens the last span by one that adjoins it in every stream.
  static bool extend(Span& last, int64_t open_padding, const Span& span, const Entry& e) {
    if (last.kernel != span.kernel || last.row != span.row || e.coded) return false;
    if (last.measured >= 0 || span.measured >= 0) return false;
    const int64_t length = last.numel + open_padding;
    const auto adjoins = [&](const void* a, const void* b, int64_t size) {
      return static_cast<const char*>(a) + length * size == static_cast<const char*>(b);
    };
    if (!adjoins(last.param, span.param, e.param_size) ||
        !adjoins(last.grad, span.grad, e.grad_size))
      return false;
    for (int k = 0; k < e.tensor_count; ++k)
      if (!adjoins(last.states[k], span.states[k], e.state_size)) return false;
    last.numel = length + span.numel;
    return true;
  }

  HyperTable& table_;
  Gathered gathered_;
};

}  // namespace
}  // namespace fusedopt
