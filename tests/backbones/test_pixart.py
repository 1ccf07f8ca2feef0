"""PixArt as a backbone: the contract, MACs, the pipeline's numbers, and training through the hooks."""

from functools import partial

import diffusers
import pytest
import torch
from conftest import relative_error
from tiny_pipeline import quiet, vae
from tiny_transformers import pixart

from backbones import scheduled
from backbones.denoiser import Denoiser, arrive, executed
from backbones.families import find_branches
from backbones.macs import count_macs
from backbones.pixart import PixArt, random_pixart, random_prompts
from backbones.pixart_models import PIXART
from cache import FittingCache, SoftCache, StaticCache
from diffusion import WithNoise, create_diffusion, create_sampler
from objectives import image_error_proxy, train_trajectory
from router import Router, Schedule
from sampling.loop import Trajectory, denoise_loop, draw_step_noise, generate, sample

T = 6


@pytest.fixture
def model():
    made = PixArt(pixart().requires_grad_(False), random_prompts(5, 7, 16))
    yield made
    made.close()


def noise_and_labels(n: int = 2):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(n)


def random_schedule(columns: int) -> Schedule:
    return Schedule(torch.rand(T, columns, generator=torch.Generator().manual_seed(3)) > 0.4)


def test_macs_are_those_of_the_formulas(model):
    """Self-attention as in DiT; cross-attention reads the caption's tokens; the MLP is four times as wide."""
    n, d, text = 16, 32, 7
    attn1 = 4 * n * d**2 + 2 * n**2 * d
    attn2 = 2 * n * d**2 + 2 * text * d**2 + 2 * n * text * d
    assert model.branch_macs == (attn1, attn2, 8 * n * d**2) * 2


def test_macs_of_every_family_add_up():
    from tiny_transformers import FAMILIES, inputs

    for make in FAMILIES.values():
        transformer = make()
        branches, others = count_macs(transformer, inputs(transformer, 500.0, 0, n=1))
        assert len(branches) == len(find_branches(transformer))
        assert min(branches) > 0
        assert others > 0


def test_the_known_models_have_84_branches():
    for name in PIXART:
        with torch.device("meta"):
            transformer = diffusers.PixArtTransformer2DModel(**PIXART[name].config())
        assert len(find_branches(transformer)) == 84, name
        parameters = sum(parameter.numel() for parameter in transformer.parameters())
        assert 605e6 < parameters < 615e6, name  # 611 M in the papers' terms


def test_the_backbone_draws_what_the_pipeline_draws():
    """The same prompts, noise, guidance and schedule on two roads: our loop, and diffusers' pipeline."""
    transformer, prompts = pixart().requires_grad_(False), random_prompts(3, 7, 16)
    noise, labels = noise_and_labels()
    schedule = random_schedule(6)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="leading", steps_offset=0,
    )  # fmt: skip
    pipe = quiet(diffusers.PixArtSigmaPipeline(None, None, vae(), transformer, scheduler))
    states, mask = prompts.batch([*labels.tolist(), 3, 3])
    with scheduled(pipe, schedule):
        wanted = pipe(
            prompt_embeds=states[:2], prompt_attention_mask=mask[:2], negative_prompt_embeds=states[2:],
            negative_prompt_attention_mask=mask[2:], negative_prompt=None, latents=noise.clone(),
            num_inference_steps=T, guidance_scale=4.5, height=8, width=8, use_resolution_binning=False,
            output_type="latent",
        ).images  # fmt: skip
    model = PixArt(transformer, prompts)
    stride = 1000 // T
    chain = create_diffusion("")
    chain = type(chain)(1000, [stride * k for k in range(T)])
    assert scheduler.timesteps.tolist() == chain.timestep_map[::-1]
    found = generate(model, chain, labels, noise, cfg_scale=4.5, schedule=schedule)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_x_stays_in_float32_whatever_the_models_dtype():
    model = PixArt(pixart().requires_grad_(False).bfloat16(), random_prompts(5, 7, 16))
    noise, labels = noise_and_labels()
    x_0 = generate(model, create_diffusion(str(T)), labels, noise, cfg_scale=4.5)
    assert x_0.dtype == torch.float32
    assert not torch.equal(x_0, x_0.bfloat16().float())


def test_a_schedule_that_computes_all_is_uncached(model):
    noise, labels = noise_and_labels()
    chain = create_diffusion(str(T))
    plain = generate(model, chain, labels, noise, cfg_scale=4.5)
    everything = Schedule(torch.ones(T, model.num_branches, dtype=torch.bool))
    assert torch.equal(generate(model, chain, labels, noise, cfg_scale=4.5, schedule=everything), plain)


