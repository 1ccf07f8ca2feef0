import copy

import pytest
import torch
from conftest import relative_error

from backbones.denoiser import Denoiser
from backbones.loading import load_model
from cache import SoftCache
from diffusion import create_diffusion
from models import DiT
from objectives import (
    DATA_LOSSES,
    PROXY_DEFINITIONS,
    Pair,
    Variant,
    image_error_proxy,
    step_errors,
    train_pair,
    train_pairs,
    train_trajectory,
)
from router import Router
from sampling.loop import generate


@pytest.fixture(scope="module")
def training(case, expected, reference_model):
    """The reference training: what our code computes at every point that the reference states."""

    diffusion = create_diffusion(str(case["num_sampling_steps"]))
    router = Router.from_logits(expected["train.init_prob"])
    optimizer = torch.optim.AdamW(router.parameters(), lr=case["lr"], weight_decay=0.0)
    proxies, losses, logits = {name: [] for name in PROXY_DEFINITIONS}, [], []
    for trajectory in range(case["epochs"]):
        noise, labels = expected["train.noise"][trajectory], expected["train.labels"][trajectory]
        if trajectory * diffusion.num_timesteps % case["lambda_c"] == 0:
            for name in PROXY_DEFINITIONS:
                proxies[name].append(
                    image_error_proxy(
                        reference_model,
                        diffusion,
                        router,
                        noise,
                        labels,
                        case["cfg_scale"],
                        case["thres"],
                        name,
                    )
                )
        updates = train_trajectory(
            reference_model, diffusion, router, optimizer, noise, labels, case["cfg_scale"], case["thres"],
            proxies["released"][-1], case["l1"],
        )  # fmt: skip
        losses.append(torch.stack([torch.stack([u.loss, u.data_loss, u.score_sum]) for u in updates]))
        logits.append(router.logits.detach().clone())
    return {"proxies": proxies, "losses": losses, "logits": logits}


@pytest.mark.parametrize("definition", PROXY_DEFINITIONS)
@pytest.mark.parametrize("refresh", [0, 1])
def test_proxy_weights_match_the_released_ones(training, expected, definition, refresh):
    reference = expected[f"train.lambda_{definition}"][refresh][:-1]
    assert relative_error(training["proxies"][definition][refresh][:-1], reference) < 1e-5


@pytest.mark.parametrize("trajectory", range(4))
def test_losses_and_logits_match_the_released_training(training, expected, trajectory):
    for column in range(3):
        reference = expected["train.losses"][trajectory][:, column]
        assert relative_error(training["losses"][trajectory][:, column], reference) < 1e-4
    assert (
        relative_error(training["logits"][trajectory], expected["train.prob_after_epoch"][trajectory]) < 1e-4
    )


def naive_proxy(model, diffusion, router, noise, labels, cfg_scale, threshold, definition):
    """Straight from the definition: T whole trajectories, nothing shared."""
    from backbones.denoiser import Denoiser
    from cache import SoftCache

    def x0(routed: set[int]):
        scores = router.scores().detach().clone()
        scores[[step for step in range(len(scores)) if step not in routed]] = 1.0
        cache, denoise = SoftCache(scores, threshold), Denoiser(model, diffusion, labels, cfg_scale)
        x_t = denoise.start(noise).x
        for step in reversed(range(diffusion.num_timesteps)):
            x_t = diffusion.ddim_step(denoise(x_t, step, cache), x_t, step)
        return x_t

    last = diffusion.num_timesteps - 1
    if definition == "paper":
        x_0 = x0(set(range(last)))
        passes = [(x0(set(range(last)) - {i}), x_0) for i in range(last)]
    else:
        passes = [(x0(set(range(i, last))), x0(set(range(i + 1, last)))) for i in range(last)]
    return torch.stack([(a - b).square().mean() for a, b in passes] + [noise.new_zeros(())])


