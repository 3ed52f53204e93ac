// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// What one optimizer walks over in a step.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "capture.h"
#include "extents.h"
#include "gradient.h"
#include "hold.h"
#include "hyper_table.h"
#include "lineages.h"
#include "param_list.h"
#include "runner.h"
#include "shards.h"
#include "spans.h"
#include "state_finder.h"

namespace fusedopt {
namespace {

// A cache: parameters and gradients are looked up in every step, states where they may have
// changed, and where these cannot be walked over as planned, another plan is made. It holds no
// memory of theirs.
class Plan {
 public:
  // The types are those of optimizer.state, and of the state of a parameter, that tell of changes.
  Plan(std::string optimizer, std::shared_ptr<Workspace> workspace, py::handle state_type,
       py::handle values_type)
      : optimizer_(std::move(optimizer)),
        list_(optimizer_),
        workspace_(std::move(workspace)),
        states_(state_type, values_type),
        table_(optimizer_),
        spans_(table_),
        shards_(optimizer_),
        runner_(optimizer_, workspace_) {}

  void add_group(const std::string& rule, const py::dict& group, bool capturable) {
    table_.add_group(find_rule(rule), group, capturable);
  }

  // Adds the next parameter of the group added last.
  void add(const MemberInfo& info) {
    const Group& group = table_.groups().back();
    const VariantInfo& variant = group.variant_info();
    auto [m, e] = make_member(info, *group.rule, variant, *workspace_);
    if (m.first_count) set_count(m.first_count->ptr(), e);
    if (m.keys.empty()) set_padding(m, e);
    if (!e.duplicate) {
      if (e.device_counts) lineages_.add(e.lineage);
      const bool without_state = !group.rule->counts_steps && variant.states.empty();
      device_decides_ = device_decides_ && (m.on_device || without_state);
      one_accelerator_ = one_accelerator_ && m.device.type() == kAccelerator &&
                         (!first_device_ || *first_device_ == m.device);
      if (!first_device_) first_device_ = m.device;
      elements_ += e.span.numel;
    }
    sharded_ = sharded_ || e.sharded;
    append({std::move(m), e});
  }

  // Likewise one that nobody has looked at, as it has had no gradient yet.
  void add_idle(const py::object& param) { append(make_idle_member(param)); }

  // What there has to be before a step, by position. Nothing was changed then.
  struct Lacks {
    std::vector<int> states;     // the plan is to be made anew, with state for these
    std::vector<int> gradients;  // placed as their parameters are, and ready
  };

  // One step over all parameters that have a gradient or, with positions, those of them; null when
  // it is done. Grads: parameters, each with a plain tensor in place of its gradient. Add_up: adds
  // up the sums of squares of those cut among the same processes, and those of these processes, and
  // add_up_measured what these have measured. Check_only: the step is not taken.
  std::optional<Lacks> step(const py::list& groups, const py::object& state,
                            const py::object& grad_scale, const py::object& found_inf,
                            const std::optional<double>& max_grad_norm,
                            const std::optional<std::vector<int>>& positions,
                            const std::vector<std::pair<py::object, py::object>>& grads,
                            const py::object& add_up, const py::object& add_up_measured,
                            bool check_only) {
    const Turn turn(workspace_->turn);
    const at::NoGradGuard no_grad;
    runner_.called_with = c10::impl::tls_local_dispatch_key_set();
    // What runs below Python lets no other thread run.
    const c10::impl::ExcludeDispatchKeyGuard below_python(c10::python_ks);
    const Forget forget{*this};
    partial_ = positions ? &*positions : nullptr;
    shards_.give(grads);
    runner_.join(add_up, add_up_measured, max_grad_norm || table_.measures(), table_.measures());
    if (!set_factor(grad_scale, found_inf, max_grad_norm)) return std::nullopt;
    if (!prepare(groups, state)) return Lacks{missing_, misplaced_};
    if (check_only) return std::nullopt;
    if (is_captured(spans_.works, active_, outdated_, members_, entries_, table_))
      workspace_->captured = true;
    // Others' weights are their own masters.
    for (const size_t position : outdated_)
      THPVariable_Unpack(entries_[position].parts[entries_[position].part_count - 1]).zero_();
    Hold hold;
    if (runner_.add_up == nullptr && duration_.is_short(members_.size())) {
      run();
    } else {
      for (const size_t at : active_) hold.add(entries_[at]);
      const py::gil_scoped_release release;
      run();
    }
    finish();
    return std::nullopt;
  }

