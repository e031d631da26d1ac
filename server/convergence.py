"""Convergence: makes the profiles of the registry what a file declares, whenever one of the two changes."""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from artifacts.errors import quoted
from server import declaration
from server.bundle_operations import BundleOperations
from server.declaration import ROOT_PREFIX, Declaration, DeclaredProfile
from server.errors import SteeringRequestError
from server.preconditions import entity_tag
from server.profile_operations import DECLARATION, ProfileOperations
from server.registry.errors import RegistryError
from server.registry.records import Snapshot
from server.registry.registry import Registry

logger = logging.getLogger("vllm.expertsteer")

_POLL_S = 1.0
_FIRST_RETRY_S, _LAST_RETRY_S = 2.0, 60.0
# Transfers at the same time.
_MAX_TRANSFERS = 4
# Where the problems of profiles stand; no profile can be called so.
THE_FILE = "(file)"


class Convergence:
    """Follows the file and the registry.

    Every API process looks; one of them acts, by the same operations as the admin API. What cannot be done is tried
    again, later and later up to once a minute, at once when the file changes and soon when the registry does. A server
    that was converged once stays in service whatever becomes of the file: it serves what it has, and says what is
    wrong.

    Attributes:
        path: of the file.
        problems: what is not as declared and why, by profile; `THE_FILE` stands for the file itself.
        applied_generation: of the registry, when everything was as declared for the first time; None until then.
    """

    def __init__(
        self,
        path: Path,
        registry: Registry,
        bundles: BundleOperations,
        profiles: ProfileOperations,
        *,
        acts: bool,
    ) -> None:
        """Read the file; `start` begins.

        Args:
            path: of the file.
            registry: what it is compared with.
            bundles: changes of its bundles.
            profiles: changes of its profiles.
            acts: whether this process is the one that does so.

        Raises:
            ValueError: the file cannot be read or understood.
        """
        self.path = path
        self.problems: Mapping[str, str] = {}
        self.applied_generation: int | None = None
        self._registry = registry
        self._bundles = bundles
        self._profiles = profiles
        self._acts = acts
        # Said of a profile that nothing has been tried for.
        self._otherwise = "not yet done" if acts else "not yet done; the server's first process says why"
        self._declared = declaration.read(path)
        # File and generation of the last round.
        self._seen: tuple[str, int] | None = None
        self._retry_s = _FIRST_RETRY_S
        self._retry_at = self._tried_at = 0.0
        self._task: asyncio.Task[None] | None = None
        profiles.declare(path, self._declared.declaration.profiles.keys())

    @property
    def digest(self) -> str:
        """Digest of the newest file that could be read."""
        return self._declared.digest

    @property
    def is_applied(self) -> bool:
        """Whether everything is as the file says now."""
        return self.applied_generation is not None and not self.problems

    @property
    def num_profiles(self) -> int:
        """Profiles that the file declares."""
        return len(self._declared.declaration.profiles)

    def start(self) -> None:
        """Converge from now on."""
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Leave things as they are."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            try:
                await self._round()
            except Exception as error:  # noqa: BLE001 - whatever it was, the next round may succeed, and requests go on
                self._note({THE_FILE: f"It cannot be followed: {error}"})
            await asyncio.sleep(_POLL_S)

    async def _round(self) -> None:
        file_problem = await self._read()
        wanted = self._declared.declaration
        snapshot = await asyncio.to_thread(self._registry.snapshot)
        seen = (self.digest, snapshot.generation)
        if seen == self._seen and not self.problems and file_problem is None:
            return
        differing = await asyncio.to_thread(self._differing, wanted, snapshot)
        reasons = dict(self.problems)
        self._note_change(seen)
        if differing and self._acts and time.monotonic() >= self._retry_at:
            # First, so that whatever goes wrong does not go wrong again at once.
            self._tried_at = time.monotonic()
            self._retry_at = self._tried_at + self._retry_s
            self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
            reasons = await self._apply(wanted)
            snapshot = await asyncio.to_thread(self._registry.snapshot)
            differing = await asyncio.to_thread(self._differing, wanted, snapshot)
        if not differing and file_problem is None and self.applied_generation is None:
            self.applied_generation = snapshot.generation
            logger.info("The profiles are as %s declares (%s).", self.path, self.digest)
        self._seen = (self.digest, snapshot.generation)
        problems = {name: reasons.get(name, self._otherwise) for name in differing}
        self._note(problems if file_problem is None else {**problems, THE_FILE: file_problem})

    def _note_change(self, seen: tuple[str, int]) -> None:
        """A change gives hope: of the file at once, of the registry not sooner than a first retry."""
        if self._seen is None or self._seen[0] != seen[0]:
            self._retry_s, self._retry_at = _FIRST_RETRY_S, 0.0
        elif self._seen[1] != seen[1]:
            self._retry_s, self._retry_at = _FIRST_RETRY_S, min(self._retry_at, self._tried_at + _FIRST_RETRY_S)

    async def _read(self) -> str | None:
        """Read the file anew; what is wrong with it, in which case the one before stays in force."""
        try:
            declared = await asyncio.to_thread(declaration.read, self.path, self._declared)
        except ValueError as error:
            return str(error)
        if declared is not self._declared:
            self._declared = declared
            self._profiles.declare(self.path, declared.declaration.profiles.keys())
        return None

    def _note(self, problems: Mapping[str, str]) -> None:
        for name, problem in problems.items():
            if self.problems.get(name) != problem:
                logger.warning("Not as declared, %s: %s", name, problem)
        self.problems = problems

    async def _apply(self, wanted: Declaration) -> dict[str, str]:
        """Do what can be done; what could not, by profile."""
        snapshot = await asyncio.to_thread(self._registry.snapshot)
        lacking = _lacking(wanted, snapshot)
        # A slow source must not be in the way of what needs none.
        waiting = {name for names in lacking.values() for name in names}
        problems = await self._change(wanted, snapshot, waiting)
        fetching = asyncio.ensure_future(self._fetch(wanted, lacking))
        try:
            while not (await asyncio.wait([fetching], timeout=_POLL_S))[0]:
                if await self._is_outdated():
                    return problems
            problems |= fetching.result()
        finally:
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)
        snapshot = await asyncio.to_thread(self._registry.snapshot)
        return problems | await self._change(wanted, snapshot, problems.keys())

    async def _change(self, wanted: Declaration, snapshot: Snapshot, leave: Collection[str]) -> dict[str, str]:
        """Make profiles as the file says, but for some; what could not be, by profile."""
        problems = {}
        for name in await asyncio.to_thread(self._differing, wanted, snapshot):
            if name in leave:
                continue
            profile, current = wanted.profiles.get(name), snapshot.current(name)
            try:
                if profile is not None:
                    await self._profiles.put(name, profile.wanted, actor=DECLARATION)
                elif current is not None:
                    # A name that has left the file is everybody's, and somebody may just have taken it.
                    tag = entity_tag(current.generation)
                    await self._profiles.delete(name, actor=DECLARATION, if_match=tag)
            except Exception as error:  # noqa: BLE001 - one profile, a full disk included, must not be in the others' way
                problems[name] = _reason(error)
        return problems

    async def _is_outdated(self) -> bool:
        """Whether the file says something else by now."""
        try:
            return await asyncio.to_thread(declaration.read, self.path, self._declared) is not self._declared
        except ValueError:
            return False

    async def _fetch(self, wanted: Declaration, lacking: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Bring in the bundles that the registry lacks, each once; what could not be, by profile that needs it."""
        transfers = asyncio.Semaphore(_MAX_TRANSFERS)

        async def fetch(names: Sequence[str]) -> str | None:
            given = {(each.source, each.signature): each for each in (wanted.profiles[name] for name in names)}
            sources = [profile for profile in given.values() if profile.source is not None]
            if not sources:
                return f"The registry has no bundle {wanted.profiles[names[0]].bundle}; give its source."
            failures = []
            async with transfers:
                for profile in sources:
                    failure = await self._add(profile)
                    if failure is None:
                        return None
                    failures.append(failure)
            return " ".join(dict.fromkeys(failures))

        failures = await asyncio.gather(*(fetch(names) for names in lacking.values()))
        return {
            name: failure
            for names, failure in zip(lacking.values(), failures, strict=True)
            if failure is not None
            for name in names
        }

    async def _add(self, profile: DeclaredProfile) -> str | None:
        assert profile.source is not None
        try:
            if profile.scheme == "root":
                await self._bundles.add_from_root(
                    profile.source.removeprefix(ROOT_PREFIX),
                    digest=profile.bundle,
                    actor=DECLARATION,
                    signature=profile.signature,
                )
            else:
                await self._bundles.add_from_remote(
                    profile.source, profile.bundle, actor=DECLARATION, signature=profile.signature
                )
        except Exception as error:  # noqa: BLE001 - as above
            return _reason(error)
        return None

    def _differing(self, wanted: Declaration, snapshot: Snapshot) -> list[str]:
        """Profiles that are not as the file says, and those that it once made and no longer has."""
        differing = []
        for name, profile in wanted.profiles.items():
            current = snapshot.current(name)
            try:
                is_same = current is not None and current.settings == self._profiles.settings_of(
                    profile.wanted, snapshot
                )
            except SteeringRequestError:
                is_same = False
            if not is_same:
                differing.append(name)
        if wanted.prune:
            differing += [
                name
                for name, versions in snapshot.profiles.items()
                if versions[0].actor == DECLARATION and name not in wanted.profiles
            ]
        return differing


def _lacking(wanted: Declaration, snapshot: Snapshot) -> dict[str, list[str]]:
    """Names of the profiles whose bundle the registry does not have, by its digest."""
    lacking: dict[str, list[str]] = {}
    for name, profile in wanted.profiles.items():
        record = snapshot.bundles.get(profile.bundle)
        if record is None or record.is_draining:
            lacking.setdefault(profile.bundle, []).append(name)
    return lacking


def _reason(error: Exception) -> str:
    if not isinstance(error, SteeringRequestError | RegistryError):
        logger.exception("A declared profile could not be brought about.", exc_info=error)
    return str(error) or type(error).__name__


def require_sources(declared: Declaration, remote: frozenset[str], root: Path | None) -> None:
    """Refuse a declaration whose sources this server's flags do not enable.

    Args:
        declared: the file's content.
        remote: schemes of --steering-remote.
        root: folder of --steering-bundle-root.

    Raises:
        ValueError: one sentence names the profile and the flag.
    """
    for name, profile in declared.profiles.items():
        if profile.scheme == "root" and root is None:
            raise ValueError(
                f"Declared profile {name!r} comes from {quoted(profile.source)}; add --steering-bundle-root."
            )
        if profile.scheme in ("hf", "s3") and profile.scheme not in remote:
            raise ValueError(
                f"Declared profile {name!r} comes from {profile.scheme}://; add --steering-remote {profile.scheme}."
            )
