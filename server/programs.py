"""Programs for the engine, made from the registry's bundles for the model that is served."""

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

from artifacts.bundle import Bundle
from artifacts.verify import ServedModel, check_target
from server.engine.program import Program
from server.lowering import lower
from server.registry.records import parse_key
from server.registry.store import BundleStore
from server.triggers import resolve_triggers

FingerprintPolicy = Literal["enforce", "ignore"]


class Programs:
    """Makes programs, and says which bundles the served model takes.

    Attributes:
        served: the served model.
    """

    def __init__(
        self,
        store: BundleStore,
        served: ServedModel,
        fingerprint: FingerprintPolicy,
        vocabulary: Callable[[], Mapping[int, str]],
    ) -> None:
        """Take what programs are made with.

        Args:
            store: where the bundles lie.
            served: the served model.
            fingerprint: `enforce` refuses a bundle made for other weights of the same shape.
            vocabulary: text of every token by id; called once, when the first bundle with a trigger comes.
        """
        self.served = served
        self._store = store
        self._fingerprint = fingerprint
        self._vocabulary = functools.cache(vocabulary)

    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle that cannot steer the served model.

        Raises:
            BundleError: it was built for another model.
            ValueError: one of its triggers fits no token of the model.
        """
        expected = self.served.fingerprint if self._fingerprint == "enforce" else bundle.manifest.target.fingerprint
        check_target(bundle, replace(self.served, fingerprint=expected))
        self._triggers(bundle)

    async def load(self, key: str) -> Program:
        """Read the program of a key from the store, off the event loop.

        Raises:
            RegistryError: the store does not hold the bundle, or holds it damaged.
            BundleError, ValueError: see `check`.
        """
        return await asyncio.to_thread(self._load, key)

    def _load(self, key: str) -> Program:
        digest, layers = parse_key(key)
        bundle = self._store.load(digest)
        self.check(bundle)
        return lower(bundle, self._triggers(bundle), layers)

    def _triggers(self, bundle: Bundle) -> Mapping[str, tuple[int, ...]]:
        return resolve_triggers(bundle.manifest, self._vocabulary() if bundle.manifest.triggers else {})
