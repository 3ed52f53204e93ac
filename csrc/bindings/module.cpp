// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The Python module fusedopt._C: the one translation unit of this folder, which is the only one
// that knows torch. It turns parameters and gradients into spans, and hands them to the core with a
// stream or a parallel loop.
#include "conversions.h"
#include "flat.h"
#include "plan.h"
#include "rules.h"

using namespace fusedopt;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  if (const char* name = std::getenv("FUSEDOPT_ISA"); name != nullptr && *name != 0) set_isa(name);

  m.attr("slot") = kSlot;
#if defined(FUSEDOPT_WITH_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("accelerator") = c10::DeviceTypeName(kAccelerator, /*lower_case=*/true);
  m.attr("version") = FUSEDOPT_VERSION;
  m.attr("cuda_version") = FUSEDOPT_CUDA_VERSION;
  m.attr("torch_version") = FUSEDOPT_TORCH_VERSION;
  m.def("isa", get_isa);
  m.def("set_isa", set_isa);
  m.def("state_names", state_names);
  m.def("measures", measures);
  m.def("rules", rules);
  m.def("combinations", combinations);
  m.attr("block") = kBlock;
  m.attr("sums") = kMaxSums;
  m.def("encode", encode);
  m.def("decode", decode);
  m.def("param_formats", list_param_formats);
  m.def("join_master", join_master);
  m.def("split_master", split_master);
  m.def("remainder_of", remainder_of);
  m.def("flat_tensors", flat_tensors);
  m.def("flat_steps", flat_steps);
  m.def("note_change", note_change);
  m.def("changes", [] { return changes; });
  m.def("has_gradient", has_gradient);
  m.def("is_capturing", is_capturing);
  m.def("is_recorded", at::hasCallbacks);
  m.def("attach_gradients", attach_gradients);
  m.def("know_dtensor", [](py::handle type) { dtensors.know(type); });
  py::class_<Workspace, std::shared_ptr<Workspace>>(m, "Workspace")
      .def(py::init<>())
      .def_readonly("captured", &Workspace::captured)
      .def("begin", &Workspace::begin)
      .def("forget_begun", &Workspace::forget_begun)
      .def("is_begun", &Workspace::is_begun)
      .def("forget_states", &Workspace::forget_states)
      .def("forget_weights_of", &Workspace::forget_weights_of)
      .def("note_weights_of", &Workspace::note_weights_of)
      .def("knows_weights_of", &Workspace::knows_weights_of)
      .def("are_outdated", &Workspace::are_outdated)
      .def_property_readonly("grad_norm", &Workspace::grad_norm);
  py::class_<MemberInfo>(m, "Member")
      .def(py::init<py::object, std::string, bool, py::tuple, uintptr_t, at::ScalarType, int, bool,
                    bool, uint64_t, uint64_t, bool, std::optional<py::object>, int, Runs, int>(),
           py::kw_only(), py::arg("param"), py::arg("name"), py::arg("duplicate"), py::arg("keys"),
           py::arg("flat_grad"), py::arg("state_type"), py::arg("master_bits"),
           py::arg("stochastic"), py::arg("counts_steps"), py::arg("seed"), py::arg("ordinal"),
           py::arg("on_device"), py::arg("first_count"), py::arg("lineage"), py::arg("runs"),
           py::arg("cut"));
  py::class_<Plan::Lacks>(m, "Lacks")
      .def_readonly("states", &Plan::Lacks::states)
      .def_readonly("gradients", &Plan::Lacks::gradients);
  py::class_<Plan>(m, "Plan")
      .def(py::init<std::string, std::shared_ptr<Workspace>, py::handle, py::handle>())
      .def("add_group", &Plan::add_group)
      .def("add", &Plan::add)
      .def("add_idle", &Plan::add_idle)
      .def("step", &Plan::step, py::arg("groups"), py::arg("state"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("max_grad_norm"), py::arg("positions") = py::none(),
           py::arg("grads") = py::list(), py::arg("add_up") = py::none(),
           py::arg("add_up_measured") = py::none(), py::arg("check_only") = false)
      .def("place_of", &Plan::place_of)
      .def_property_readonly("span_count", &Plan::span_count);
}
