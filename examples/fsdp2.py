"""Train a model that is sharded among processes by FSDP2, save it, and go on at another world size.

    torchrun --nproc-per-node 2 examples/fsdp2.py --folder checkpoint
    torchrun --nproc-per-node 4 examples/fsdp2.py --folder checkpoint

bfloat16 weights with exact masters, states of one byte, and one clipping over all shards within the
step. The checkpoint is torch.distributed's, so that any world size can read it.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fusedopt

WIDTH, LAYERS, BATCH = 128, 4, 32


def main() -> None:
    """Train on each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="of the checkpoint, read where it exists")
    options = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if has_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if has_gpu else "cpu"
    if has_gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights on all processes
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to(device, torch.bfloat16)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = fusedopt.AdamW(
        model.parameters(), lr=1e-3, master_bits=32, state_dtype="int8", max_grad_norm=1.0
    )
    if options.folder is not None and options.folder.exists():
        states = get_state_dict(model, optimizer)
        saved = {"model": states[0], "optimizer": states[1]}
        dcp.load(saved, checkpoint_id=options.folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        if rank == 0:
            print(f"resumed on {world} processes")

    generator = torch.Generator().manual_seed(rank)
    for step in range(options.steps):
        inputs = torch.randn(BATCH, WIDTH, generator=generator).to(device, torch.bfloat16)
        loss = (model(inputs) - inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step}: loss {loss.item():.4f}, gradient norm {optimizer.grad_norm:.4f}")

    if options.folder is not None:
        states = get_state_dict(model, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=options.folder)
    dist.barrier()
    if rank == 0:
        print("done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
