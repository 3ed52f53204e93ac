// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// The losses behind a C interface: by the loops of an instruction set, or by kernels on the host.
#include <thread>
#include <vector>

#include "cpu/losses/losses.h"
#include "host_losses.h"

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

// The loss of rows of logits; see CrossEntropyWork. Strides are in bytes. Returns the first row
// whose target is no class, or rows.
API int64_t losses_cross_entropy(int isa, int threads, int dtype, int64_t rows, int64_t classes,
                                 void* logits, int64_t stride, void* gradient,
                                 int64_t gradient_stride, const int64_t* targets,
                                 int64_t ignore_index, void* probabilities, const void* weights,
                                 double smoothing, double z_loss, int is_mean, double* losses,
                                 void* lse, void* loss) {
  threads_of_loops = threads;
  const DType type = DType(dtype);
  const auto bytes = [](void* first) { return static_cast<unsigned char*>(first); };
  CrossEntropyWork work;
  work.loss.classes = classes;
  work.loss.smoothing = smoothing;
  work.loss.z_loss = z_loss;
  work.rows = rows;
  work.logits = {bytes(logits), rows + 1, 0, stride};
  work.gradient = {bytes(gradient), rows + 1, 0, gradient_stride};
  work.targets = targets;
  work.ignore_index = ignore_index;
  work.probabilities = {bytes(probabilities), rows + 1, 0, classes * size_of(type)};
  work.weights = weights;
  work.losses = losses;
  work.lse = lse;
  const bool float64 = type == DType::float64;
  Divisors divisors{double(rows), double(rows)};
  LossArgs finish{losses, rows, 1, is_mean ? &divisors : nullptr, loss, type, is_mean != 0};
  if (isa < 0) {
    if (targets != nullptr)
      host_check_targets({targets, weights, rows, classes, ignore_index, float64, &divisors});
    if (is_mean) work.divisors = &divisors;
    std::vector<unsigned char> terms(size_t(bytes_of_terms(work)) + 1);
    launch_cross_entropy(work, terms.data(), [&](const CrossEntropyArgs& args) -> const char* {
      host_cross_entropy(args, type);
      return nullptr;
    });
    host_finish_loss(finish);
    return rows;
  }
  if (targets != nullptr) {
    const auto found = cpu::check_targets(targets, rows, classes, ignore_index, weights,
                                          float64 ? DType::float64 : DType::float32);
    if (found.first_wrong < rows) return found.first_wrong;
    divisors = {found.weight, double(found.valid)};
  }
  if (is_mean) {
    work.loss.factor = 1 / divisors.weight;
    work.loss.z_factor = 1 / divisors.valid;
  }
  cpu::cross_entropy(work, type, cpu::Isa(isa), threads, in_threads);
  finish_loss(finish, cpu::total(losses, rows));
  return rows;
}

API void losses_mse(int isa, int threads, int dtype, int64_t numel, const void* input,
                    const void* target, void* gradient, int is_mean, double* sums, void* loss) {
  threads_of_loops = threads;
  const double factor = is_mean ? 1 / double(numel) : 1.0;
  const MseWork work{input, target, gradient, numel, factor, sums};
  const Divisors divisors{double(numel), double(numel)};
  const LossArgs finish{sums, norm_chunks(numel), factor,      &divisors,
                        loss, DType(dtype),       is_mean != 0};
  if (isa < 0) {
    host_mse(work, DType(dtype));
    host_finish_loss(finish);
  } else {
    cpu::mse(work, DType(dtype), cpu::Isa(isa), in_threads);
    finish_loss(finish, cpu::total(sums, norm_chunks(numel)));
  }
}

API void losses_scale(void* values, int64_t count, int dtype, const void* factor,
                      int factor_dtype) {
  host_scale({values, count, factor, DType(factor_dtype)}, DType(dtype));
}

API float losses_exponential(float x) { return exponential(x); }
API double losses_exponential_double(double x) { return exponential(x); }
API double losses_logarithm(double x) { return logarithm(x); }
