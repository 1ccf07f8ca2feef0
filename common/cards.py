"""The page of a router on the Hub: what it is, its figures, and the lines that use it."""

from collections.abc import Mapping

FILE, PICTURE = "router.safetensors", "schedule.png"
_SHOWN = {
    "method": "trained by", "model": "model", "image_size": "pixels", "num_steps": "steps",
    "respacing": "respacing", "sampler": "sampler", "cfg_scale": "guidance", "threshold": "threshold",
    "speedup_macs": "speed-up by MACs", "train_steps": "train steps",
}  # fmt: skip


def model_card(info: Mapping[str, object], cur: float, repository: str) -> str:
    """The README.md of a repository, in Markdown with the Hub's header. info: a router's facts."""
    model, steps = info.get("model", "MODEL"), info.get("num_steps", "STEPS")
    rows = [f"| {title} | {info[name]} |" for name, title in _SHOWN.items() if info.get(name) is not None]
    facts = "\n".join(["| | |", "|---|---|", *rows, f"| branches reused (CUR) | {100 * cur:.2f} % |"])
    command = f"python sample.py --model {model} --num-sampling-steps {steps}"
    command += f" --accelerate-method dynamiclayer --path {repository} --compare"
    return f"""---
library_name: diffusers
tags: [feature-caching, diffusion-transformer, harmonica]
---

# A caching router for {model}, {steps} steps

It says which branches of the transformer are computed at which denoising step. The others reuse what they
stored before.

![The schedule]({PICTURE})

{facts}

Use it in diffusers:

```python
from backbones import apply_schedule
apply_schedule(pipe, "{repository}")
```

or from the command line:

```
{command}
```
"""
