"""The official checkpoints, VAEs and PixArt models: their addresses, downloads and checks.

Files land in the repository's pretrained_models/ under a temporary name first. What a server or a proxy sends
instead of a file, such as a page to sign in, is refused. The parts of a PixArt come from the Hub into its
cache, where every command looks for them.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from backbones.pixart_models import PIXART, T5_PARAMETERS, VAE_PARAMETERS
from common.contents import content_fault
from common.files import first_line, read_json

FOLDER = Path(__file__).parents[1] / "pretrained_models"
# Content types of pages that a server may send in place of a file; they must not overwrite a partial file.
PAGES = ("text/html", "application/xhtml+xml", "application/xml", "text/xml")
_DIT = "https://dl.fbaipublicfiles.com/DiT/models/"
_VAE = "https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/"


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch. `size` in bytes and `sha256` are checked where they are known."""

    url: str
    path: str
    size: int | None = None
    sha256: str | None = None


def _vae(kind: str, **weights_facts) -> list[RemoteFile]:
    base, folder = _VAE.format(kind), f"sd-vae-ft-{kind}/"
    weights = "diffusion_pytorch_model.safetensors"
    return [
        RemoteFile(f"{base}config.json", f"{folder}config.json"),
        RemoteFile(f"{base}{weights}", f"{folder}{weights}", **weights_facts),
    ]


_VAE_MSE_SHA256 = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"
DOWNLOADS: dict[str, list[RemoteFile]] = {
    "dit-256": [RemoteFile(f"{_DIT}DiT-XL-2-256x256.pt", "DiT-XL-2-256x256.pt")],
    "dit-512": [RemoteFile(f"{_DIT}DiT-XL-2-512x512.pt", "DiT-XL-2-512x512.pt")],
    "vae-ema": _vae("ema"),
    "vae-mse": _vae("mse", size=334643276, sha256=_VAE_MSE_SHA256),
}


def fetch(name: str, folder: Path = FOLDER, replace: bool = False) -> Path:
    """Make a download present under `folder`; returns its file, or the folder of a VAE.

    replace: fetch what is there but cannot be the file again; else that is refused, for it may be the user's.
    Raises OSError (no network, disk) or ValueError (damaged file), each saying what to do by hand.
    """
    files = DOWNLOADS[name]
    for file in files:
        target = folder / file.path
        if not target.exists():
            fetch_file(file, folder)
        elif fault := fault_of(file, target):
            if not replace:
                raise ValueError(f"{target} {fault}; `python download.py {name}` fetches it again")
            warnings.warn(f"{target} {fault}; fetching it again")
            fetch_file(file, folder)
    path = folder / files[0].path
    return path if len(files) == 1 else path.parent


def fault_of(file: RemoteFile, path: Path) -> str | None:
    """Why what is at `path` cannot be the file, without reading all of it; None where it may be."""
    if not path.is_file():
        return "is no file"
    fault = content_fault(path, Path(file.path).suffix)
    if not fault and file.size is not None and path.stat().st_size != file.size:
        return f"has {path.stat().st_size} of {file.size} bytes"
    return fault


def fetch_file(file: RemoteFile, folder: Path) -> None:
    """Download to NAME.part, continuing what is there, check it, rename it."""
    target = folder / file.path
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"{target.parent} is no folder; remove it or take another --folder"
        ) from None
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; remove it, a file belongs there")
    try:
        expected_size = _transfer(file.url, partial)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"cannot fetch {file.url} ({reason}); run again to go on, or put the file by hand at {target}"
        ) from None
    except OSError as error:
        raise OSError(
            f"{partial} cannot be written ({error.strerror or error}); make space, run again to go on"
        ) from None
    size = partial.stat().st_size
    for wanted in (expected_size, file.size):
        if wanted is not None and size > wanted:
            partial.unlink()
            raise OSError(
                f"{partial} had {size} bytes, more than the {wanted} of {file.url}; it was removed, run again"
            )
        if wanted is not None and size < wanted:
            raise OSError(f"{partial} has {size} of {wanted} bytes; run the same command again to go on")
    if fault := content_fault(partial, target.suffix):
        partial.unlink()
        raise OSError(
            f"what {file.url} sent {fault}; it was removed: is there a proxy, or a page to sign in to? Run "
            f"again, or put the file by hand at {target}"
        )
    if file.sha256 and _sha256(partial) != file.sha256:
        partial.unlink()
        raise ValueError(
            f"{file.url} arrived damaged (its sha256 is not {file.sha256}); it was removed, run again"
        )
    partial.replace(target)