def test_sdt_is_what_the_equations_say(model):
    """Three trajectories of training, beside the same with branches written out in forwards without hooks."""
    noise, labels = noise_and_labels()
    chain = create_diffusion(str(T))
    routers = [Router(T, model.num_branches, torch.Generator().manual_seed(0)) for _ in range(2)]
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01, weight_decay=0.0) for one in routers]
    ones = torch.ones(T)
    for _ in range(3):
        for _ in train_trajectory(
            model, chain, routers[0], optimizers[0], noise, labels, 4.5, 0.1, ones, 1e-5
        ):
            pass
    plain = Plain(pixart().requires_grad_(False), model)
    for _ in range(3):
        plain.train(chain, routers[1], optimizers[1], noise, labels)
    assert torch.allclose(routers[0].logits, routers[1].logits, atol=1e-6)
    assert (routers[0].logits - Router(T, 6, torch.Generator().manual_seed(0)).logits).abs().max() > 0.01


class Plain:
    """SDT on a PixArt transformer whose blocks are written out here: no hooks, no policies."""

    def __init__(self, transformer, model: PixArt):
        self.transformer, self.model = transformer, model

    def forward(self, x, t, condition, blend):
        transformer, n = self.transformer, len(x)
        bias = ((1 - condition.mask) * -10000.0).unsqueeze(1)
        h = transformer.pos_embed(x)
        added = {"resolution": None, "aspect_ratio": None}
        temb, embedded = transformer.adaln_single(
            torch.full((n,), t), added, batch_size=n, hidden_dtype=h.dtype
        )
        text = transformer.caption_projection(condition.states)
        for i, block in enumerate(transformer.transformer_blocks):
            table = block.scale_shift_table[None] + temb.reshape(n, 6, -1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
            h = h + gate * blend(3 * i, block.attn1(block.norm1(h) * (1 + scale) + shift))
            attended = block.attn2(h, encoder_hidden_states=text, attention_mask=bias)
            h = h + blend(3 * i + 1, attended)
            h = h + gate_mlp * blend(3 * i + 2, block.ff(block.norm2(h) * (1 + scale_mlp) + shift_mlp))
        shift, scale = (transformer.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        h = transformer.proj_out(transformer.norm_out(h) * (1 + scale) + shift)
        side = x.shape[-1] // 2
        h = h.reshape(n, side, side, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(n, 8, x.shape[-1], x.shape[-1])

    def guided(self, *arguments):
        out = self.forward(*arguments)
        uncond, cond = out[:, :4].chunk(2)
        guided = uncond + 4.5 * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, 4:]], dim=1)

    def train(self, chain, router, optimizer, noise, labels):
        condition = self.model.condition(labels, True)
        x, stored = torch.cat([noise, noise]), {}
        for step in reversed(range(T)):
            t = chain.timestep_map[step]

            def blended(index, new, step=step):
                if step == T - 1:
                    stored[index] = new
                    return new
                score = torch.sigmoid(router.rows[step][index])
                out = score * new + (1 - score) * stored[index]
                if score > 0.1:
                    stored[index] = out.detach()
                return out

            if step == T - 1:
                with torch.no_grad():
                    routed = self.guided(x, t, condition, blended)
            else:
                with torch.no_grad():
                    teacher = self.guided(x, t, condition, lambda _, new: new)
                routed = self.guided(x, t, condition, blended)
                loss = (teacher - routed).square().mean() + 1e-5 * torch.sigmoid(router.rows[step]).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                router.clamp_(step)
            x = chain.ddim_step(routed.detach(), x, step)
            x = torch.cat([x[: len(noise)]] * 2)


def test_lambda_and_soft_caches_run_through_the_hooks(model):
    noise, labels = noise_and_labels()
    router = Router(T, model.num_branches, torch.Generator().manual_seed(0))
    weights = image_error_proxy(model, create_diffusion(str(T)), router, noise, labels, 4.5, 0.1)
    assert (weights[:-1] > 0).all()
    assert weights[-1] == 0
    chain, ones = create_diffusion(str(T)), SoftCache(torch.ones(T, model.num_branches), 0.1)
    denoise = Denoiser(model, chain, labels, 4.5)
    with torch.no_grad():
        plain = arrive(denoise.advance, denoise.start(noise), executed(T))
        soft = arrive(
            lambda state, step: denoise.advance(state, step, ones), denoise.start(noise), executed(T)
        )
    assert torch.equal(plain.x, soft.x)


def test_reused_branches_leave_their_norms_out(model):
    """`predict` knows from the policy which branches it will compute."""
    schedule = Schedule(torch.zeros(T, model.num_branches, dtype=torch.bool))
    cache, tokens = StaticCache(schedule), []
    denoise = Denoiser(model, create_diffusion(str(T)), torch.arange(2), 4.5, cache.computed)
    block = model.transformer.transformer_blocks[0]
    block.norm2.register_forward_hook(lambda _module, _args, output: tokens.append(output.shape[1]))
    state = denoise.start(noise_and_labels()[0])
    with torch.no_grad():
        arrive(partial(denoise.advance, cache=cache), state, executed(T))
    assert tokens == [16] + [0] * (T - 1)


