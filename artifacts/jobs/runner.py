"""Runs the steps of a build in order, skips what is finished, and publishes the bundle."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from threadpoolctl import threadpool_limits

from artifacts.bundle import Bundle, load_bundle
from artifacts.jobs import align, capture, controls, diagnose, evaluate, pack, pair, probe, tune, vectors
from artifacts.jobs.build import Build
from artifacts.jobs.errors import BuildError
from artifacts.jobs.splits import refuse_overlap
from artifacts.jobs.tools import tool_versions
from artifacts.jobs.workdir import DONE, digest_of, fresh_directory, is_done, mark_done


class Step(Protocol):
    """One resumable step: a module that reads the results of earlier steps and leaves its own on disk."""

    NAME: str

    def settings(self, build: Build) -> object:
        """JSON value of everything that decides the result, apart from earlier steps."""

    def run(self, build: Build) -> None:
        """Do the work and write the results into `build.directory(NAME)`."""


STEPS: tuple[Step, ...] = (capture, probe, align, pair, vectors, tune, diagnose, controls, evaluate, pack)
STEP_NAMES = tuple(step.NAME for step in STEPS)
# Steps that pick up their own partial results; the directories of the others start empty.
KEEPS_PARTIAL = frozenset({capture.NAME})


def run_build(build: Build, output: Path, restart: bool, say: Callable[[str], None]) -> Bundle:
    """Run every step whose inputs changed since its last finished run, then put the bundle at `output`.

    Args:
        build: what to build.
        output: path of the bundle; its directory is made.
        restart: forget earlier results.
        say: told one line per step.

    Raises:
        BuildError: a step refuses to go on.
        BundleError: the result would be no valid bundle.
    """
    run_steps(build, pack.NAME, restart, say)
    return _publish(build.directory(pack.NAME) / pack.BUNDLE, output)


def run_steps(build: Build, last: str, restart: bool, say: Callable[[str], None]) -> None:
    """Run the steps up to `last`, each only if its inputs changed since its last finished run.

    Raises:
        BuildError: a step refuses to go on.
    """
    if restart:
        # Not the whole directory: it may be the user's own, with other files in it.
        for name in STEP_NAMES:
            shutil.rmtree(build.directory(name), ignore_errors=True)
    build.work.mkdir(parents=True, exist_ok=True)
    for note in build.check_data():
        say(f"note: {note}")
    refuse_overlap(build)
    upstream = digest_of(tool_versions())
    with _threads(build.config.threads):
        for step in STEPS[: STEP_NAMES.index(last) + 1]:
            upstream = _run_step(build, step, upstream, say)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Bound torch's threads, and keep the BLAS behind NumPy to one: its matrices are small and its threads spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def finished_steps(build: Build) -> set[str]:
    """Names of the steps that would be skipped."""
    if not (build.directory(capture.NAME) / DONE).is_file():
        # Nothing follows without states, and a digest would read the models, which may not be here yet.
        return set()
    upstream, finished = digest_of(tool_versions()), set()
    for step in STEPS:
        upstream = _digest(build, step, upstream)
        if is_done(build.directory(step.NAME), upstream):
            finished.add(step.NAME)
    return finished


def _digest(build: Build, step: Step, upstream: str) -> str:
    """What stands for the result of a step: its settings and everything before it."""
    return digest_of({"step": step.NAME, "settings": step.settings(build), "upstream": upstream})


def _run_step(build: Build, step: Step, upstream: str, say: Callable[[str], None]) -> str:
    """Run one step if needed and return the digest that stands for its result."""
    digest = _digest(build, step, upstream)
    directory = build.directory(step.NAME)
    if is_done(directory, digest):
        say(f"{step.NAME}: finished before with the same inputs, skipped")
        return digest
    if step.NAME in KEEPS_PARTIAL:
        # From here on the directory is not finished, whatever it was before.
        (directory / DONE).unlink(missing_ok=True)
    else:
        fresh_directory(directory)
    started = time.perf_counter()
    try:
        step.run(build)
    except ValueError as error:
        # The refusals of the pure functions: states that are not finite, layers without variance and their like.
        raise BuildError(f"{step.NAME}: {error}") from error
    seconds = time.perf_counter() - started
    mark_done(directory, digest, seconds=round(seconds, 3))
    say(f"{step.NAME}: done in {seconds:.1f} s")
    return digest


def _publish(bundle: Path, output: Path) -> Bundle:
    """Copy the bundle to its place, whole or not at all, and check what lies there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copyfile(bundle, temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return load_bundle(output)
