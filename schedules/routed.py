"""The schedule of a router file, for the model and the setting that it was trained for."""

import torch

from backbones.loading import pixels_of
from router import DEFAULT_THRESHOLD, Schedule, load_router
from schedules.any_speed import AnySpeed
from schedules.request import Request

_UNRECORDED = {"sampler": "ddim"}  # what routers from before it was recorded were trained under


def routed_schedule(
    request: Request,
    path: str,
    thres: float | None = None,
    speedup: float | None = None,
    trained_by: str = "",
) -> Schedule:
    """The router's schedule at `thres`; None: at its own threshold.

    speedup: by MACs, of a router for every speed-up, which has no threshold.
    trained_by: the method that must have trained it; "": any. Notes on `request` which
    file it is, and where it was trained in another setting. Raises ValueError or FileNotFoundError for a
    router that is not there, does not fit the model, or was trained by another method.
    """
    router = load_router(path, request.model_name, request.num_steps, request.model.num_branches)
    found = router.info.get("method", "")
    if not found.startswith(trained_by):
        raise ValueError(
            f"{router.info['path']} was trained by {found or 'an unknown method'}, not {trained_by}; "
            "use --accelerate-method dynamiclayer"
        )
    here = {
        "image_size": pixels_of(request.model),
        "cfg_scale": request.sampling.cfg_scale,
        "respacing": request.sampling.num_sampling_steps,
        "sampler": request.sampling.sampler,
    }
    for fact, value in here.items():
        trained = router.info.get(fact, _UNRECORDED.get(fact, value))
        if str(trained) != str(value):
            offer = fact == "sampler" and request.reuse != "calibrated"
            request.notes.append(
                f"note: the router was trained at {fact} {trained}, this samples at {value}"
                + ("; --calibrate fits its weights of reuse to that" if offer else "")
            )
    request.notes.append(f"router {router.info['path']}")
    any_speed = AnySpeed.of_router(router)
    if speedup is not None and any_speed is None:
        raise ValueError(
            f"{router.info['path']} is of one speed-up; leave out --speedup {speedup:g}, or train a router "
            "with --any-speed"
        )
    if speedup is not None and thres is not None:
        raise ValueError("--speedup and --thres exclude each other: each says how much to compute; give one")
    if any_speed is not None and speedup is not None:
        any_speed.check_model(request.model)
        return any_speed.schedule(speedup)
    own = router.info.get("threshold", DEFAULT_THRESHOLD)
    schedule = router.schedule(own if thres is None else thres)
    if thres not in (None, own) and torch.equal(schedule.compute, router.schedule(own).compute):
        request.notes.append(f"note: --thres {thres:g} has no effect: no score lies between it and {own:g}")
    return schedule
