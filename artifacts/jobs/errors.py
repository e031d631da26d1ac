"""The one error of the offline jobs that a user can cause and mend."""


class BuildError(Exception):
    """A build cannot go on: wrong configuration or data, or a result that must not become a bundle.

    `str(error)` is one sentence that names the value, the bound and the remedy.
    """
