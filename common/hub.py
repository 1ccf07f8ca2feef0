"""Files of the Hugging Face Hub: fetched once and kept in its cache, or sent there as a folder."""

import re
from pathlib import Path

from common.files import first_line

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".png")


def is_repository(name: str) -> bool:
    """Whether a name reads as USER/REPOSITORY of the Hub; what may be meant in a folder here does not."""
    named = _REPOSITORY.fullmatch(name) and not name.endswith(_FILES)
    return bool(named) and not Path(name).exists() and not Path(name).parent.is_dir()


def fetch(repository: str, name: str) -> Path:
    """The file `name` of a repository, from the Hub's cache or from the network.

    Raises OSError in one line where it can be had from neither.
    """
    import huggingface_hub  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise OSError(
            f"{name} of {repository} cannot be had from the Hub ({first_line(error)}); check the name, sign "
            "in with `hf auth login` if it is private, or give a file"
        ) from None


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Send a folder's files to a repository, which is made if it does not exist; returns its address.

    Raises OSError in one line where that fails; the folder stays as it is.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise OSError(
            f"{folder} is complete, but cannot be sent to {repository} ({first_line(error)}); when the Hub "
            f"can be reached: hf upload {repository} {folder}"
        ) from None
    return f"https://huggingface.co/{repository}"
