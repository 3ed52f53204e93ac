"""What each further tensor costs a step: ``python -m benchmarks.studies.many_tensors``.

A step of AdamW over many small tensors, less one over a single tensor of as many elements, both in
cache. They take turns, and first deciles count: what else runs on the machine only adds time.
"""

import argparse
from time import perf_counter

import torch

import fusedopt

TENSORS, ELEMENTS = 1000, 1024


def make(tensors: int, elements: int) -> fusedopt.AdamW:
    params = [torch.zeros(elements, requires_grad=True) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(elements)
    return fusedopt.AdamW(params)


def first_decile(times: list[float]) -> float:
    return sorted(times)[len(times) // 10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    optimizers = make(TENSORS, ELEMENTS), make(1, TENSORS * ELEMENTS)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.rounds):
        for optimizer, taken in zip(optimizers, times, strict=True):
            begin = perf_counter()
            optimizer.step()
            taken.append(perf_counter() - begin)
    many, one = map(first_decile, times)
    print(f"{TENSORS} tensors {many * 1e6:.0f} us, one {one * 1e6:.0f} us")
    print(f"{(many - one) / TENSORS * 1e6:.3f} us a tensor")


if __name__ == "__main__":
    main()
