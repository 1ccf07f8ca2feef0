"""Whether two runs are the same: fingerprints of weights, and settings compared with a record's."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

_HEAD = 64  # number of values of every parameter in the older kind of hash
# Settings that older records lack, and the value that held then; None: it is unknown.
_ADDED = {"null_label": True, "learn_sigma": True, "vae_weights": None}


def weights_fingerprint(model: nn.Module) -> str:
    """HEAD-ALL: a hash of every value, name, shape and dtype (64 characters), after 16 of the older kind.

    It tells checkpoints apart wherever they came from. DiT-XL/2 in float32, 2.7 GB, takes some seconds.
    """
    head = hashlib.sha256()
    for parameter in model.parameters():
        head.update(parameter.detach().flatten()[:_HEAD].float().cpu().numpy().tobytes())
    state = model.state_dict()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashing lets other threads run
        digests = list(threads.map(_digest, state.values()))
    lines = [
        f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest}\n"
        for (name, tensor), digest in zip(state.items(), digests, strict=True)
    ]
    return f"{head.hexdigest()[:16]}-{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(values.view(torch.uint8).numpy() if values.numel() else b"").hexdigest()


def same_weights(recorded: object, fingerprint: str) -> bool:
    """Whether a record's fingerprint means the same weights. Older ones are shorter and hash less."""
    if isinstance(recorded, str) and len(recorded) == 16:
        return fingerprint.startswith(f"{recorded}-")
    return recorded == fingerprint


def differences(record: dict, settings: dict) -> list[tuple[str, object]]:
    """The settings that differ from a record's, each with the record's value."""
    others = []
    for name, value in settings.items():
        found = record.get(name, _ADDED.get(name))
        if name == "weights" and same_weights(found, value):
            continue
        if name in _ADDED and name not in record and found is None:
            continue
        if found != value:
            others.append((name, found))
    return others
