"""Train the emoji PixArt, diffusers' PixArtTransformer2DModel, on latents and token states.

    python -m examples.emoji.train_pixart                  # 600,000 samples: 6 hours on two idle cores
    python -m examples.emoji.train_pixart --device cuda

DiT's loss with learned variance on the linear chain of 1,000 timesteps; the caption is dropped one time in
ten. Four things make it learn names from few samples:

- Half of the timesteps are drawn evenly, half where shapes are decided (logit-normal, around t = 400).
- The loss of timestep t is weighted by 1 / alpha_bar_t, 50 at most. Up to there it is the loss of
  v-prediction (Salimans and Ho 2022, https://arxiv.org/abs/2202.00512). Without the weight, fine detail
  counts a thousand times as much as the choice of the thing.
- The caption projection starts as a whitening of the token states. Most of their variance lies in a few
  directions that all captions share.
- Half of the tokens skip the blocks between the first and the last, as in TREAD (Krause et al. 2025,
  https://arxiv.org/abs/2501.04765). While the learning rate falls, none do.

AdamW; the learning rate is warmed up, constant, and falls to 0 over the last fifth. The written weights are
an EMA.

Run the same command again to go on after an interruption: every iteration draws from its own seed, so an
interrupted training ends in the same weights as an uninterrupted one. `--samples` may be raised or lowered
when it goes on. The output is a folder in diffusers' pipeline layout (see `pipeline.py`), with samples.png.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from common import cli, pictures
from common.files import replacing
from diffusion import GaussianDiffusion, create_diffusion
from examples.emoji import data, encode, pipeline
from examples.emoji.state import TrainingState, iteration_seed, write_folder
from examples.emoji.text import CHANNELS

ALIAS_SHARE = 0.2  # of the captions that use a concept's second name
WARMUP, DECAY_SHARE = 500, 0.2
LARGEST_WEIGHT = 50.0  # of a timestep's loss
SHRINKAGE = 0.1  # of the whitening, in mean variances of a channel
SHOWN = 48  # pictures of samples.png: a third each of seen pairs, held-out pairs, held-out concepts


def build_pixart(width: int = 224, depth: int = 12, heads: int = 7):
    """A fresh transformer for 16 x 16 x 4 latents (64 tokens), initialised as DiT and PixArt-alpha are."""
    from diffusers import PixArtTransformer2DModel  # slow to import

    model = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        cross_attention_dim=width,
        num_layers=depth,
        in_channels=4,
        out_channels=8,
        sample_size=data.SIZE // 4,
        patch_size=2,
        caption_channels=CHANNELS,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    embedder = model.adaln_single
    caption = model.caption_projection
    for linear in (embedder.linear, *embedder.emb.timestep_embedder.children(), *caption.children()):
        if isinstance(linear, torch.nn.Linear):
            torch.nn.init.normal_(linear.weight, std=0.02)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


@torch.no_grad()
def whiten_captions(projection, states: Tensor) -> None:
    """Initialise a caption projection so that token states come out with unit variance, uncorrelated.

    projection: diffusers' PixArtAlphaTextProjection. states: (tokens, channels), those of the training.
    """
    mean, covariance = states.mean(0), torch.cov(states.T)
    variances, directions = torch.linalg.eigh(covariance)
    scale = (variances.clamp(min=0) + SHRINKAGE * variances.mean()).rsqrt()
    first, second = projection.linear_1, projection.linear_2
    rotation = torch.linalg.qr(torch.randn(len(mean), first.out_features, device=states.device)).Q.T
    first.weight.copy_(rotation @ (directions * scale) @ directions.T)
    first.bias.copy_(-first.weight @ mean)
    torch.nn.init.normal_(second.weight, std=1.5 / second.in_features**0.5)  # 1.5: GELU shrinks


def predict(model, x_t: Tensor, timesteps: Tensor, states: Tensor, mask: Tensor, skipping: float) -> Tensor:
    """The transformer's output (n, 2C, H, W); a random share `skipping` of the tokens runs two blocks only.

    All tokens run the first and the last block; those that skip the others join again before the last.
    """
    if not skipping:
        return model(
            x_t,
            encoder_hidden_states=states,
            timestep=timesteps,
            encoder_attention_mask=mask,
            added_cond_kwargs=NO_SIZES,
            return_dict=False,
        )[0]
    n, blocks = len(x_t), model.transformer_blocks
    tokens = model.pos_embed(x_t)
    modulation, embedded = model.adaln_single(timesteps, NO_SIZES, batch_size=n, hidden_dtype=tokens.dtype)
    captions = model.caption_projection(states)
    bias = (1 - mask[:, None].to(tokens.dtype)) * -10_000  # as diffusers masks padding

    def run(block, tokens: Tensor) -> Tensor:
        return block(tokens, encoder_hidden_states=captions, encoder_attention_mask=bias, timestep=modulation)

    tokens = run(blocks[0], tokens)
    kept = round((1 - skipping) * tokens.shape[1])
    order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1)
    indices = order[:, :kept, None].expand(-1, -1, tokens.shape[2])
    routed = tokens.gather(1, indices)
    for block in blocks[1:-1]:
        routed = run(block, routed)
    tokens = run(blocks[-1], tokens.scatter(1, indices, routed))
    shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
    patches = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)
    patch, side = model.config.patch_size, x_t.shape[-1] // model.config.patch_size
    grid = patches.unflatten(1, (side, side)).unflatten(-1, (patch, patch, -1))  # n, h, w, p, q, C
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


NO_SIZES = {"resolution": None, "aspect_ratio": None}


def loss_weights(diffusion: GaussianDiffusion) -> Tensor:
    """(timesteps,) weight of each timestep's loss: 1 / alpha_bar, LARGEST_WEIGHT at most."""
    return torch.from_numpy(1 / diffusion.alphas_cumprod).float().clamp(max=LARGEST_WEIGHT)