  int64_t span_count() const { return spans_.count(); }
  auto place_of(const py::object& param) { return places_.of(param.ptr(), entries_); }

 private:
  // -- the factor that callers give --------------------------------------------------------------

  // Whether there is a step at all, as far as the host knows.
  bool set_factor(const py::object& grad_scale, const py::object& found_inf,
                  const std::optional<double>& max_grad_norm) {
    FactorSource& source = runner_.source = FactorSource{};
    spans_.clips = runner_.clips = max_grad_norm.has_value();
    source.max_grad_norm = max_grad_norm.value_or(0);
    if (!grad_scale.is_none()) {
      source.grad_scale = on_the_accelerator(grad_scale);
      if (source.grad_scale == nullptr)
        source.factor = 1 / number(grad_scale.ptr(), [&] { return optimizer_ + ": grad_scale"; });
    }
    if (found_inf.is_none()) return true;
    // Where a count of steps is the host's, it has to know whether there is a step.
    if (device_decides_) source.found_inf = on_the_accelerator(found_inf);
    if (source.found_inf != nullptr ||
        number(found_inf.ptr(), [&] { return optimizer_ + ": found_inf"; }) == 0)
      return true;
    // Nobody looks at the gradients then; their norm is not finite.
    if (runner_.clips) workspace_->note_norm(norm_device(), NAN);
    return false;
  }

  // Where kernels can read a scaler's tensor, else null.
  const float* on_the_accelerator(const py::object& value) const {
    if (!on_one_accelerator() || !is_on_accelerator(value.ptr())) return nullptr;
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    if (tensor.scalar_type() != at::kFloat || tensor.device() != *first_device_) return nullptr;
    return tensor.const_data_ptr<float>();
  }

  // Other processes' sums are added by the host.
  bool on_one_accelerator() const {
    return first_device_ && one_accelerator_ && runner_.add_up == nullptr;
  }

  c10::Device norm_device() const {
    return on_one_accelerator() ? *first_device_ : c10::Device(c10::kCPU);
  }

  // -- walking -----------------------------------------------------------------------------------

  int64_t walked() const { return int64_t(partial_ ? partial_->size() : entries_.size()); }
  size_t position(int64_t i) const { return partial_ ? size_t((*partial_)[i]) : size_t(i); }

  // Whether all the spans could be made; if not, missing_ tells for whom state has to be made, and
  // misplaced_ whose gradient cannot be read as it is. From where parameters are listed on no other
  // thread runs.
  bool prepare(const py::list& groups, const py::object& state) {
    missing_.clear();
    misplaced_.clear();
    active_.clear();
    first_.clear();
    outdated_.clear();
    spans_.clear();
    if (!read_options(groups)) return false;
    if (!look_at_all(groups, state)) return false;
    if (sharded_ && !are_placed(groups, state)) return false;
    bool moved = false;
    for (int64_t i = 0; i < walked(); ++i) {
      const size_t at = position(i);
      const void* grad = found_[at];
      if (grad == nullptr) continue;
      Entry& e = entries_[at];
      if (grad != unchecked()) {
        if (e.first) check_first(e);
        activate(e, at);
        spans_.add(e, members_[at], grad);
        continue;
      }
      if (list_.params[at] != e.param) return false;
      if (members_[at].idle) {
        missing_.push_back(int(at));
        continue;
      }
      if (e.sharded && !find_locals(members_[at], e)) return false;
      const at::Tensor& local = THPVariable_Unpack(e.local);
      if (!is_as_planned(e, members_[at], local)) return false;
      if (!has_same_state(e) && !states_.take(members_[at], e)) return false;
      void* const address = const_cast<void*>(local.unsafeGetTensorImpl()->data());
      moved = moved || address != e.span.param;
      e.span.param = address;
      if (e.first) check_first(e);
      check_and_add(e, at, local,
                    e.sharded ? *shards_.of(e).local : local.unsafeGetTensorImpl()->grad());
    }
    return missing_.empty() && !(moved && (partial_ || may_overlap(active_, entries_)));
  }

  bool look_at_all(const py::list& groups, const py::object& state) {
    if (!states_.are_found(state)) {
      if (!list_.all(groups, table_)) return false;
      for (size_t at = 0; at < entries_.size(); ++at)
        if (list_.params[at] != entries_[at].param) return false;
      if (!states_.find(state, members_, entries_)) return false;
    }
    if (!(partial_ ? list_.some(groups, table_, entries_, *partial_) : list_.all(groups, table_)))
      return false;
    if (!states_.look_into_others(members_, entries_)) return false;
    share<&Plan::look>();
    return true;
  }