@pytest.mark.parametrize("definition", PROXY_DEFINITIONS)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_sharing_prefixes_changes_no_proxy(tiny_model, ten_steps, tiny_batch, definition, cfg_scale):
    """In float64: the last steps change x_0 by less than float32 resolves."""
    noise, labels = tiny_batch
    router = Router(10, 4, torch.Generator().manual_seed(3)).double()
    model = copy.deepcopy(tiny_model).double()
    arguments = (model, ten_steps, router, noise.double(), labels, cfg_scale, 0.4, definition)
    with torch.no_grad():
        naive = naive_proxy(*arguments)
    assert (naive[:-1] > 1e-12).all()  # every step matters
    torch.testing.assert_close(image_error_proxy(*arguments), naive, rtol=1e-6, atol=0)


def test_prefix_sharing_halves_the_forwards(tiny_model, ten_steps, tiny_batch, monkeypatch):
    """55 = 10 + 9 + ... + 1: of pass i the steps from i on, and the routed or the uncached run itself."""
    calls = []
    predict = type(tiny_model).predict
    monkeypatch.setattr(type(tiny_model), "predict", lambda *a, **k: calls.append(1) or predict(*a, **k))
    noise, labels = tiny_batch
    for definition in PROXY_DEFINITIONS:
        calls.clear()
        image_error_proxy(tiny_model, ten_steps, Router(10, 4), noise, labels, 1.5, 0.1, definition)
        assert len(calls) == 55  # naively 100


def test_unknown_proxy_is_refused(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    with pytest.raises(ValueError, match="'papers' is unknown"):
        image_error_proxy(tiny_model, ten_steps, Router(10, 4), noise, labels, 1.5, 0.1, "papers")


def test_a_step_updates_its_own_row_only(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    router = Router(10, 4, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0)
    before = router.logits.detach().clone()
    arguments = (tiny_model, ten_steps, router, optimizer, noise, labels, 1.5, 0.1, torch.ones(10), 1e-3)
    for update in train_trajectory(*arguments):
        changed = (router.logits != before).any(1).nonzero().flatten().tolist()
        assert changed == list(range(update.step, 9))
        if update.step == 5:
            break
    assert torch.equal(router.logits[9], torch.full((4,), 5.0))


def test_gradient_of_a_row_equals_finite_differences(tiny_model, ten_steps, tiny_batch):
    """In float64 and without regularization: the blend's own derivative."""
    model = copy.deepcopy(tiny_model).double()
    noise, labels = tiny_batch
    weights = torch.ones(10, dtype=torch.float64)

    def first_update(logits, optimizer_of):
        router = Router.from_logits(logits).double()
        router.set_logits(logits)
        update = next(
            train_trajectory(
                model,
                ten_steps,
                router,
                optimizer_of(router),
                noise.double(),
                labels,
                1.5,
                0.1,
                weights,
                0.0,
            )
        )
        return update, router

    logits = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    _, router = first_update(logits, lambda r: torch.optim.SGD(r.parameters(), lr=0.0))
    gradient = router.rows[8].grad
    for branch in range(4):
        shifted = [logits.clone(), logits.clone()]
        shifted[0][8, branch] += 1e-5
        shifted[1][8, branch] -= 1e-5
        high, low = (
            first_update(s, lambda r: torch.optim.SGD(r.parameters(), lr=0.0))[0].loss for s in shifted
        )
        assert gradient[branch].item() == pytest.approx(((high - low) / 2e-5).item(), rel=1e-5)


def test_logits_stay_within_five(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    router = Router(10, 4)
    optimizer = torch.optim.AdamW(router.parameters(), lr=100.0, weight_decay=0.0)
    for _ in train_trajectory(
        tiny_model, ten_steps, router, optimizer, noise, labels, 1.5, 0.1, torch.ones(10), 1.0
    ):
        pass
    assert torch.equal(router.logits[:-1], torch.full((9, 4), -5.0))


def test_no_gradient_reaches_the_backbone(tiny_model, ten_steps, tiny_batch):
    """Models come frozen, and training leaves them so."""
    assert not any(p.requires_grad for p in load_model("DiT-digits/2").parameters())
    noise, labels = tiny_batch
    router = Router(10, 4)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0)
    list(
        train_trajectory(
            tiny_model, ten_steps, router, optimizer, noise, labels, 1.5, 0.1, torch.ones(10), 1.0
        )
    )
    assert all(p.grad is None and not p.requires_grad for p in tiny_model.parameters())


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_first_update_is_the_blend_written_out(learn_sigma, cfg_scale):
    """Store, teacher, blend of every branch, loss over all channels, without a cache policy."""
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5, learn_sigma=learn_sigma)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().requires_grad_(False)
    diffusion = create_diffusion("4", learn_sigma=learn_sigma)
    noise, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 4])
    router, stored = Router(4, 2), {}

    def forward(x, step, policy=None):
        t = torch.full((len(x),), diffusion.timestep_map[step])
        if cfg_scale == 1:
            return model(x, t, labels, policy)
        return model.forward_with_cfg(x, t, torch.cat([labels, torch.tensor([5, 5])]), cfg_scale, policy)

    def keep(branch, compute):
        stored[branch] = compute()
        return stored[branch]

    def blend(branch, compute):
        score = torch.sigmoid(router.logits[2, branch])
        return score * compute() + (1 - score) * stored[branch]

    x = noise if cfg_scale == 1 else torch.cat([noise, noise])
    with torch.no_grad():
        x = diffusion.ddim_step(forward(x, 3, keep), x, 3)
        data_loss = (forward(x, 2) - forward(x, 2, blend)).square().mean()
        score_sum = torch.sigmoid(router.logits[2]).sum()
    weights, optimizer = torch.tensor([1.0, 1.0, 7.0, 1.0]), torch.optim.SGD(router.parameters(), lr=0.1)
    update = next(
        train_trajectory(model, diffusion, router, optimizer, noise, labels, cfg_scale, 0.1, weights, 0.5)
    )
    assert update.step == 2
    torch.testing.assert_close(update.data_loss, data_loss)
    torch.testing.assert_close(update.loss, 7 * data_loss + 0.5 * score_sum)


