"""The house rules: what is declared, how big the code may grow, and what it may reach for."""

import ast
import functools
import io
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "ldm_minimal").glob("*.py"))
LDM = ROOT / "ldm_minimal" / "ldm.py"
OUTSIDE = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "accelerate", "tqdm"}  # what ldm.py may import
OURS = {"ldm_minimal", "chapters", "book", "tests"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
MEGABYTE = 1_000_000


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def code_lines(path):
    """The numbers of the lines that hold code: not blank, not only a comment, not a docstring."""
    source = path.read_text(encoding="utf-8")
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node, clean=False) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def imports(path):
    """(module, level) of every import in the file, at any depth; level counts the dots of a relative one."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((name.name, 0) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def repository_files():
    """What git tracks, and what the next commit could add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: there are no tracked files to measure")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    files = {ROOT / name for name in listed if name}
    assert LDM in files, "git ls-files did not list ldm_minimal/ldm.py"
    return sorted(path for path in files if path.is_file())


def our_python():
    return [p for folder in ("ldm_minimal", "data", "chapters", "tests") for p in sorted((ROOT / folder).rglob("*.py"))
            if ".ipynb_checkpoints" not in p.parts]


def pins():
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


# ---- what is declared ----

def test_conda_environment_is_python_and_the_requirements():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *packages, pip = environment["dependencies"]
    assert [package.split("=")[0] for package in packages] == ["python", "pip"]
    assert pip == {"pip": ["-r requirements.txt"]}
    version = packages[0].split("=")[1]
    assert SpecifierSet(project()["requires-python"]).contains(version), version


def test_requirements_are_pinned_and_install_the_package():
    *pinned, package = pins()
    assert package == "-e ."
    for line in pinned:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), f"not pinned with ==: {line}"
    names = [canonical(Requirement(line).name) for line in pinned]
    assert len(names) == len(set(names)), "a package is pinned twice"
    assert not {"torchvision", "lpips"} & set(names), "torchvision has no CPU build here, and lpips asks for it"


def test_pins_are_within_the_loose_bounds():
    pinned = {canonical(r.name): next(iter(r.specifier)).version for r in map(Requirement, pins()[:-1])}
    loose = [*project()["dependencies"], *(line for extra in project()["optional-dependencies"].values() for line in extra)]
    for bound in map(Requirement, loose):
        name = canonical(bound.name)
        assert name in pinned, f"{name} is in pyproject.toml but not pinned in requirements.txt"
        assert bound.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is not within {bound}"
    assert {canonical(Requirement(line).name) for line in loose} == set(pinned)


def test_bounds_let_colab_keep_its_own_torch():
    bounds = {canonical(r.name): r.specifier for r in map(Requirement, project()["dependencies"])}
    assert set(bounds) == {{"PIL": "pillow"}.get(name, name) for name in OUTSIDE}
    assert bounds["torch"] == SpecifierSet(">=2.11")
    assert all(s.operator == ">=" for specifier in bounds.values() for s in specifier), "an upper bound would replace Colab's"
    assert SpecifierSet(project()["requires-python"]) == SpecifierSet(">=3.11")


# ---- how big the code may grow ----

def test_method_file_stays_readable():
    code, whole = len(code_lines(LDM)), len(LDM.read_text(encoding="utf-8").splitlines())
    assert code <= 850, f"ldm.py has {code} lines of code; 850 are allowed"
    assert whole <= 1250, f"ldm.py has {whole} lines in all; 1,250 are allowed"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.name)
def test_no_function_is_long(path):
    code = code_lines(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = len(code & set(range(node.lineno, node.end_lineno + 1)))
            assert length <= 45, f"{path.name}:{node.lineno} {node.name} has {length} lines of code; 45 are allowed"


def test_repository_is_small():
    sizes = {path: path.stat().st_size for path in repository_files()}
    assert not {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > 15 * MEGABYTE}
    assert sum(sizes.values()) <= 50 * MEGABYTE


# ---- what the code may reach for ----

def test_method_file_imports_only_what_a_reader_was_told():
    allowed = OUTSIDE | (sys.stdlib_module_names - {"argparse"})
    for module, level in imports(LDM):
        assert level == 0 and module.split(".")[0] in allowed, f"ldm.py may not import {'.' * level}{module}"


def test_data_imports_nothing_of_ours():
    scripts = sorted((ROOT / "data").rglob("*.py"))
    assert scripts, "data/ has no scripts"
    for path in scripts:
        for module, level in imports(path):
            assert level == 0 and module.split(".")[0] not in OURS, f"{path.relative_to(ROOT)} imports {module}"


def test_nothing_is_left_to_do():
    words = re.compile("TO" "DO|FIX" "ME")
    suffixes = {".py", ".ipynb", ".md", ".toml", ".yml", ".txt", ".sh", ""}
    for path in repository_files():
        if path.suffix in suffixes:
            found = words.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path.relative_to(ROOT)} says {found[0]}"


