"""Declared profiles: a file that says which profiles there shall be and where their bundles come from.

    schema: 1
    prune: true
    profiles:
      medical:
        source: hf://acme/vectors@0123456789abcdef0123456789abcdef01234567/medical.safetensors
        digest: sha256:137e87239a62f25d6f561c6cda8702fff7cc16a0961a222ad8242cbaad853f90
        strength: 0.5
        scope: response

`source` is an address of `--steering-remote` (`hf://`, `s3://`), `root:NAME` for a file of `--steering-bundle-root`,
or left out for a bundle that the registry has. The other fields are those of `PUT /v1/steering/profiles/{name}`, where
`digest` is called `bundle`; `signature` is that of the file in base64. With `prune`, profiles that the file made and no
longer has are deleted; those of others never are. Servers on one registry share one file.
"""

import base64
import hashlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from artifacts.errors import quoted
from server import yaml_file
from server.admin_schema import DIGEST, PROFILE_NAME, ProfileSpec
from server.outcomes import ProfileSpec as WantedProfile

MAX_FILE_BYTES = 1 << 20
MAX_PROFILES = 4096
ROOT_PREFIX = "root:"
_MAX_SOURCE, _MAX_SIGNATURE_BYTES = 2048, 64 << 10
# The form needs 4.
_MAX_DEPTH = 8


def _decode(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:
        raise PydanticCustomError("no_base64", "this is no base64") from None


class DeclaredProfile(ProfileSpec):
    """What one profile shall be, and where its bundle comes from."""

    model_config = ConfigDict(hide_input_in_errors=True)

    bundle: Annotated[str, Field(alias="digest", pattern=DIGEST, description="Digest of the bundle, in full.")]
    source: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=_MAX_SOURCE,
            pattern=rf"^(hf://|s3://|{ROOT_PREFIX}).",
            description="hf://..., s3://..., root:NAME, or left out for a bundle that the registry has.",
        ),
    ] = None
    signature: Annotated[
        bytes | None,
        BeforeValidator(_decode),
        Field(max_length=_MAX_SIGNATURE_BYTES, description="Signature of the file by model-signing, in base64."),
    ] = None

    @property
    def wanted(self) -> WantedProfile:
        """The profile without its source."""
        fields = dict(self)
        del fields["source"], fields["signature"]
        return WantedProfile(**fields)

    @property
    def scheme(self) -> str | None:
        """`hf`, `s3` or `root`; None where no source is given."""
        return None if self.source is None else self.source.partition(":")[0]


class Declaration(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: Annotated[Literal[1], Field(alias="schema", description="Of this format.")]
    prune: Annotated[bool, Field(strict=True, description="Delete profiles that the file made and no longer has.")] = (
        True
    )
    profiles: Annotated[
        dict[Annotated[str, Field(pattern=PROFILE_NAME)], DeclaredProfile],
        BeforeValidator(lambda value: {} if value is None else value),
        Field(max_length=MAX_PROFILES, description="Profiles by name."),
    ]


class Declared(NamedTuple):
    """A declaration and the digest of the file's bytes, "sha256:<hex>"."""

    digest: str
    declaration: Declaration


def read(path: Path, before: Declared | None = None) -> Declared:
    """The declaration in a file.

    Args:
        path: of the file.
        before: what was read of it earlier; given back when the bytes are the same.

    Raises:
        ValueError: it cannot be read or understood; one sentence names the file, the place and the remedy.
    """
    what = f"Declaration {path}"
    data = yaml_file.read(path, what, MAX_FILE_BYTES).data
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if before is not None and before.digest == digest:
        return before
    content = yaml_file.parse(data, what, _MAX_DEPTH)
    if not isinstance(content, dict):
        raise ValueError(f"{what} is not of the form 'schema: 1, profiles: {{NAME: {{digest, source, ...}}}}'.")
    try:
        declaration = Declaration.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise ValueError(f"{what}, {quoted(place)}: {_sentence(first['type'], first['msg'])}") from None
    return Declared(digest, declaration)


def _sentence(kind: str, message: str) -> str:
    match kind:
        case "extra_forbidden":
            return "there is no such field; take it out, or correct its name."
        case "missing":
            return "this field is missing; add it."
        case _:
            return f"{message.removeprefix('Value error, ')}."