@pytest.mark.parametrize("step", [3, 9])
def test_pair_matches_learning_to_cache(case, expected, reference_model, ten_steps, step):
    """Data loss, score sum and gradient of row `step - 1` against the released Learning-to-Cache."""
    router = Router.from_logits(expected["train.init_prob"])
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)  # leaves the gradient to be looked at
    update = train_pair(
        reference_model, ten_steps, router, optimizer, expected["l2c.x0"], expected[f"l2c.step{step}.noise"],
        expected["l2c.labels"], step, case["thres"], case["l1"],
    )  # fmt: skip
    assert update.step == step - 1
    assert relative_error(update.data_loss, expected[f"l2c.step{step}.mse"].mean()) < 1e-5
    assert relative_error(update.score_sum, expected[f"l2c.step{step}.l1"][0]) < 1e-5
    assert relative_error(router.rows[step - 1].grad, expected[f"l2c.step{step}.grad"]) < 1e-5
    assert [row for row in range(9) if router.rows[row].grad is not None] == [step - 1]


def drawn_pairs(steps: tuple[int, ...]) -> list[Pair]:
    """Two samples for every group, whose step is given."""
    generator = torch.Generator().manual_seed(7)
    draws = [(torch.randn(2, 2, 4, 4, 4, generator=generator), step) for step in steps]
    return [Pair(x_0, noise, torch.tensor([0, 3]), step) for (x_0, noise), step in draws]


GROUP_STEPS = (3, 9, 3, 5)  # two groups draw the same row