def test_prompts_of_another_encoder_are_refused():
    with pytest.raises(ValueError, match="the prompts have 12 channels, the transformer takes 16"):
        PixArt(pixart(), random_prompts(2, 7, 12))


def test_sizes_that_patches_do_not_fill_are_refused():
    with pytest.raises(ValueError, match="both must be multiples of 16"):
        PixArt(pixart(), random_prompts(2, 7, 16), (64, 72))


def test_micro_conditions_are_those_of_the_image():
    transformer = random_pixart(
        "PixArt-alpha-1024", num_layers=1, num_attention_heads=4, attention_head_dim=12,
        cross_attention_dim=48,
        sample_size=8, caption_channels=16,
    )  # fmt: skip
    model = PixArt(transformer, random_prompts(2, 7, 16), (64, 128))
    condition = model.condition(torch.tensor([1]), guided=True)
    assert condition.resolution.tolist() == [[64, 128]] * 2
    assert condition.aspect_ratio.tolist() == [[0.5]] * 2
    x_0 = generate(
        model, create_diffusion(str(T)), torch.tensor([1]), torch.randn(1, 4, 8, 16), cfg_scale=4.5
    )
    assert x_0.isfinite().all()


@pytest.mark.parametrize("sampler", ["dpm-solver++", "sa-solver"])
def test_solved_weights_reuse_as_the_calibration_did(model, sampler):
    """Sampling the calibration's own noise under its weights gives the calibration's x_0."""
    noise, labels = noise_and_labels()
    trajectory = Trajectory.of(model, create_diffusion(str(T)), 4.5, sampler, random_schedule(6))
    generator = torch.Generator().manual_seed(4)
    step_noise = draw_step_noise(trajectory, noise, generator)
    fitting = FittingCache(trajectory.schedule.compute, 2)
    *_, (_, fitted) = denoise_loop(trajectory, labels, noise, fitting, step_noise)
    solved = Schedule(trajectory.schedule.compute, weights=fitting.weights.float())
    own = Trajectory.of(model, create_diffusion(str(T)), 4.5, sampler, solved)
    found = sample(own, labels, noise, torch.Generator().manual_seed(4))
    assert relative_error(found, fitted) < 1e-4
    plain = sample(trajectory, labels, noise, torch.Generator().manual_seed(4))
    assert relative_error(plain, fitted) > 1e-3


def test_iddpm_is_ddpm_guided_in_three_channels(model):
    noise, labels = noise_and_labels()
    chain = create_diffusion(str(T))
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    found = generate(model, chain, labels, noise, 4.5, "iddpm", generator=generators[0])
    four = model.guide
    model.guide = lambda out, scale: four(out, scale, 3)
    wanted = generate(model, chain, labels, noise, 4.5, "ddpm", generator=generators[1])
    del model.guide
    assert torch.equal(found, wanted)
    other = generate(model, chain, labels, noise, 4.5, "ddpm", generator=torch.Generator().manual_seed(7))
    assert not torch.equal(found, other)


@pytest.mark.parametrize("sampler", ["dpm-solver++", "sa-solver", "iddpm"])
def test_training_under_other_samplers(model, sampler):
    """With noise drawn beforehand every loop of training runs on every sampler, and repeats."""
    noise, labels = noise_and_labels()
    step_noise = torch.randn(T, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    logits = []
    for _ in range(2):
        chosen = WithNoise(create_sampler(sampler, create_diffusion(str(T))), step_noise)
        router = Router(T, model.num_branches, torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(router.parameters(), lr=0.01, weight_decay=0.0)
        weights = image_error_proxy(model, chosen, router, noise, labels, 4.5, 0.1)
        steps = list(train_trajectory(
            model, chosen, router, optimizer, noise, labels, 4.5, 0.1, weights, 1e-5
        ))  # fmt: skip
        assert len(steps) == T - 1
        logits.append(router.logits)
    assert torch.equal(*logits)


def test_a_model_that_predicts_noise_is_refused_by_a_sampler_of_velocity(model):
    noise, labels = noise_and_labels()
    with pytest.raises(ValueError, match="FlowEuler needs a model that predicts velocity, this"):
        generate(model, create_diffusion(str(T)), labels, noise, 4.5, "flow-euler")


def test_training_under_the_librarys_checkpointing_is_refused(model):
    noise, labels = noise_and_labels()
    model.transformer.enable_gradient_checkpointing()
    router = Router(T, model.num_branches, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.01)
    arguments = (
        model,
        create_diffusion(str(T)),
        router,
        optimizer,
        noise,
        labels,
        4.5,
        0.1,
        torch.ones(T),
        1e-5,
    )
    with pytest.raises(ValueError, match="use --recompute-branches"):
        list(train_trajectory(*arguments))
