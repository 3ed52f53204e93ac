// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// Codes and masters of whole tensors, for checkpoints: in parallel, without the GIL.
#pragma once

#include <algorithm>
#include <utility>

#include "../cpu/floating_point.h"
#include "formats.h"

namespace fusedopt {
namespace {

// Calls body(begin, end) for ranges of [0, size), with the default floating-point mode.
template <class Body>
void convert_in_parallel(int64_t size, int64_t grain, Body body) {
  const py::gil_scoped_release release;
  at::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) {
    const cpu::DefaultFloatingPoint mode;
    body(begin, end);
  });
}

// A thread has to have so much to do that it is worth while.
constexpr int64_t kConversionGrain = 32768;

template <class Element>
const Element* elements_of(const at::Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}
template <class Element>
Element* mutable_elements_of(const at::Tensor& tensor) {
  return static_cast<Element*>(tensor.mutable_data_ptr());
}

at::Tensor on_cpu(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.detach().to(at::kCPU, dtype).contiguous();
}

// Values in the order of a contiguous tensor, on the device and with the strides of another one.
at::Tensor laid_like(const at::Tensor& like, const at::Tensor& values) {
  if (like.is_contiguous()) return values.to(like.device());
  return at::empty_like(like, like.options().dtype(values.scalar_type())).copy_(values);
}

// -- codes ---------------------------------------------------------------------------------------

// Calls body(place) for each block of a state.
template <class Body>
void for_each_block(const Blocks& blocks, Body body) {
  convert_in_parallel(blocks.count(), kConversionGrain / kBlock, [=](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) body(blocks.at(number));
  });
}

// A state in memory order, in rows of so many elements, as a step would store it in codes, but each
// element rounded to nearest: codes and scales, one behind the other.
std::pair<at::Tensor, at::Tensor> encode(const at::Tensor& values, int64_t row,
                                         bool never_negative) {
  const at::Tensor source = on_cpu(values, at::kFloat);
  const Blocks blocks{source.numel(), row};
  const auto options = at::TensorOptions(at::kCPU);
  const at::Tensor codes = at::empty({blocks.numel}, options.dtype(at::kByte));
  const at::Tensor scales = at::empty({blocks.count()}, options.dtype(at::kFloat));
  const float* const from = elements_of<float>(source);
  uint8_t* const to = mutable_elements_of<uint8_t>(codes);
  float* const scale = mutable_elements_of<float>(scales);
  for_each_block(blocks, [=](const BlockPlace& block) {
    if (never_negative) {
      to_codes<true>(from + block.begin, block.count, to + block.begin, scale + block.number);
    } else {
      to_codes<false>(from + block.begin, block.count, to + block.begin, scale + block.number);
    }
  });
  return {codes, scales};
}

at::Tensor decode(const at::Tensor& codes, const at::Tensor& scales, int64_t row,
                  bool never_negative) {
  const at::Tensor source = on_cpu(codes, at::kByte), scales_of = on_cpu(scales, at::kFloat);
  const Blocks blocks{source.numel(), row};
  TORCH_CHECK(scales_of.numel() == blocks.count(), "no scales of these codes");
  const at::Tensor values =
      at::empty({blocks.numel}, at::TensorOptions(at::kCPU).dtype(at::kFloat));
  const uint8_t* const from = elements_of<uint8_t>(source);
  const float* const scale = elements_of<float>(scales_of);
  float* const to = mutable_elements_of<float>(values);
  for_each_block(blocks, [=](const BlockPlace& block) {
    if (never_negative) {
      from_codes<true>(from + block.begin, scale[block.number], block.count, to + block.begin);
    } else {
      from_codes<false>(from + block.begin, scale[block.number], block.count, to + block.begin);
    }
  });
  return values;
}

// -- masters -------------------------------------------------------------------------------------

// Calls visit(Format{}) for the format with a master of a dtype of parameters: by the bits of its
// master or, where they are 0, by the dtype of what is stored of it.
template <class Visit>
void with_master_format(at::ScalarType param, int master_bits, at::ScalarType master,
                        const Visit& visit) {
  bool found = false;
  for_each_type(ParamFormats{}, [&](auto format) {
    using Format = decltype(format);
    if constexpr (!std::is_same<typename Format::Master, NoMaster>::value) {
      const bool fits = master_bits != 0 ? Format::master_bits == master_bits
                                         : scalar_type_of<typename Format::Master>() == master;
      if (fits && scalar_type_of<typename Format::Param>() == param) {
        found = true;
        visit(format);
      }
    }
  });
  TORCH_INTERNAL_ASSERT(found, "no such master");
}

// The master weights of a parameter, as float32, from what is stored of them.
at::Tensor join_master(const at::Tensor& param, const at::Tensor& stored) {
  const at::Tensor params = on_cpu(param, param.scalar_type());
  const at::Tensor masters = on_cpu(stored, stored.scalar_type());
  const at::Tensor values = at::empty(params.sizes(), params.options().dtype(at::kFloat));
  with_master_format(param.scalar_type(), 0, stored.scalar_type(), [&](auto format) {
    using Format = decltype(format);
    const auto* const high = elements_of<typename Format::Param>(params);
    const auto* const rest = elements_of<typename Format::Master>(masters);
    float* const to = mutable_elements_of<float>(values);
    convert_in_parallel(params.numel(), kConversionGrain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = Format::decode(high[i], rest[i]);
    });
  });
  return laid_like(param, values);
}

// A parameter of this dtype, and what is stored of its master, from master weights.
std::pair<at::Tensor, at::Tensor> split_master(const at::Tensor& master, at::ScalarType param,
                                               int master_bits) {
  const at::Tensor masters = on_cpu(master, at::kFloat);
  const at::Tensor params = at::empty(masters.sizes(), masters.options().dtype(param));
  at::Tensor stored;
  with_master_format(param, master_bits, at::kFloat, [&](auto format) {
    using Format = decltype(format);
    const at::ScalarType dtype = scalar_type_of<typename Format::Master>();
    stored = at::empty(masters.sizes(), masters.options().dtype(dtype));
    const float* const from = elements_of<float>(masters);
    auto* const high = mutable_elements_of<typename Format::Param>(params);
    auto* const rest = mutable_elements_of<typename Format::Master>(stored);
    convert_in_parallel(masters.numel(), kConversionGrain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) Format::encode(from[i], high[i], rest[i]);
    });
  });
  return {laid_like(master, params), laid_like(master, stored)};
}

// What makes a parameter, as it is, as nearly its master as it can; zero where it is another
// number.
at::Tensor remainder_of(const at::Tensor& master, const at::Tensor& param, int master_bits) {
  const at::Tensor masters = on_cpu(master, at::kFloat);
  const at::Tensor params = on_cpu(param, param.scalar_type());
  at::Tensor stored;
  with_master_format(param.scalar_type(), master_bits, at::kFloat, [&](auto format) {
    using Format = decltype(format);
    if constexpr (std::is_same<typename Format::Param, bfloat16>::value) {
      const at::ScalarType dtype = scalar_type_of<typename Format::Master>();
      stored = at::empty(params.sizes(), params.options().dtype(dtype));
      const float* const from = elements_of<float>(masters);
      const auto* const high = elements_of<bfloat16>(params);
      auto* const rest = mutable_elements_of<typename Format::Master>(stored);
      convert_in_parallel(masters.numel(), kConversionGrain, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) rest[i] = Format::remainder_of(from[i], high[i]);
      });
    }
  });
  return laid_like(param, stored);
}

}  // namespace
}  // namespace fusedopt
