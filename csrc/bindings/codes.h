// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// States as codes and back, for checkpoints.
#pragma once

#include <algorithm>
#include <utility>

#include "../core/codes.h"
#include "torch.h"

namespace fusedopt {
namespace {

// A state in memory order, as a step would store it in codes, but each element rounded to nearest.
std::pair<at::Tensor, at::Tensor> encode(const at::Tensor& values, bool never_negative) {
  const int64_t blocks = (values.numel() + kBlock - 1) / kBlock;
  at::Tensor codes = at::zeros({blocks, kBlock}, at::kByte), scales = at::zeros({blocks});
  const float* from = values.const_data_ptr<float>();
  for (int64_t block = 0; block < blocks; ++block)
    encode_block(from + block * kBlock, std::min<int64_t>(kBlock, values.numel() - block * kBlock),
                 never_negative, codes.mutable_data_ptr<uint8_t>() + block * kBlock,
                 scales.mutable_data_ptr<float>() + block);
  return {codes, scales};
}

at::Tensor decode(const at::Tensor& codes, const at::Tensor& scales, int64_t numel,
                  bool never_negative) {
  at::Tensor values = at::empty({numel}, at::kFloat);
  float* const to = values.mutable_data_ptr<float>();
  const uint8_t* const from = codes.const_data_ptr<uint8_t>();
  const float* const scale = scales.const_data_ptr<float>();
  for (int64_t i = 0; i < numel; ++i)
    to[i] = decode_element(from + i / kBlock * kBlock, int(i % kBlock), scale[i / kBlock],
                           never_negative);
  return values;
}

}  // namespace
}  // namespace fusedopt
