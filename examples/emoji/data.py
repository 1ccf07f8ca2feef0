"""Emoji in three styles with captions: 64 x 64 pixels on a white ground, from three pinned npm packages.

    python -m examples.emoji.data                      # fetches 152 MB with `npm pack`, writes emoji.npz
    python -m examples.emoji.data --tarballs FOLDER    # the same from tarballs fetched by hand

Noto is the soft style, Twemoji the flat one and Fluent the 3d one; a caption reads "red apple, flat style".
Left out: flags, keycaps, skin tones, and of people the variants by sex, hair and direction, which differ in a
few pixels. What is there is kept: run the same command again to go on after an interruption.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import cli
from common.files import replacing

FOLDER = Path(__file__).parents[2] / "results" / "emoji"
SIZE = 64
TRAIN, HELD_OUT_PAIR, HELD_OUT_CONCEPT = range(3)  # values of EmojiData.split
HELD_OUT_CONCEPTS, HELD_OUT_PAIRS = 30, 0.1


@dataclass(frozen=True)
class Package:
    """One npm package of pictures: pinned, with the folder and the suffix of its files."""

    style: str
    name: str
    version: str
    sha256: str
    folder: str
    suffix: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        base = self.name.rpartition("/")[2]
        return f"https://registry.npmjs.org/{self.name}/-/{base}-{self.version}.tgz"


PACKAGES = (
    Package(
        "flat",
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64",
        ".png",
    ),
    Package(
        "soft",
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64",
        ".png",
    ),
    Package(
        "3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets",
        ".webp",
    ),
)
STYLES = tuple(package.style for package in PACKAGES)
NAMES_FROM = PACKAGES[1]  # its emoji.json names the pictures of all three


@dataclass(frozen=True)
class EmojiData:
    """n pictures with captions.

    images uint8 (n, 64, 64, 3); concept (n,) indexes `concepts`, style (n,) STYLES; split (n,) is one of
    TRAIN, HELD_OUT_PAIR and HELD_OUT_CONCEPT.
    """

    images: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    split: np.ndarray
    concepts: list[str]
    aliases: list[str]  # a second name of each concept, often the shorter one; it may equal the first

    @property
    def captions(self) -> list[str]:
        """Caption of each picture."""
        return [caption(self.concepts[c], STYLES[s]) for c, s in zip(self.concept, self.style, strict=True)]


def caption(concept: str, style: str) -> str:
    """ "red apple", "flat" -> "red apple, flat style"."""
    return f"{concept}, {style} style"


def load(path: str | Path = FOLDER / "emoji.npz") -> EmojiData:
    """Read what the command wrote. Raises FileNotFoundError or ValueError in one line."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; `python -m examples.emoji.data` makes it")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "concept", "style", "split")}
            lists = {name: file[name].tolist() for name in ("concepts", "aliases")}
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path} cannot be read ({error}); remove it and make it again") from None
    return EmojiData(**arrays, **lists)


def save(data: EmojiData, path: Path) -> None:
    with replacing(path) as partial:
        np.savez_compressed(partial, **vars(data))


def split_pairs(
    concept: np.ndarray,
    style: np.ndarray,
    num_concepts: int,
    seed: int = 0,
    held_out: int = HELD_OUT_CONCEPTS,
) -> np.ndarray:
    """The split of each (concept, style) pair, uint8 (n,).

    `held_out` whole concepts are never trained on. Of the others' pairs a tenth of all n is kept back, one of
    a concept at most and only where another style of it stays: so a held-out pair asks for a known thing in a
    style in which it was never seen.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(num_concepts)
    split = np.full(len(concept), TRAIN, dtype=np.uint8)
    split[np.isin(concept, order[:held_out])] = HELD_OUT_CONCEPT
    wanted = round(HELD_OUT_PAIRS * len(concept))
    for index in order[held_out:]:
        if wanted == 0:
            break
        pictures = np.flatnonzero(concept == index)
        if len(pictures) > 1:
            pictures = pictures[np.argsort(style[pictures])]
            split[generator.choice(pictures)] = HELD_OUT_PAIR
            wanted -= 1
    return split


def kept(entry: dict) -> bool:
    """Whether an entry of emoji.json becomes a concept."""
    if entry["category"] in ("Flags", "Component") or entry["subcategory"] == "keycap":
        return False
    joined = "200D" in entry["unified"].split("-")
    if entry["category"] != "People & Body" or not joined:
        return True
    neutral = entry["unified"].startswith("1F9D1-200D-")  # the only form that "farmer" or "pilot" has
    signs = ("2640-FE0F", "2642-FE0F", "27A1-FE0F")  # woman, man, facing right
    return neutral and not entry["unified"].endswith(signs)


def names(entry: dict) -> tuple[str, str]:
    """A concept's name and its alias: the Unicode name, and the first short name, both as plain words."""
    first = re.sub(r"\s+", " ", entry["name"].lower().replace(":", " with")).strip()
    second = re.sub(r"[_\-\s]+", " ", entry["short_name"]).strip()
    return first, second if len(second) > 2 and not second.startswith("u") else first


