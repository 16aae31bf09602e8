"""Change the address of this repository everywhere it is written.

python docs/set_address.py                                # print the address
python docs/set_address.py https://github.com/me/my-fork  # change it

The address is one setting: `Repository` in pyproject.toml. Badges, the set-up cells of the
notebooks, CITATION.cff and the pages of docs/ repeat it; this command rewrites them all.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where the address may stand. Data, tests and the package do not name it.
PATTERNS = (
    "*.md",
    "*.cff",
    "*.toml",
    "docs/**/*.md",
    "chapters/**/*.ipynb",
    "chapters/**/*.py",
    "site/**/*.py",
    "site/**/*.md",
    "site/**/*.html",
)
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


def current(root: Path) -> str:
    """The address of the repository at `root`, from its pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def files(root: Path) -> list[Path]:
    """The files that may name the address."""
    found = {path for pattern in PATTERNS for path in root.glob(pattern)}
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def rewrite(root: Path, new: str) -> list[Path]:
    """Replace the address by `new` in all files of `root`; return those that changed.

    Raises ValueError if `new` is not https://github.com/OWNER/NAME.
    """
    new = new.removesuffix("/").removesuffix(".git")
    if not ADDRESS.fullmatch(new):
        raise ValueError(f"address is {new!r}; https://github.com/OWNER/NAME is needed")
    # github.com/OWNER/NAME, and Colab's research.google.com/github/OWNER/NAME. The end is looked
    # at, too: OWNER/ldm is not the beginning of OWNER/ldm_minimal.
    old_name = re.escape(current(root).removeprefix("https://github.com/"))
    new_name = new.removeprefix("https://github.com/")
    pattern = re.compile(rf"(github(?:\.com)?/){old_name}(?![\w-])")
    changed = []
    for path in files(root):
        before = path.read_bytes().decode("utf-8")  # bytes, so that line endings stay
        after = pattern.sub(rf"\g<1>{new_name}", before)
        if after != before:
            path.write_bytes(after.encode("utf-8"))
            changed.append(path)
    return changed


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        print(current(ROOT))
        return 0
    try:
        changed = rewrite(ROOT, arguments[0])
    except ValueError as error:
        print(f"set_address: {error}", file=sys.stderr)
        return 1
    for path in changed:
        print(f"changed {path.relative_to(ROOT)}")
    print(f"the address is {current(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