  // Whether all gradients of sharded parameters are placed as these are. Another look is taken
  // where Python had to be asked.
  bool are_placed(const py::list& groups, const py::object& state) {
    for (int64_t i = 0; i < walked(); ++i) {
      const size_t at = position(i);
      if (found_[at] != unknown()) continue;
      if (dtensors.spec(entries_[at].param) != members_[at].spec.ptr()) return false;
      shards_.add_unknown(at, entries_[at], members_[at]);
    }
    if (!shards_.has_unknown()) return true;
    shards_.find_misplaced(members_, misplaced_);
    if (!misplaced_.empty() || !look_at_all(groups, state)) return false;
    for (int64_t i = 0; i < walked(); ++i)
      if (found_[position(i)] == unknown()) return false;
    return true;
  }

  // Looks up the plain tensors of a sharded parameter and its state; false where the plan has to be
  // made anew.
  bool find_locals(Member& m, Entry& e) {
    if (has_same_locals(e, m)) return true;
    e.local = dtensors.local(e.param);
    return e.local != nullptr && dtensors.spec(e.param) == m.spec.ptr() &&
           (m.keys.empty() || states_.take(m, e));
  }

  // Reads the options of all groups that have members to be stepped; false where they ask for other
  // states.
  bool read_options(const py::list& groups) {
    table_.begin_step(!lineages_.empty());
    const int64_t size = partial_ ? walked() : int64_t(table_.groups().size());
    if (groups.size() != table_.groups().size()) return false;
    for (int64_t i = 0; i < size; ++i) {
      if (partial_ && position(i) >= entries_.size())
        throw py::index_error(optimizer_ + ": there is no parameter " + text(position(i)));
      const size_t g = partial_ ? entries_[position(i)].group : size_t(i);
      if (!table_.read(groups[g].ptr(), g)) return false;
    }
    return true;
  }

  // Calls a method with ranges of the walk, in several threads where there is work for them.
  template <void (Plan::*method)(int64_t begin, int64_t end)>
  void share() {
    const int64_t size = walked();
    const bool alone = elements_ < kManyElements || on_one_accelerator();
    run_in_parallel(size, alone ? size : kShareGrain, this,
                    [](void* plan, int64_t begin, int64_t end) {
                      (static_cast<Plan*>(plan)->*method)(begin, end);
                    });
  }

  // Looks up the gradients of a range of the walk: their addresses where all checks have let the
  // same pass before, null for those to leave out. Changes nothing else, so that several threads
  // can share the work.
  void look(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t at = position(i);
      const Entry& e = entries_[at];
      found_[at] = unchecked();
      if (list_.params[at] != e.param) continue;
      if (e.duplicate) {
        found_[at] = nullptr;
        continue;
      }
      if (e.sharded) {
        found_[at] = shards_.look(e, members_[at]);
        continue;
      }
      const c10::TensorImpl& local = *THPVariable_Unpack(e.local).unsafeGetTensorImpl();
      const at::Tensor& grad = local.grad();
      if (!grad.defined()) {
        found_[at] = nullptr;
      } else if (e.checked && is_as_checked(e, local, *grad.unsafeGetTensorImpl())) {
        const void* address = grad.unsafeGetTensorImpl()->data();
        if (address != nullptr) found_[at] = address;
      }
    }
  }

  // A state that was made for this step has to be what was made.
  void check_first(Entry& e) {
    const Member& m = members_[size_t(&e - entries_.data())];
    const size_t made = m.first_state();
    e.first = made < m.keys.size() && workspace_->is_begun(e.param, m.tensors[made]);
    if (!e.first) workspace_->has_stepped(e.param);
  }

  void activate(const Entry& e, size_t at) {
    active_.push_back(at);
    if (e.first) first_.push_back(at);
  }