def _transfer(url: str, partial: Path) -> int | None:
    """Append what `partial` still lacks of `url`; returns the whole file's size where the server tells it."""
    have = partial.stat().st_size if partial.exists() else 0
    if have and content_fault(partial, partial.with_suffix("").suffix, whole=False):
        have = 0  # nothing to go on from: a page, say
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing left to send: complete, or longer than the file ever was
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            return int(total) if total.isdigit() else None
        raise
    with response:
        kind = response.headers.get_content_type()  # text/plain where the server names none
        if kind in PAGES or response.status not in (200, 206):
            raise ConnectionError(
                f"the server sent status {response.status}, {kind}, not the file: is there a proxy, or a "
                "page to sign in to?"
            )
        if response.status != 206:
            have = 0  # the server sends the whole file
        elif not (sent := response.headers.get("Content-Range", f"bytes {have}-")).startswith(
            f"bytes {have}-"
        ):
            raise ConnectionError(f"the server sent {sent}, not what comes after byte {have}")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(partial, "ab" if have else "wb") as out,
            tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=partial.stem, disable=None
            ) as bar,
        ):
            while chunk := response.read(1 << 20):
                out.write(chunk)
                bar.update(len(chunk))
    return total


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---- parts of text-to-image models, from the Hub ---------------------------------------------------


@dataclass(frozen=True)
class HubPart:
    """A folder of a repository. parameters: of its model, by the known config; 0 for a tokenizer."""

    repository: str
    name: str
    parameters: int = 0

    @property
    def gigabytes(self) -> float:
        """Its size if it is stored in float32, as computed from the number of parameters."""
        return 4 * self.parameters / 1e9


def hub_parts(name: str) -> list[HubPart]:
    """The parts of a model of `PIXART`; all models of one generation share all but the transformer."""
    known = PIXART[name]
    return [
        HubPart(known.hub, "transformer", known.parameters),
        HubPart(known.parts, "vae", VAE_PARAMETERS),
        HubPart(known.parts, "text_encoder", T5_PARAMETERS),
        HubPart(known.parts, "tokenizer"),
    ]


_WEIGHTS = (".safetensors", ".bin")  # ends of the files that hold weights, the better one first


def find_part(part: HubPart, folder: Path | None = None) -> Path | None:
    """Where a part lies whole, in `folder` or, for None, in the Hub's cache; None: it does not."""
    place = folder
    if place is None:
        from huggingface_hub import snapshot_download  # slow to import

        try:
            place = Path(snapshot_download(part.repository, local_files_only=True))
        except (OSError, ValueError):
            return None
    return place / part.name if _is_whole(place / part.name, part) else None


def _is_whole(place: Path, part: HubPart) -> bool:
    if not part.parameters:
        return place.is_dir() and any(file.is_file() for file in place.iterdir())
    if not (place / "config.json").is_file():
        return False
    for suffix in _WEIGHTS:
        for index in place.glob(f"*{suffix}.index.json"):
            if "fp16" not in index.name:
                return all((place / name).is_file() for name in read_json(index)["weight_map"].values())
        if any(file.is_file() and "fp16" not in file.name for file in place.glob(f"*{suffix}")):
            return True
    return False


def fetch_part(part: HubPart, folder: Path | None = None) -> Path:
    """Make a part present in `folder` or, for None, in the Hub's cache; an interrupted fetch is gone on with.

    Returns its place. Raises OSError in one line where it cannot be had whole.
    """
    from huggingface_hub import snapshot_download  # slow to import

    found, reason = find_part(part, folder), "it does not come whole"
    for suffix in _WEIGHTS if found is None else ():
        wanted = [f"{part.name}/*{end}" for end in (".json", ".txt", ".model", suffix)]
        try:
            snapshot_download(
                part.repository, allow_patterns=wanted, ignore_patterns=["*.fp16.*"], local_dir=folder
            )
        except Exception as error:  # of the network, the disk, the Hub
            reason = first_line(error)
        if found := find_part(part, folder):
            break
    if found is None:
        raise OSError(
            f"{part.name} of {part.repository} cannot be had from the Hub ({reason}); run again to go on, or "
            f"run `hf download {part.repository} --include '{part.name}/*'` where there is a network and "
            "copy the Hub's cache (HF_HOME) here"
        )
    return found
