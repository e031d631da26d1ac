"""Runs the steps of a build in order, skips what is finished, and publishes the bundle."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from artifacts.bundle import Bundle, load_bundle
from artifacts.jobs import align, capture, evaluate, pack, pair, tune, vectors
from artifacts.jobs.build import Build
from artifacts.jobs.workdir import digest_of, fresh_directory, is_done, mark_done


class Step(Protocol):
    """One resumable step: a module that reads the results of earlier steps and leaves its own on disk."""

    NAME: str

    def settings(self, build: Build) -> object:
        """JSON value of everything that decides the result, apart from earlier steps."""

    def run(self, build: Build) -> None:
        """Do the work and write the results into `build.directory(NAME)`."""


STEPS: tuple[Step, ...] = (capture, align, pair, vectors, tune, evaluate, pack)
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
    if restart and build.work.exists():
        shutil.rmtree(build.work)
    build.work.mkdir(parents=True, exist_ok=True)
    if build.config.threads is not None:
        torch.set_num_threads(build.config.threads)
    build.check_data()
    upstream = digest_of(pack.tool_versions())
    for step in STEPS:
        upstream = _run_step(build, step, upstream, say)
    return _publish(build.directory(pack.NAME) / pack.BUNDLE, output)


def _run_step(build: Build, step: Step, upstream: str, say: Callable[[str], None]) -> str:
    """Run one step if needed and return the digest that stands for its result."""
    digest = digest_of({"step": step.NAME, "settings": step.settings(build), "upstream": upstream})
    directory = build.directory(step.NAME)
    if is_done(directory, digest):
        say(f"{step.NAME}: finished before with the same inputs, skipped")
        return digest
    if step.NAME in KEEPS_PARTIAL:
        # From here on the directory is not finished, whatever it was before.
        (directory / "done.json").unlink(missing_ok=True)
    else:
        fresh_directory(directory)
    started = time.perf_counter()
    step.run(build)
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
