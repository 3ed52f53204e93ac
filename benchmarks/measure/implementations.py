"""Who is measured, as a table: torch, fusedopt, and other projects."""

from __future__ import annotations

import inspect

import torch

from benchmarks.measure.implementation import Implementation
from benchmarks.measure.scenarios import OptimizerSetup


def torch_fused_unavailable(setup: OptimizerSetup, device: torch.device) -> str | None:
    """Why torch has no usable fused step for this optimizer, or None."""
    if "fused" not in inspect.signature(getattr(torch.optim, setup.class_name)).parameters:
        return f"torch.optim.{setup.class_name} has no fused step"
    if setup.class_name == "SGD" and setup.dtype.itemsize == 2 and device.type == "cpu":
        return "torch's fused SGD skips half-precision parameters on a CPU (pytorch#191763)"
    return None


def codes_unavailable(setup: OptimizerSetup, device: torch.device) -> str | None:
    """Why the states of this optimizer must not be codes, or None."""
    of_weights = ("AdEMAMix", "Adagrad", "Rprop", "ASGD", "ScheduleFreeAdamW", "ScheduleFreeSGD")
    if setup.class_name in of_weights:
        return "a state is like a weight, or grows for ever: errors of codes would add up in it"
    return None


FLOAT32 = (torch.float32,)
GPU = ("cuda",)
INT8 = {"state_dtype": "int8"}
MASTERS = ("AdamW-master",)
IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        # A launch per tensor and operation: on a GPU that is out of the question.
        Implementation("torch-forloop", "torch.optim", {"foreach": False}, devices=("cpu",)),
        Implementation("torch-foreach", "torch.optim", {"foreach": True}),
        Implementation(
            "torch-fused", "torch.optim", {"fused": True}, unavailable=torch_fused_unavailable
        ),
        Implementation(
            "torch-fused-graph",
            "torch.optim",
            {"fused": True, "capturable": True},
            devices=GPU,
            graph=True,
            unavailable=torch_fused_unavailable,
        ),
        Implementation(
            "torch-compiled",
            "torch.optim",
            {"foreach": True},
            devices=("cpu",),
            most_tensors=10,
            compiled=True,
        ),
        Implementation("fusedopt", "fusedopt", ours=True),
        Implementation("fusedopt-flat", "fusedopt", {"flat": True}, ours=True),
        Implementation(
            "fusedopt-graph",
            "fusedopt",
            {"capturable": True},
            devices=GPU,
            ours=True,
            graph=True,
        ),
        Implementation(
            "fusedopt-int8",
            "fusedopt",
            INT8,
            dtypes=FLOAT32,
            exact=False,
            ours=True,
            unavailable=codes_unavailable,
        ),
        Implementation(
            "torch-fused-copies",
            "torch.optim",
            {"fused": True},
            setups=MASTERS,
            copies_masters=True,
        ),
        *(
            Implementation(
                f"fusedopt-{name}", "fusedopt", options, exact=False, ours=True, setups=MASTERS
            )
            for name, options in {
                "32": {"master_bits": 32},
                "24": {"master_bits": 24},
                "32-int8": {"master_bits": 32, **INT8},
                "stochastic": {"rounding": "stochastic"},
                "stochastic-int8": {"rounding": "stochastic", **INT8},
            }.items()
        ),
        Implementation(
            "apex",
            "apex.optimizers",
            classes={"AdamW": ("FusedAdam", {"adam_w_mode": True}), "SGD": ("FusedSGD", {})},
            package="apex",
            devices=GPU,
            dtypes=FLOAT32,
        ),
        Implementation(
            "transformer-engine",
            "transformer_engine.pytorch.optimizers",
            classes={"AdamW": ("FusedAdam", {"adam_w_mode": True}), "SGD": ("FusedSGD", {})},
            package="transformer-engine",
            devices=GPU,
            dtypes=FLOAT32,
        ),
        Implementation(
            "deepspeed",
            "deepspeed.ops.adam",
            classes={"AdamW": ("FusedAdam", {"adam_w_mode": True})},
            package="deepspeed",
            devices=GPU,
        ),
        Implementation(
            "deepspeed-cpu",
            "deepspeed.ops.adam",
            classes={"AdamW": ("DeepSpeedCPUAdam", {"adamw_mode": True})},
            package="deepspeed",
            devices=("cpu",),
            dtypes=FLOAT32,
        ),
        Implementation(
            "deepspeed-cpu-lion",
            "deepspeed.ops.lion",
            classes={"Lion": ("DeepSpeedCPULion", {})},
            package="deepspeed",
            devices=("cpu",),
            dtypes=FLOAT32,
        ),
        Implementation(
            "flashoptim",
            "flashoptim",
            {"quantize": False, "master_weight_bits": None},
            classes={"AdamW": ("FlashAdamW", {}), "SGD": ("FlashSGD", {})},
            package="flashoptim",
            devices=GPU,
        ),
        Implementation(
            "torch-optimi",
            "optimi",
            {"kahan_sum": False},
            classes={
                "AdamW": ("AdamW", {}),
                "SGD": ("SGD", {"torch_init": True}),
                "Lion": ("Lion", {}),
            },
            package="torch-optimi",
        ),
        Implementation(
            "bitsandbytes",
            "bitsandbytes.optim",
            classes={
                "AdamW": ("AdamW32bit", {}),
                "SGD": ("SGD32bit", {}),
                "RMSprop": ("RMSprop32bit", {}),
                "Lion": ("Lion32bit", {}),
                "AdEMAMix": ("AdEMAMix32bit", {"alpha": 2.0}),
            },
            package="bitsandbytes",
            dtypes=FLOAT32,
        ),
        Implementation(
            "bitsandbytes-8bit",
            "bitsandbytes.optim",
            classes={
                "AdamW": ("AdamW8bit", {}),
                "SGD": ("SGD8bit", {}),
                "RMSprop": ("RMSprop8bit", {}),
            },
            package="bitsandbytes",
            dtypes=FLOAT32,
            exact=False,
        ),
        *(
            Implementation(
                f"torchao-{name}",
                "torchao.optim",
                classes={"AdamW": (class_name, {})},
                package="torchao",
                dtypes=FLOAT32,
                exact=False,
                most_tensors=200,
                most_shapes=3,
            )
            for name, class_name in {
                "8bit": "AdamW8bit",
                "4bit": "AdamW4bit",
                "fp8": "AdamWFp8",
            }.items()
        ),
        Implementation(
            "torchao-8bit-stochastic",
            "torchao.optim",
            {"bf16_stochastic_round": True},
            classes={"AdamW": ("AdamW8bit", {})},
            package="torchao",
            exact=False,
            most_tensors=200,
            most_shapes=3,
            setups=MASTERS,
        ),
        Implementation(
            "torch-optimi-kahan",
            "optimi",
            {"kahan_sum": True},
            classes={"AdamW": ("AdamW", {})},
            package="torch-optimi",
            exact=False,
            setups=MASTERS,
        ),
        Implementation(
            "flashoptim-24-int8",
            "flashoptim",
            {"quantize": True, "master_weight_bits": 24},
            classes={"AdamW": ("FlashAdamW", {})},
            package="flashoptim",
            devices=GPU,
            exact=False,
            setups=MASTERS,
        ),
    )
}