  // Adds the span of one parameter. Throws on a gradient that cannot be taken.
  void check_and_add(Entry& e, size_t at, const at::Tensor& local, const at::Tensor& grad) {
    const Member& m = members_[at];
    e.checked = false;
    e.span.kernel = kernel_for(e, m, table_.of(e).variant, local, grad, optimizer_);
    e.work = &work_on(m.device, spans_.works);
    e.grad_dtype = *dtype_of(grad.scalar_type());
    e.grad_size = uint8_t(size_of(e.grad_dtype));
    e.coding.grad = e.grad_dtype;
    if (is_outdated(e)) outdated_.push_back(at);
    activate(e, at);
    if (e.span.numel == 0) {
      spans_.add_none(e);
    } else if (!m.dense || !m.in_order) {
      spans_.add_gathered(e, members_[at], local, grad);
    } else if (!is_in_order(local, grad)) {
      spans_.add_copied(e, members_[at], grad);
    } else {
      e.checked = local.is_contiguous() && grad.is_contiguous() &&
                  !local.unsafeGetTensorImpl()->is_python_dispatch() &&
                  !grad.unsafeGetTensorImpl()->is_python_dispatch();
      e.numel = local.numel();
      e.keys = local.key_set();
      e.grad_keys = grad.key_set();
      e.type = local.dtype();
      e.grad_type = grad.dtype();
      e.device = m.device;
      spans_.add(e, members_[at], grad.unsafeGetTensorImpl()->data());
    }
  }

  // -- the update --------------------------------------------------------------------------------

  void run() {
    duration_.measure([&] {
      runner_.norm(spans_.works, on_one_accelerator() ? first_device_ : std::nullopt);
      runner_.factor();
      runner_.scale(spans_.works);
      runner_.measure(spans_.works, table_, entries_.size());
      runner_.update(spans_.works, table_);
    });
  }

  void finish() {
    spans_.put_back();
    if (states_.counts_are_shared()) {
      count_steps(0, walked());
    } else {
      share<&Plan::count_steps>();
    }
    // Rows of a first step are others; there are few of them.
    for (const size_t at : first_) workspace_->has_stepped(entries_[at].param);
    if (!lineages_.empty()) {
      stepped_.clear();
      for (const size_t at : active_)
        if (entries_[at].device_counts) stepped_.push_back(&entries_[at].lineage);
      lineages_.part(stepped_);
    }
  }

  // Counts the step of those in a range of the walk that took one.
  void count_steps(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const size_t at = position(i);
      if (found_[at] == nullptr) continue;
      Entry& e = entries_[at];
      count_step(e);
      e.first = false;
      bump_version(e.local);
      if (e.sharded) bump_version(e.param);
      // Another thread may have given it other memory meanwhile, which was not stepped.
      if (e.weights != nullptr) {
        *e.weights = Weights::of(e.param, e.master);
        e.weights->param.address = e.span.param;
        e.weights->master.address = e.coding.master;
      }
    }
  }

  void append(std::pair<Member, Entry> made) {
    auto& [m, e] = made;
    e.group = int(table_.groups().size()) - 1;
    e.in_group = int(table_.groups().back().size++);
    e.position = int(entries_.size());
    entries_.push_back(e);
    list_.params.push_back(nullptr);
    found_.push_back(nullptr);
    members_.push_back(std::move(m));
  }

  // Lets go, at the end of a step, of all that it held.
  struct Forget {
    Plan& plan;
    ~Forget() {
      plan.states_.release();
      plan.spans_.release();
      plan.shards_.release(plan.members_);
    }
  };

  std::string optimizer_;
  ParamList list_;
  Places places_;
  std::shared_ptr<Workspace> workspace_;
  StateFinder states_;
  HyperTable table_;
  Spans spans_;
  ShardedGradients shards_;
  Runner runner_;
  Duration duration_;
  std::vector<Member> members_;
  std::vector<Entry> entries_;   // one for each member
  int64_t elements_ = 0;         // of all parameters, in reals
  Lineages lineages_;            // empty: the host counts all steps
  bool device_decides_ = true;   // whether a step takes place need not be known to the host
  bool sharded_ = false;         // some parameter is
  bool one_accelerator_ = true;  // all parameters are on the same one
  std::optional<c10::Device> first_device_;  // none: there is nothing to step

  // Of the step at hand; kept so that a step allocates nothing.
  const std::vector<int>* partial_ = nullptr;  // the positions to step; null: all
  std::vector<int> missing_, misplaced_;
  std::vector<const void*> found_;  // by position, see look()
  std::vector<size_t> active_;      // positions
  std::vector<size_t> first_;       // those whose first step it is
  std::vector<size_t> outdated_;    // those whose master belongs to other weights
  std::vector<int*> stepped_;       // lineages
};

}  // namespace
}  // namespace fusedopt