def test_no_pickle_is_opened_blindly():
    for path in our_python():
        for node in ast.walk(tree(path)):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in [name.name for name in node.names], f"{where} hides torch.load under another name"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: keyword.value for keyword in node.keywords}.get("weights_only")
                assert isinstance(given, ast.Constant) and given.value is True, f"{where} needs weights_only=True"
        if "tests" not in path.parts:
            assert "pickle" not in {module for module, _ in imports(path)}, f"{path.relative_to(ROOT)} imports pickle"


# ---- the table of contents ----

def test_all_names_what_the_method_file_defines():
    defined, other, named = set(), set(), None
    for node in tree(LDM).body:
        if isinstance(node, DEFINITIONS):
            defined.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = {t.id for t in ast.walk(node) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}
            if targets == {"__all__"}:
                named = ast.literal_eval(node.value)
            other |= targets
    assert named is not None, "ldm.py has no __all__"
    assert len(named) == len(set(named)), "__all__ names something twice"
    unnamed = {name for name in defined if not name.startswith("_")} - set(named)
    assert not unnamed, f"not in __all__, so give a leading underscore or name it: {sorted(unnamed)}"
    undefined = set(named) - defined - other
    assert not undefined, f"in __all__ but not defined in ldm.py: {sorted(undefined)}"


def test_package_re_exports_exactly_the_method_file():
    import ldm_minimal
    from ldm_minimal import ldm

    modules = {path.stem for path in PACKAGE}
    assert {name for name in vars(ldm_minimal) if not name.startswith("_")} - modules == set(ldm.__all__)
    for name in ldm.__all__:
        assert getattr(ldm_minimal, name) is getattr(ldm, name), name


def test_public_names_have_docstrings():
    missing = [n.name for n in tree(LDM).body
               if isinstance(n, DEFINITIONS) and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not missing, f"ldm.py: no docstring in {missing}"


# ---- the commands we tell people to type ----

def commands(name):
    """The text of the file, with continued lines joined."""
    return (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")


def targets():
    return set(re.findall(r"^([a-z]+):", commands("Makefile"), re.M))


def code_in(markdown):
    """What stands in backticks or in fenced or indented blocks."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", markdown, re.M | re.S)
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)) + \
        re.findall(r"^ {4}(.+)", markdown, re.M)


def test_readme_names_make_targets_that_exist():
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code_in(commands("README.md")))))
    assert {"train", "test"} <= named
    assert named <= targets(), f"README.md: no such target: {sorted(named - targets())}"


def test_readme_names_files_that_exist():
    text = commands("README.md")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    scripts = re.findall(r"python3? ([\w./-]+\.py)", text)
    missing = [name for name in links + scripts if not (ROOT / name).exists()]
    assert not missing, f"README.md names what is not there: {missing}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["help", "train", "test", "lab", "clean"])
def test_make_target_exists(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and target in targets(), done.stderr or f"the Makefile has no rule for {target}"


def test_ci_runs_what_the_readme_tells_a_reader_to_run():
    script = commands(".ci/run")
    assert re.search(r"^part \w+ make test$", script, re.M)
    assert "set -euo pipefail" in script
    if sys.platform != "win32":
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"


@functools.cache
def flags_of(command):
    usage = subprocess.run([sys.executable, "-m", "ldm_minimal", command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert usage.returncode == 0, f"python -m ldm_minimal {command} --help failed\n{usage.stderr}"
    return set(re.findall(r"--[a-z][a-z-]*", usage.stdout))


@pytest.mark.parametrize("name", ["README.md", "Makefile", ".ci/run"])
def test_commands_use_flags_that_the_command_line_knows(name):
    used = {}
    for command, rest in re.findall(r"-m ldm_minimal ([a-z]+)([^\n`]*)", commands(name)):
        used.setdefault(command, set()).update(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.split("#")[0]))
    assert {"train", "sample"} <= set(used) or name == "README.md", f"{name} should train and sample"
    for command, flags in used.items():
        unknown = flags - flags_of(command)
        assert not unknown, f"{name}: python -m ldm_minimal {command} does not know {sorted(unknown)}"