def test_groups_are_averaged_row_by_row(tiny_model, ten_steps):
    """A row's gradient is the sum of those who drew it over the number of all groups; others have none."""

    def gradients(pairs) -> tuple[dict[int, torch.Tensor], object]:
        router = Router(10, 4, torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
        update = train_pairs(tiny_model, ten_steps, router, optimizer, pairs, 0.1, 1e-3)
        return {row: one.grad for row, one in enumerate(router.rows) if one.grad is not None}, update

    pairs = drawn_pairs(GROUP_STEPS)
    (own, updates) = zip(*(gradients([pair]) for pair in pairs), strict=True)
    together, update = gradients(pairs)
    assert sorted(together) == [2, 4, 8]
    torch.testing.assert_close(together[2], (own[0][2] + own[2][2]) / 4)
    torch.testing.assert_close(together[8], own[1][8] / 4)
    assert update.step == (2, 8, 2, 4)
    assert [one.step for one in updates] == [2, 8, 2, 4]
    torch.testing.assert_close(update.loss, torch.stack([one.loss for one in updates]).mean())


@pytest.mark.parametrize("parts", [2, 4])
def test_groups_of_several_processes_train_the_same_bits(tiny_model, ten_steps, parts):
    """What a process gathers is one tensor in the order of the groups, whoever computed which."""

    def trained(**shared) -> Router:
        router = Router(10, 4, torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.0)
        train_pairs(tiny_model, ten_steps, router, optimizer, threshold=0.1, reg_weight=1e-3, **shared)
        assert {row for row, one in enumerate(router.rows) if optimizer.state[one]} == {2, 4, 8}
        return router

    pairs, size, gathered = drawn_pairs(GROUP_STEPS), 4 // parts, []
    alone = trained(pairs=pairs, gather=lambda own: gathered.append(own) or own)
    (everything,) = gathered
    for rank in range(parts):

        def gather(own, rank=rank):
            before, after = everything[: rank * size], everything[(rank + 1) * size :]
            return torch.cat([before, own, after])

        own = pairs[rank * size :][:size]
        assert torch.equal(trained(pairs=own, steps=GROUP_STEPS, gather=gather).logits, alone.logits)


def one_trajectory(model, diffusion, batch, router, variant, lr=0.0):
    noise, labels = batch
    optimizer = torch.optim.SGD(router.parameters(), lr=lr)
    ones = torch.ones(diffusion.num_timesteps)
    return list(
        train_trajectory(model, diffusion, router, optimizer, noise, labels, 1.5, 0.1, ones, 1e-3, variant)
    )


def test_costs_weigh_the_scores_alone(tiny_model, ten_steps, tiny_batch):
    torch.manual_seed(0)
    router, costs = Router(10, 4), torch.tensor([0.5, 1.5, 0.5, 1.5])
    plain = one_trajectory(tiny_model, ten_steps, tiny_batch, router, None)
    weighed = one_trajectory(tiny_model, ten_steps, tiny_batch, router, Variant(branch_costs=costs))
    for one, other in zip(plain, weighed, strict=True):
        assert torch.equal(one.data_loss, other.data_loss)
        expected_sum = (costs * torch.sigmoid(router.rows[one.step])).sum()
        torch.testing.assert_close(other.score_sum, expected_sum.detach())


def test_loss_on_eps_leaves_the_variance_out(tiny_model, ten_steps, tiny_batch):
    """A model whose eps channels ignore the input has no eps loss, whatever its variance does."""
    model = copy.deepcopy(tiny_model)
    linear = model.final_layer.linear
    eps = torch.arange(linear.out_features) % model.out_channels < model.in_channels
    with torch.no_grad():
        linear.weight[eps] = 0
    torch.manual_seed(0)
    router = Router(10, 4)
    everything, alone = (
        one_trajectory(model, ten_steps, tiny_batch, router, Variant(data_loss=one)) for one in ("all", "eps")
    )
    assert all(update.data_loss > 1e-4 for update in everything)
    assert all(update.data_loss < 1e-10 for update in alone)


def test_straight_through_training_follows_the_sampled_trajectory(tiny_model, ten_steps, tiny_batch):
    """The trajectory that trains is the one that sampling with the thresholded router takes."""
    noise, labels = tiny_batch
    torch.manual_seed(0)
    router = Router(10, 4)
    seen = []
    recording = copy.copy(ten_steps)
    recording.ddim_step = lambda *step: seen.append(ten_steps.ddim_step(*step)) or seen[-1]
    one_trajectory(tiny_model, recording, tiny_batch, router, Variant(straight_through=True))
    x_0 = generate(tiny_model, ten_steps, labels, noise, 1.5, schedule=router.schedule(0.1))
    torch.testing.assert_close(seen[-1][: len(noise)], x_0, atol=1e-5, rtol=1e-5)


def test_thresholded_proxy_is_that_of_a_router_of_zeros_and_ones(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    torch.manual_seed(0)
    router = Router(10, 4)
    hard = Router.from_logits(torch.where(router.logits.detach() > -2.1972, torch.inf, -torch.inf))
    for definition in PROXY_DEFINITIONS:
        setting = (noise, labels, 1.5, 0.1, definition)
        proxy = image_error_proxy(tiny_model, ten_steps, router, *setting, thresholded=True)
        torch.testing.assert_close(proxy, image_error_proxy(tiny_model, ten_steps, hard, *setting))


def test_one_step_training_starts_every_step_from_the_uncached_trajectory(tiny_model, ten_steps, tiny_batch):
    """By hand: x_t uncached, the store filled in full at the step before, one routed step."""
    noise, labels = tiny_batch
    torch.manual_seed(0)
    router = Router(10, 4)
    updates = one_trajectory(tiny_model, ten_steps, tiny_batch, router, Variant(one_step=True))
    denoise, scores = Denoiser(tiny_model, ten_steps, labels, 1.5), router.scores().detach()
    x_t = denoise.start(noise).x
    for update in updates:
        cache = SoftCache(scores, 0.1)
        x_t = ten_steps.ddim_step(denoise(x_t, update.step + 1, cache), x_t, update.step + 1)
        plain, routed = denoise(x_t, update.step), denoise(x_t, update.step, cache)
        torch.testing.assert_close(update.data_loss, (plain - routed).square().mean())
    assert [update.step for update in updates] == list(range(8, -1, -1))


def test_another_distance_is_a_function_and_a_row(tiny_model, ten_steps, tiny_batch, monkeypatch):
    """The mean absolute difference, written as CONTRIBUTING says."""
    monkeypatch.setitem(DATA_LOSSES, "l1", lambda difference, _model: difference.abs().mean())
    router = Router(10, tiny_model.num_branches, torch.Generator().manual_seed(0))
    first, *_ = one_trajectory(tiny_model, ten_steps, tiny_batch, router, Variant(data_loss="l1"))
    squared, *_ = one_trajectory(tiny_model, ten_steps, tiny_batch, router, Variant())
    assert first.data_loss > squared.data_loss.sqrt() * 0.5  # of values below 1 the mean is the larger one
    assert first.data_loss <= squared.data_loss.sqrt()


def test_step_errors_are_the_data_losses_of_a_router_of_zeros_and_ones(tiny_model, ten_steps, tiny_batch):
    noise, labels = tiny_batch
    torch.manual_seed(0)
    logits = torch.where(torch.rand(10, 4) > 0.5, 40.0, -40.0)
    schedule = Router.from_logits(logits).schedule(0.1)
    of_all, of_eps = step_errors(tiny_model, ten_steps, schedule, noise, labels, 1.5)
    for variant, errors in ((None, of_all), (Variant(data_loss="eps"), of_eps)):
        router = Router.from_logits(logits)  # training bounds its logits
        updates = one_trajectory(tiny_model, ten_steps, tiny_batch, router, variant)
        torch.testing.assert_close(errors[:-1].flip(0), torch.stack([one.data_loss for one in updates]))
    assert torch.equal(of_all > 0, ~schedule.compute.all(dim=1))
    assert step_errors(tiny_model, ten_steps, None, noise, labels, 1.5)[0].max() == 0