def draw_timesteps(n: int, num_timesteps: int, device: str = "cpu") -> Tensor:
    """Timesteps (n,): half of them even over the chain, half logit-normal around its 40 %."""
    even = torch.rand(n, device=device)
    middle = torch.sigmoid(torch.randn(n, device=device) - 0.4)
    share = torch.where(torch.rand(n, device=device) < 0.5, even, middle)
    return (share * num_timesteps).long().clamp(max=num_timesteps - 1)


def pixart_loss(
    model,
    diffusion: GaussianDiffusion,
    encoded: encode.Encoded,
    train: Tensor,
    batch_size: int,
    dropout: float,
    skipping: float,
    weights: Tensor,
) -> Tensor:
    """Mean weighted training loss of a random batch out of the pictures `train` (indices).

    skipping: as in `predict`. weights: of the timesteps, see `loss_weights`.
    """
    device = encoded.latents.device
    batch = train[torch.randint(len(train), (batch_size,), device=device)]
    alias = (torch.rand(batch_size, device=device) < ALIAS_SHARE).long()
    captions = encoded.caption(encoded.concept[batch], encoded.style[batch], alias)
    dropped = torch.rand(batch_size, device=device) < dropout
    states, mask = encoded.text.batch(torch.where(dropped, encoded.null_caption, captions))
    x_0 = encoded.latents[batch]
    steps = draw_timesteps(batch_size, diffusion.num_timesteps, device)
    noise = torch.randn_like(x_0)
    x_t = diffusion.add_noise(x_0, steps, noise)
    output = predict(model, x_t, steps, states, mask, skipping)
    losses = diffusion.training_loss(output, x_0, x_t, noise, steps)
    return (losses * weights[steps]).mean()


def training_states(encoded: encode.Encoded, train: Tensor) -> Tensor:
    """Token states (tokens, channels) of the captions of the pictures `train`."""
    states, mask = encoded.text.batch(encoded.caption(encoded.concept[train], encoded.style[train]))
    return states[mask]


class Average:
    """Exponential moving average of a model's parameters: `decay` at last, less in the first iterations."""

    def __init__(self, model, decay: float):
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [p.detach() for p in model.parameters()]
        self.values = [p.clone() for p in self.parameters]
        self.decay = decay

    def update(self, iteration: int) -> None:
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])


def learning_rate(iteration: int, peak: float, iterations: int) -> float:
    """Linear warm-up, constant, and linear to 0 over the last fifth of `iterations`."""
    left = (iterations - iteration) / (DECAY_SHARE * iterations)
    return peak * min(1.0, (iteration + 1) / WARMUP, left)


