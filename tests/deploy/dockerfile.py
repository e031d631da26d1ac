"""The Dockerfile as a list of instructions."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """One instruction, its lines joined.

    Attributes:
        stage: number of the FROM that it belongs to, from 0; -1 before the first.
        keyword: in capitals.
        text: what follows.
    """

    stage: int
    keyword: str
    text: str


class Dockerfile:
    """The instructions of a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path = REPOSITORY / "Dockerfile") -> None:
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        self.instructions: list[Instruction] = []
        stage = -1
        for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
            keyword, text = line.split(maxsplit=1)
            stage += keyword == "FROM"
            self.instructions.append(Instruction(stage, keyword, text))
        self.last_stage = stage

    def of(self, keyword: str) -> list[str]:
        """Texts of all instructions of a kind."""
        return [each.text for each in self.instructions if each.keyword == keyword]

    def final(self, keyword: str) -> list[str]:
        """The same, of the final image only."""
        return [each.text for each in self.instructions if each.keyword == keyword and each.stage == self.last_stage]

    def final_command(self, keyword: str) -> list[str]:
        """Words of the one ENTRYPOINT or CMD of the final image."""
        (text,) = self.final(keyword)
        words: list[str] = json.loads(text)
        return words

    def health_check(self) -> list[str]:
        """Words of the command that says whether a container is healthy."""
        (text,) = self.final("HEALTHCHECK")
        words: list[str] = json.loads(text.partition("CMD")[2])
        return words

    def environment(self, target: str = "cpu") -> dict[str, str]:
        """What ENV sets in the final image for a target."""
        base = next(each.stage for each in self.instructions if each.text.endswith(f" AS base-{target}"))
        texts = [each.text for each in self.instructions if each.keyword == "ENV" and each.stage == base]
        return dict(word.split("=", 1) for text in [*texts, *self.final("ENV")] for word in shlex.split(text))

    @property
    def version(self) -> str:
        """Version that the labels of the final image state."""
        (labels,) = self.final("LABEL")
        return dict(word.split("=", 1) for word in shlex.split(labels))["org.opencontainers.image.version"]

    def copied(self) -> list[tuple[list[str], str]]:
        """Sources in the repository and target of every COPY that is not from another stage."""
        words = [text.split() for text in self.of("COPY") if not text.startswith("--from")]
        return [(sources, target) for *sources, target in words]
