"""What was built into this installation, and why: what setup.py wrote into `_build_info.json`.

Run as a file it prints the one-line summary, without importing torch or the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("_build_info.json")


@dataclass(frozen=True)
class ExtensionInfo:
    """One extension module: whether it was built, why (or why not), and from what."""

    built: bool
    reason: str
    sources: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildInfo:
    """The record of one build; text fields are empty where nothing is known.

    `extensions` maps a module's name ("_C") to what became of it. `torch` is the version that was
    compiled against, which need not be the one that is imported: the extension serves both.
    """

    summary: str
    extensions: dict[str, ExtensionInfo]
    compiler: str = ""
    torch: str = ""
    python: str = ""
    platform: str = ""

    @property
    def built(self) -> bool:
        """Whether the CPU kernels were built."""
        extension = self.extensions.get("_C")
        return extension is not None and extension.built


def read(path: Path = PATH) -> BuildInfo:
    """Read the record; one that is missing or damaged is an answer too, never an error."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        extensions = {
            name: ExtensionInfo(
                bool(entry["built"]),
                str(entry["reason"]),
                tuple(entry["sources"]),
                tuple(entry["flags"]),
            )
            for name, entry in content["extensions"].items()
        }
        texts = {name: str(content[name]) for name in ("compiler", "torch", "python", "platform")}
        return BuildInfo(str(content["summary"]), extensions, **texts)
    except FileNotFoundError:
        reason = "the package was not installed with pip, run: pip install -e ."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{path.name} cannot be read ({error!r}), run: pip install --force-reinstall -e ."
    unknown = {"_C": ExtensionInfo(False, reason)}
    return BuildInfo(f"resnet_fused: kernels not built: {reason}", unknown)


if __name__ == "__main__":
    print(read().summary)
