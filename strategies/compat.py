"""Undocumented names of libraries: their absence is an error that names the versions, never a silent change.

`torch_compat.py` and `deepspeed_compat.py` hold each such name that this package touches, and the reason.
"""

from __future__ import annotations


class UnsupportedVersionError(ValueError):
    """An installed library lacks what a strategy relies on; the message names the version that has it."""


def require(owner: object, names: tuple[str, ...], library: str, tested: str) -> None:
    """Raise UnsupportedVersionError unless `owner` (a module or object of `library`) has all `names`."""
    for name in names:
        if not hasattr(owner, name):
            place = getattr(owner, "__name__", type(owner).__name__)
            raise UnsupportedVersionError(unsupported(library, f"{place}.{name}", tested))


def unsupported(library: str, name: str, tested: str) -> str:
    """The message: what is missing, in which version, and the command that installs the tested one."""
    from importlib.metadata import version

    package = library.lower()
    return (
        f"{library} {version(package)} has no {name}, which this strategy relies on; "
        f"tested with {tested}: pip install {package}=={tested}"
    )
