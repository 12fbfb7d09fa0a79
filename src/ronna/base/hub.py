"""Folders by name: a path is a path, `hub:ORG/NAME` is fetched from the Hugging Face hub. Offline unless asked."""

from pathlib import Path

from ronna.base.errors import RonnaError

PREFIX = "hub:"
# Weights, configs and tokenizers; never pickles or code.
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.spm", "*.jinja")


def local_folder(name: str) -> Path:
    """Where the model folder called `name` lies on this machine.

    Only names that begin with `hub:` touch the network, and only through `huggingface_hub` with its own cache and
    its HF_HUB_OFFLINE. Raises RonnaError where that package is missing or the hub does not give the folder.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RonnaError("needs huggingface_hub", where=name, fix="pip install 'ronna[hub]'") from None
    try:
        return Path(snapshot_download(name.removeprefix(PREFIX), allow_patterns=list(WANTED)))
    except Exception as error:  # its errors have no common base: offline, no such repository, no permission, network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "check the name and the network, or download the folder and give its path"
        raise RonnaError(f"the hub did not give this folder: {reason}", where=name, fix=fix) from None
