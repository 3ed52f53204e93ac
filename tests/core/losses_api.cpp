// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The losses behind a C interface: by the loops of an instruction set, or by kernels on the host.
#include <thread>
#include <vector>

#include "cpu/losses/losses.h"
#include "host_losses.h"
#include "loss_call.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fusedopt;

int threads_of_loops = 1;

void in_threads(int64_t size, int64_t grain, void* context, void (*body)(void*, int64_t, int64_t)) {
  const int64_t pieces =
      std::max<int64_t>(1, std::min<int64_t>(threads_of_loops, size / std::max<int64_t>(1, grain)));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < pieces; ++i)
    threads.emplace_back(body, context, size * i / pieces, size * (i + 1) / pieces);
  for (auto& thread : threads) thread.join();
}

}  // namespace

// An isa of -1 means the kernels of a device, on the host.

// The loss of rows of logits. Returns the first row whose target is no class, or their number.
API int64_t losses_cross_entropy(int isa, int threads, const CrossEntropyCall* call) {
  threads_of_loops = threads;
  CrossEntropyWork work = call->work();
  const DType type = call->type();
  Divisors divisors{double(work.rows), double(work.rows)};
  const LossArgs total = call->total(&divisors);
  if (isa < 0) {
    if (work.targets != nullptr) host_check_targets(target_args(*call, &divisors));
    if (call->is_mean) work.divisors = &divisors;
    std::vector<unsigned char> terms(size_t(bytes_of_terms(work)) + 1);
    launch_cross_entropy(work, size_of(type), terms.data(),
                         [&](const CrossEntropyArgs& args) -> const char* {
                           host_cross_entropy(args, type);
                           return nullptr;
                         });
    host_finish_loss(total);
    return work.rows;
  }
  if (work.targets != nullptr) {
    const auto found =
        cpu::check_targets(work.targets, work.rows, work.loss.classes, work.ignore_index,
                           work.weights, type == DType::float64 ? type : DType::float32);
    if (found.first_wrong < work.rows) return found.first_wrong;
    divisors = {found.weight, double(found.valid)};
  }
  if (call->is_mean) {
    work.loss.factor = 1 / divisors.weight;
    work.loss.z_factor = 1 / divisors.valid;
  }
  cpu::cross_entropy(work, type, cpu::Isa(isa), threads, in_threads);
  finish_loss(total, cpu::total(work.losses, work.rows));
  return work.rows;
}

API void losses_mse(int isa, int threads, const MseCall* call) {
  threads_of_loops = threads;
  const MseWork work = call->work();
  const Divisors divisors{double(work.numel), double(work.numel)};
  const LossArgs total = call->total(&divisors);
  if (isa < 0) {
    host_mse(work, call->type());
    host_finish_loss(total);
  } else {
    cpu::mse(work, call->type(), cpu::Isa(isa), in_threads);
    finish_loss(total, cpu::total(work.sums, norm_chunks(work.numel)));
  }
}

API void losses_scale(void* values, int64_t count, int dtype, const void* factor,
                      int factor_dtype) {
  host_scale({values, count, factor, DType(factor_dtype)}, DType(dtype));
}

API float losses_exponential(float x) { return exponential(x); }
API double losses_exponential_double(double x) { return exponential(x); }
API double losses_logarithm(double x) { return logarithm(x); }
