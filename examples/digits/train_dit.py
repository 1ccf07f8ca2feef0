"""Train the digits DiT on a CPU (or a GPU) and write its EMA weights to examples/digits/dit.safetensors.

    python -m examples.digits.train_dit

To resume, run the same command again. The state is saved every `--save-every` iterations and each iteration
draws from its own seed, so an interrupted training ends in the same weights as an uninterrupted one.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from common import cli
from common.files import replacing
from diffusion import GaussianDiffusion, create_diffusion
from examples.digits import MODEL
from examples.digits.data import digit_images
from models import DiT, DiT_models

WEIGHTS = Path(__file__).parent / "dit.safetensors"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the digits DiT.")
    parser.add_argument("--iterations", type=cli.positive_int, default=7_000, help="default: 7000")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="default: 128")
    parser.add_argument(
        "--lr",
        type=cli.positive,
        default=1e-3,
        help="peak learning rate, after a warm-up of 200 iterations and before a cosine to 0; default: 1e-3",
    )
    parser.add_argument("--ema-decay", type=cli.below_one, default=0.999, help="default: 0.999")
    parser.add_argument("--seed", type=cli.seed, default=0, help="default: 0")
    parser.add_argument(
        "--save-every", type=cli.positive_int, default=500, help="iterations between states; default: 500"
    )
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS, help="file of the weights; default: the committed one"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU if there is one",
    )
    return parser.parse_args()


def learning_rate(iteration: int, iterations: int, peak: float) -> float:
    """Linear warm-up over 200 iterations, times a cosine from the peak to 0."""
    warmup = min(1.0, (iteration + 1) / 200)
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def train_iteration(
    model: DiT,
    diffusion: GaussianDiffusion,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
) -> Tensor:
    """One optimizer step on a random batch at random timesteps; returns the mean loss."""
    device = images.device
    batch = torch.randint(len(images), (batch_size,), device=device)
    x_0, y = images[batch], labels[batch]
    steps = torch.randint(diffusion.num_timesteps, (batch_size,), device=device)
    noise = torch.randn_like(x_0)
    x_t = diffusion.add_noise(x_0, steps, noise)
    loss = diffusion.training_loss(model(x_t, steps, y), x_0, x_t, noise, steps).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = DiT_models[MODEL]().to(args.device).train()
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    diffusion = create_diffusion()
    images, labels = (tensor.to(args.device) for tensor in digit_images())

    state_path = args.output.with_suffix(".training.pt")
    settings = {
        "iterations": args.iterations,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
    }
    settings["ema_decay"] = args.ema_decay
    start, seconds = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=args.device, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{state_path} is from other settings, {state['settings']}; use those or remove it"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start, seconds = state["ema"], state["iteration"], state["seconds"]
        print(f"resuming from iteration {start}")

    began, losses = time.monotonic() - seconds, []
    for iteration in tqdm(range(start, args.iterations), initial=start, total=args.iterations, disable=None):
        torch.manual_seed((args.seed + 1_000_003 * (iteration + 1)) % 2**64)
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, args.iterations, args.lr)
        losses.append(train_iteration(model, diffusion, optimizer, images, labels, args.batch_size))
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 1 - args.ema_decay)
        done = iteration + 1
        if done % args.save_every == 0 or done == args.iterations:
            seconds = time.monotonic() - began
            loss = torch.stack(losses).mean().item()
            losses.clear()
            print(f"iteration {done}: loss {loss:.4f}, {seconds:.0f} s", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
            state["settings"] = settings
            with replacing(state_path) as partial:
                torch.save(state | {"iteration": done, "seconds": seconds}, partial)

    names = [name for name, _ in model.named_parameters()]
    weights = {name: tensor.cpu().contiguous() for name, tensor in zip(names, ema, strict=True)}
    with replacing(args.output) as partial:
        save_file(weights, partial, metadata={"training": json.dumps(settings)})
    print(f"wrote {args.output} after {seconds:.0f} s of training")


if __name__ == "__main__":
    cli.run(main, parse_args())
