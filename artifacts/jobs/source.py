"""Where a model of the configuration lies on disk and who it is."""

from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import BundleError
from artifacts.jobs.config import ModelSource
from artifacts.jobs.errors import BuildError
from artifacts.jobs.workdir import digest_of, file_digest
from artifacts.manifest import ModelIdentity
from artifacts.verify import served_model

# What Transformers needs; other weight formats of the same repository stay where they are.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]


@dataclass(frozen=True)
class FoundModel:
    """A model directory with the identity that the manifest gives it."""

    directory: Path
    identity: ModelIdentity

    def digest(self) -> str:
        """Changes with the weights, the tokenizer, the chat template and every setting of the model."""
        settings = [
            path for pattern in ("*.json", "*.jinja", "*.model", "*.txt") for path in self.directory.glob(pattern)
        ]
        files = {path.name: file_digest(path) for path in sorted(settings)}
        return digest_of({"weights": self.identity.fingerprint, "files": files})


def find_model(source: ModelSource, root: Path, weights: bool = True) -> FoundModel:
    """Find a local directory, or fetch a model from the Hugging Face hub into its cache.

    Args:
        source: of the configuration.
        root: directory that its path starts from.
        weights: fetch them too; a plan needs configuration and tokenizer only.

    Raises:
        BuildError: neither a directory with a model nor a hub id that can be fetched.
    """
    local = root / source.model
    if local.is_dir():
        return _identify(local, source.id or local.resolve().name, source.revision)
    if source.model.startswith(("/", ".")) or source.model.count("/") > 1:
        raise BuildError(f"there is no model directory {local}; check the path, which starts from the configuration")
    directory = _download(source, weights)
    # The hub's cache names a snapshot by its commit, which is more exact than a branch.
    return _identify(directory, source.id or source.model, directory.name)


def _download(source: ModelSource, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = HUB_FILES if weights else [each for each in HUB_FILES if each != "*.safetensors"]
    try:
        return Path(snapshot_download(source.model, revision=source.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise BuildError(
            f"{source.model} is no directory beside the configuration and cannot be fetched from the hub: {cause}"
        ) from error


def _identify(directory: Path, name: str, revision: str | None) -> FoundModel:
    try:
        served = served_model(directory)
    except BundleError as error:
        raise BuildError(f"{name} is no model that can be read: {error}") from error
    tokenizer = directory / "tokenizer.json"
    return FoundModel(
        directory,
        ModelIdentity(
            id=name,
            revision=revision,
            architecture=served.architecture,
            hidden_size=served.hidden_size,
            num_layers=served.num_layers,
            tokenizer_digest=f"sha256:{file_digest(tokenizer)}" if tokenizer.is_file() else None,
            fingerprint=served.fingerprint,
        ),
    )
