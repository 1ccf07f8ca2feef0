"""Which timesteps of the original chain a shorter one keeps (Nichol and Dhariwal, "Improved DDPM", 2021)."""


def space_timesteps(num_timesteps: int, respacing: str | int) -> list[int]:
    """The kept timesteps, ascending.

    respacing: `""` keeps all; `"ddimN"` keeps every k-th from 0, where k gives exactly N; `"a,b,..."` cuts
    the chain into equal sections and keeps that many of each, its first and last included.
    Raises ValueError naming the spec when it does not fit the chain.
    """
    spec = str(respacing)
    if spec.startswith("ddim"):
        return _fixed_stride(num_timesteps, spec)
    counts = _parse_counts(spec) if spec else [num_timesteps]
    size, extra = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"respacing {spec!r} asks for {count} of {length} timesteps; take 1 to {length} per section"
            )
        # The accumulated float sum, not a product, decides the rounding: so the official tables come out.
        stride = (length - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def _fixed_stride(num_timesteps: int, spec: str) -> list[int]:
    count = spec.removeprefix("ddim")
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if str(len(kept)) == count:
            return list(kept)
    raise ValueError(
        f"respacing {spec!r}: no integer stride keeps {count!r} of {num_timesteps} timesteps; try a divisor "
        f"of {num_timesteps} or the spacing {count!r}"
    )


def _parse_counts(spec: str) -> list[int]:
    try:
        return [int(count) for count in spec.split(",")]
    except ValueError:
        raise ValueError(
            f"respacing {spec!r} is not understood; write '50', 'ddim50' or '10,15,20'"
        ) from None
