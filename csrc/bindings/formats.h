// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The ways of storing of core/codes.h, as torch and Python name them.
#pragma once

#include <optional>
#include <vector>

#include "../core/codes.h"
#include "names.h"

namespace fusedopt {
namespace {

struct ParamFormatInfo {
  at::ScalarType param;
  int master_bits;  // 0: no master
  bool stochastic;
  const char* master_key;  // in a parameter's state
  at::ScalarType master;   // the dtype of that; the parameter's where there is none
};

template <class Element>
at::ScalarType scalar_type_of() {
  if constexpr (std::is_same<Element, int8_t>::value) {
    return at::kChar;
  } else if constexpr (std::is_same<Element, int16_t>::value) {
    // The same bits under another name: processes cannot send each other int16.
    return at::kBFloat16;
  } else {
    return scalar_type(ElementTraits<Element>::dtype);
  }
}

// In the order of ParamFormats.
const std::vector<ParamFormatInfo>& param_formats() {
  static const auto formats = [] {
    std::vector<ParamFormatInfo> made;
    for_each_type(ParamFormats{}, [&](auto format) {
      using Format = decltype(format);
      ParamFormatInfo info{scalar_type_of<typename Format::Param>(), Format::master_bits,
                           Format::stochastic, Format::master_key,
                           scalar_type_of<typename Format::Param>()};
      if constexpr (!std::is_same<typename Format::Master, NoMaster>::value)
        info.master = scalar_type_of<typename Format::Master>();
      made.push_back(info);
    });
    return made;
  }();
  return formats;
}

// The place of a format in ParamFormats; none for dtypes that only kernels of their own know.
std::optional<uint8_t> find_param_format(at::ScalarType param, int master_bits, bool stochastic) {
  for (size_t i = 0; i < param_formats().size(); ++i) {
    const ParamFormatInfo& format = param_formats()[i];
    if (format.param == param && format.master_bits == master_bits &&
        format.stochastic == stochastic)
      return uint8_t(i);
  }
  return std::nullopt;
}

// Likewise in StateFormats. A state of bytes is one in codes.
uint8_t find_state_format(at::ScalarType state) {
  return state == at::kByte       ? state_format<CodedState>
         : state == at::kBFloat16 ? state_format<Bfloat16State>
                                  : state_format<Float32State>;
}

// The elements of the rows that blocks of codes end with: scales by rows have a dimension for
// these.
int64_t row_of(const at::Tensor& scales, int64_t numel) {
  return scales.dim() == 2 && scales.size(0) > 0 ? numel / scales.size(0) : numel;
}

py::list list_param_formats() {
  py::list formats;
  for (const ParamFormatInfo& format : param_formats())
    formats.append(py::make_tuple(py::cast(format.param), format.master_bits, format.stochastic,
                                  format.master_key, py::cast(format.master)));
  return formats;
}

}  // namespace
}  // namespace fusedopt