def shown_pictures(encoded: encode.Encoded, n: int = SHOWN) -> Tensor:
    """Indices of the pictures whose captions samples.png draws: a third of each split, spread evenly."""
    parts = []
    for split in (data.TRAIN, data.HELD_OUT_PAIR, data.HELD_OUT_CONCEPT):
        of_split = torch.nonzero(encoded.split == split)[:, 0]
        parts.append(of_split[torch.linspace(0, len(of_split) - 1, n // 3).long()])
    return torch.cat(parts)


def write(model, ema: Average, encoded: encode.Encoded, args: argparse.Namespace) -> None:
    """The EMA weights (fp16) as a pipeline folder, and samples.png, which they drew.

    Below the samples stand the real pictures as the VAE decodes them.
    """
    averaged = build_pixart(args.width, args.depth, args.heads)
    averaged.load_state_dict(model.state_dict() | ema.state_dict())
    pipe = pipeline.assemble(averaged.half(), args.vae)
    write_folder(pipe, args.output)
    averaged.float()
    shown = shown_pictures(encoded).to(encoded.latents.device)
    captions = encoded.caption(encoded.concept[shown], encoded.style[shown])
    pipe.to(encoded.latents.device)
    samples = pipeline.draw(pipe, encoded.text, captions, encoded.null_caption)
    real = pipeline.decode(pipe, encoded.latents[shown])
    title = "samples: seen pairs, held-out pairs, held-out concepts"
    parts = [(title, samples), ("real, through the VAE", real)]
    with replacing(args.output / "samples.png") as partial:
        pictures.comparison(parts, columns=SHOWN // 3).save(partial)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the emoji PixArt.")
    parser.add_argument("--data", type=Path, default=data.FOLDER / "encoded.safetensors")
    parser.add_argument("--vae", type=Path, default=data.FOLDER / "vae", help="folder that train_vae wrote")
    parser.add_argument("--samples", type=cli.positive_int, default=600_000)
    parser.add_argument("--batch-size", type=cli.positive_int, default=32)
    parser.add_argument("--lr", type=cli.positive, default=1e-3, help="its highest value")
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    parser.add_argument("--token-skipping", type=cli.threshold, default=0.5, help="share of the tokens")
    parser.add_argument("--width", type=cli.positive_int, default=224)
    parser.add_argument("--depth", type=cli.positive_int, default=12)
    parser.add_argument("--heads", type=cli.positive_int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=240, help="seconds between saved states")
    parser.add_argument("--show-every", type=float, default=3600, help="seconds between written weights")
    parser.add_argument("--output", type=Path, default=data.FOLDER / "pixart", help="pipeline folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not divisible by --heads {args.heads}")
    return args


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    encoded = encode.load(args.data, args.device)
    train = torch.nonzero(encoded.split == data.TRAIN)[:, 0]
    model = build_pixart(args.width, args.depth, args.heads).to(args.device).train()
    whiten_captions(model.caption_projection, training_states(encoded, train))
    ema = Average(model, args.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True
    )
    diffusion = create_diffusion()
    weights = loss_weights(diffusion).to(args.device)
    names = ("batch_size", "lr", "ema_decay", "caption_dropout", "token_skipping")
    names += ("width", "depth", "heads", "seed")
    settings = {name: getattr(args, name) for name in names} | {"data": encoded.digest}
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    state = TrainingState(args.output.with_suffix(".training.pt"), settings, parts)
    state.resume()
    iterations = -(-args.samples // args.batch_size)

    began, losses = time.monotonic() - state.seconds, []
    saved = shown = time.monotonic()
    for iteration in range(state.iteration, iterations):
        torch.manual_seed(iteration_seed(args.seed, iteration))
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, args.lr, iterations)
        skipping = args.token_skipping if iteration < (1 - DECAY_SHARE) * iterations else 0.0
        loss = pixart_loss(
            model, diffusion, encoded, train, args.batch_size, args.caption_dropout, skipping, weights
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(iteration)
        losses.append(loss.detach())
        done, now = iteration + 1, time.monotonic()
        if now - saved >= args.save_every or done == iterations:
            state.save(done, now - began)
            mean = torch.stack(losses).mean().item()
            record = {"samples": done * args.batch_size, "loss": round(mean, 5)}
            record |= {"lr": round(optimizer.param_groups[0]["lr"], 7), "seconds": round(state.seconds)}
            print(json.dumps(record), flush=True)
            losses.clear()
            saved = now
        if now - shown >= args.show_every and done < iterations:
            write(model, ema, encoded, args)
            shown = time.monotonic()
    write(model, ema, encoded, args)
    print(f"wrote {args.output} after {state.iteration * args.batch_size} samples, {state.seconds:.0f} s")


if __name__ == "__main__":
    cli.run(main, parse_args())
