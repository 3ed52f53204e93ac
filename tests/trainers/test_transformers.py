"""Hugging Face's Trainer: as with torch.optim up to rounding, and resumed bit for bit."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import fusedopt

STEPS = 6
LR = 1e-3


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def make_model(lora: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    if lora:
        settings = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, settings)
    return model


def trained(folder: Path, optimizer: Any, lora: bool = False, **arguments: Any) -> Any:
    """A Trainer that has trained: optimizer(params), or a class with its arguments."""
    resume = arguments.pop("resume", None)
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": LR,
        "weight_decay": 0.1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no", "seed": 0,
    } | arguments  # fmt: skip
    model = make_model(lora)
    given: dict[str, Any] = {}
    if isinstance(optimizer, tuple):
        given["optimizer_cls_and_kwargs"] = optimizer
    else:
        given["optimizers"] = (optimizer([p for p in model.parameters() if p.requires_grad]), None)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Tokens(),
        **given,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_close(ours: Any, theirs: Any) -> None:
    got, want = weights_of(ours), weights_of(theirs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    begun = dict(make_model(hasattr(theirs.model, "peft_config")).named_parameters())
    changed = [not torch.equal(want[name], p.detach()) for name, p in begun.items()]
    assert any(changed)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "lora": {"lora": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_as_torch_optim(settings: str, tmp_path: Path) -> None:
    """By `optimizers=`, and by `optimizer_cls_and_kwargs=`."""
    options = SETTINGS[settings]
    for ours, theirs in (
        (
            lambda params: fusedopt.AdamW(params, lr=LR),
            lambda params: torch.optim.AdamW(params, lr=LR),
        ),
        ((fusedopt.AdamW, {"lr": LR}), (torch.optim.AdamW, {"lr": LR})),
    ):
        assert_close(trained(tmp_path, ours, **options), trained(tmp_path, theirs, **options))


def test_bfloat16(tmp_path: Path) -> None:
    """Under autocast: gradients are of float32 weights."""
    ours = trained(tmp_path, (fusedopt.AdamW, {"lr": LR}), bf16=True)
    theirs = trained(tmp_path, (torch.optim.AdamW, {"lr": LR}), bf16=True)
    # Where rounding differs, a matrix product in bfloat16 may round to a neighbour.
    for got, want in zip(weights_of(ours).values(), weights_of(theirs).values(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0.1 * STEPS * LR)


def test_clipped_within_the_step(tmp_path: Path) -> None:
    """`max_grad_norm=` of the optimizer in place of the Trainer's."""
    options = {"lr": LR, "max_grad_norm": 0.1}
    ours = trained(tmp_path, (fusedopt.AdamW, options), max_grad_norm=0.0)
    theirs = trained(tmp_path, (torch.optim.AdamW, {"lr": LR}), max_grad_norm=0.1)
    assert_close(ours, theirs)
    assert ours.optimizer.optimizer.grad_norm > 0.1


CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (fusedopt.AdamW, {}),
    "int8": (fusedopt.AdamW, {"state_dtype": "int8", "min_8bit_size": 1}),
    "lion": (fusedopt.Lion, {}),
    "averages": (fusedopt.AdamW, {"ema_decay": 0.9}),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("lora", [False, True])
def test_resumes_bit_for_bit(choice: str, lora: bool, tmp_path: Path) -> None:
    make, options = CHOICES[choice]
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2, "lora": lora}
    made = (make, {"lr": LR, **options})
    whole = trained(tmp_path / "run", made, **saving)
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    resumed = trained(tmp_path / "again", made, resume=str(checkpoint), **saving)
    for got, want in zip(weights_of(resumed).values(), weights_of(whole).values(), strict=True):
        assert torch.equal(got, want)
    states = [trainer.optimizer.optimizer.state for trainer in (resumed, whole)]
    for got, want in zip(*(s.values() for s in states), strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_gradient_release(tmp_path: Path) -> None:
    """Freed in the backward pass; the Trainer's own clipping would find nothing, so it is off."""
    releases: list[fusedopt.GradientRelease] = []

    def make(params: Any) -> fusedopt.AdamW:
        optimizer = fusedopt.AdamW(params, lr=LR)
        releases.append(fusedopt.GradientRelease(optimizer))
        return optimizer

    ours = trained(tmp_path, make, max_grad_norm=0.0)
    theirs = trained(tmp_path, lambda params: fusedopt.AdamW(params, lr=LR), max_grad_norm=0.0)
    for got, want in zip(weights_of(ours).values(), weights_of(theirs).values(), strict=True):
        assert torch.equal(got, want)
    assert all(p.grad is None for p in ours.model.parameters())
