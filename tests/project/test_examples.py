"""The examples run as their first lines say, learn something, and resume."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run(example: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / f"{example}.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )
    # Threads of gloo may abort a process that is done, and ends.
    aborted = bool(launcher) and "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or (aborted and done.stdout.endswith("done\n")), done.stderr
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(text) for text in re.findall(r"^step \d+: loss ([\d.]+)", output, re.MULTILINE)]


def test_train_gpt(tmp_path: Path) -> None:
    """With a break, the same bits as without one."""
    files = [str(tmp_path / name) for name in ("whole.pt", "broken.pt")]
    whole = run("train_gpt", "--steps", "30", "--checkpoint", files[0])
    first, last = losses(whole)
    assert last < first - 1
    run("train_gpt", "--steps", "30", "--stop", "12", "--checkpoint", files[1])
    resumed = run("train_gpt", "--steps", "30", "--checkpoint", files[1])
    assert losses(resumed) == [last]
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    saved = [torch.load(file) for file in files]
    for key, value in saved[0]["model"].items():
        assert torch.equal(value, saved[1]["model"][key])


def test_finetune_lora(tmp_path: Path) -> None:
    output = run("finetune_lora", "--steps", "40", "--output", str(tmp_path / "adapters.pt"))
    found = losses(output)
    assert found[-1] < 0.1 * found[0]
    assert "26 matrices are trained" in output
    adapters = torch.load(tmp_path / "adapters.pt")
    assert len(adapters) == 26 and all("linear" not in name for name in adapters)


def test_low_memory() -> None:
    output = run("low_memory", "--steps", "30", "--microbatches", "2")
    found = losses(output)
    assert found[-1] < 0.8 * found[0]
    assert "\n6.05 bytes a parameter" in output


def test_fsdp2(tmp_path: Path) -> None:
    """Saved on two processes, read by one."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    folder = str(tmp_path / "checkpoint")
    first = run("fsdp2", "--steps", "12", "--folder", folder, launcher=(*launch, "2"))
    assert "resumed" not in first and len(losses(first)) == 3
    again = run("fsdp2", "--steps", "2", "--folder", folder, launcher=(*launch, "1"))
    assert "resumed on 1 processes" in again
    assert losses(again)[0] < losses(first)[0]