def read_packages(tarballs: dict[str, Path]) -> EmojiData:
    """All pictures of the three tarballs (style -> file) in the order of Unicode, concept by concept."""
    with tarfile.open(tarballs[NAMES_FROM.style]) as archive:
        entries = json.load(archive.extractfile("package/emoji.json"))
    entries = sorted(filter(kept, entries), key=lambda entry: entry["sort_order"])
    concept_of = {entry["unified"].lower(): index for index, entry in enumerate(entries)}
    found = {}
    for style, package in enumerate(PACKAGES):
        with tarfile.open(tarballs[package.style]) as archive:
            for member in tqdm(archive, desc=f"reading {package.tarball}", disable=None):
                path = Path(member.name)
                if str(path.parent) == package.folder and path.suffix == package.suffix:
                    index = concept_of.get(path.stem)
                    if index is not None:
                        found[index, style] = on_white(archive.extractfile(member).read())
    found = without_repeats(found)
    # A concept that only one artist drew has no other style to learn it by.
    drawn = [sum((index, style) in found for style in range(3)) for index in range(len(entries))]
    keep = [index for index, count in enumerate(drawn) if count > 1]
    pairs = [(index, style) for index in keep for style in range(3) if (index, style) in found]
    number = {index: position for position, index in enumerate(keep)}
    concept = np.array([number[index] for index, _ in pairs], dtype=np.int16)
    style = np.array([style for _, style in pairs], dtype=np.uint8)
    both = [names(entries[index]) for index in keep]
    return EmojiData(
        images=np.stack([found[pair] for pair in pairs]),
        concept=concept,
        style=style,
        split=split_pairs(concept, style, len(keep)),
        concepts=[first for first, _ in both],
        aliases=[second for _, second in both],
    )


def without_repeats(found: dict[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """Without the pictures that an earlier concept has: one picture with two names teaches neither."""
    seen, kept_pictures = set(), {}
    for pair in sorted(found):
        picture = found[pair].tobytes()
        if picture not in seen:
            seen.add(picture)
            kept_pictures[pair] = found[pair]
    return kept_pictures


def on_white(encoded: bytes) -> np.ndarray:
    """A picture file as uint8 (64, 64, 3): laid on a white ground, then scaled."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return np.asarray(ground.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball in `folder`, fetched with npm unless it is there; checked in either case.

    Raises OSError (npm is missing or fails) or ValueError (damaged file), each with the remedy in one line.
    """
    target = folder / package.tarball
    if target.exists():
        check(target, package)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = f"fetch {package.url} by hand into a folder and give it as --tarballs"
    if shutil.which("npm") is None:
        raise OSError(f"npm is not installed; install it, or {by_hand}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="npm.part") as scratch:
        wanted = f"{package.name}@{package.version}"
        command = ["npm", "pack", wanted, "--silent", "--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(scratch) / package.tarball
        if done.returncode or not fetched.exists():
            reason = (done.stderr or done.stdout).strip().partition("\n")[0] or f"status {done.returncode}"
            raise OSError(f"npm pack {wanted} failed ({reason}); run again, or {by_hand}")
        check(fetched, package)
        fetched.replace(target)
    return target


def check(file: Path, package: Package) -> None:
    """Refuse a file that is not byte for byte the pinned one."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{file} is damaged or another version: its sha256 begins {found[:12]}, not "
            f"{package.sha256[:12]}; remove it and run again"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch the emoji packages and write emoji.npz.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for emoji.npz and what is fetched")
    parser.add_argument("--tarballs", type=Path, help="folder with the three tarballs, fetched by hand")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    tarballs = {}
    for package in PACKAGES:
        if args.tarballs is None:
            tarballs[package.style] = fetch(package, args.folder)
            continue
        file = args.tarballs / package.tarball
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; fetch {package.url}")
        check(file, package)
        tarballs[package.style] = file
    data = read_packages(tarballs)
    save(data, args.folder / "emoji.npz")
    counts = np.bincount(data.split, minlength=3)
    print(
        f"wrote {args.folder / 'emoji.npz'}: {len(data.images)} pictures of {len(data.concepts)} concepts "
        f"({counts[TRAIN]} to train, {counts[HELD_OUT_PAIR]} held-out pairs, "
        f"{counts[HELD_OUT_CONCEPT]} of held-out concepts)"
    )


if __name__ == "__main__":
    cli.run(main, parse_args())
