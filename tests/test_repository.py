"""What is declared, how big the repository may grow, and what the code may reach for."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ldm_minimal
from ldm_minimal import ldm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldm_minimal"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
MEGABYTE = 1_000_000

# Names of modules that lie in this repository. Scripts find some of them through sys.path.
OUR_FOLDERS = ("ldm_minimal", "chapters", "data", "docs", "tests")
OURS = {"ldm_minimal", "chapters", "book", "experiments", "tests", "benchmarks", "parity"}
OURS |= {path.stem for folder in OUR_FOLDERS for path in (ROOT / folder).rglob("*.py")}
# Installed by the Makefile without their dependencies (see there).
UNDECLARED = {"lpips", "open-clip-torch"}
# Come with Jupyter, nbval or matplotlib.
UNDECLARED |= {"nbformat", "nbclient", "ipython", "jupyter-client", "cycler"}
DISTRIBUTIONS = packages_distributions()  # module -> the names under which pip knows it


def python_files(*folders):
    files = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in files if ".ipynb_checkpoints" not in path.parts]


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path):
    """(module, level) of every import in the file; level counts the dots of a relative one."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, 0
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def others(path):
    """The distributions, as pip names them, of what the file imports from outside."""
    found = set()
    for module, level in imports(path):
        top = module.split(".")[0]
        if level == 0 and top not in sys.stdlib_module_names and top not in OURS:
            found.add(canonical(DISTRIBUTIONS.get(top, [top])[0]))
    return found


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    return {canonical(Requirement(line).name) for line in requirements}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extras():
    return [line for lines in project()["optional-dependencies"].values() for line in lines]


def pins():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]


def repository_files():
    """What git tracks, and what the next commit could add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: there are no tracked files to measure")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = {ROOT / name for name in listed.split("\0") if name}
    assert PACKAGE / "ldm.py" in files, "git ls-files did not list ldm_minimal/ldm.py"
    return sorted(path for path in files if path.is_file())


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
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line), f"not pinned: {line}"
    assert len(names(pinned)) == len(pinned), "a package is pinned twice"
    # torchvision has no CPU build that pip would choose here, and lpips asks for it.
    assert not {"torchvision", "lpips"} & names(pinned)


def test_pins_are_within_the_loose_bounds():
    pinned = {}
    for requirement in map(Requirement, pins()[:-1]):
        pinned[canonical(requirement.name)] = next(iter(requirement.specifier)).version
    bounds = [*project()["dependencies"], *extras()]
    for bound in map(Requirement, bounds):
        name = canonical(bound.name)
        assert name in pinned, f"{name} is in pyproject.toml but not in requirements.txt"
        assert bound.specifier.contains(pinned[name]), f"{name}=={pinned[name]}, but {bound}"
    assert names(bounds) == set(pinned)


def test_bounds_let_colab_keep_its_own_torch():
    for requirement in map(Requirement, project()["dependencies"]):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">="}, f"{requirement}: an upper bound would replace Colab's"
    assert project()["requires-python"] == ">=3.11"


def test_method_file_imports_the_declared_dependencies_and_the_standard_library():
    for module, level in imports(PACKAGE / "ldm.py"):
        assert level == 0, f"ldm.py imports .{module}; it must run alone"
        assert module.split(".")[0] != "argparse", "the command line is not the method"
    assert others(PACKAGE / "ldm.py") == names(project()["dependencies"])


@pytest.mark.parametrize(
    "folder, allowed_extras",
    [
        ("ldm_minimal", ["hub"]),
        ("data", ["emoji"]),
        ("chapters", ["chapters", "test"]),
        ("tests", ["hub", "chapters", "emoji", "test"]),
        ("docs", []),
    ],
)
def test_imports_are_declared(folder, allowed_extras):
    declared = names(project()["dependencies"]) | UNDECLARED
    for extra in allowed_extras:
        declared |= names(project()["optional-dependencies"][extra])
    for path in python_files(folder):
        unknown = others(path) - declared
        assert not unknown, f"{path.relative_to(ROOT)} imports {sorted(unknown)}: not declared"


def test_versions_agree():
    assert ldm_minimal.__version__ == project()["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project()["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.M)[0] == project()["version"]


def test_workflow_runs_all_tests_on_both_versions():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.12"]
    assert any("make test" in step.get("run", "") for step in job["steps"])


# ---- how big the repository may grow ----


def test_repository_is_small():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in repository_files()}
    assert not {name: size for name, size in sizes.items() if size > 15 * MEGABYTE}
    assert sum(sizes.values()) <= 50 * MEGABYTE


# ---- what the code may reach for ----


def test_nothing_imports_the_command_line():
    for path in python_files("ldm_minimal", "chapters", "data"):
        for module, _ in imports(path):
            assert not module.endswith("__main__"), f"{path.relative_to(ROOT)} imports {module}"


def test_library_and_data_do_not_import_the_chapters():
    ours = {"chapters", "book", "experiments", "tests"}
    for path in python_files("ldm_minimal"):
        assert not ours & {module.split(".")[0] for module, _ in imports(path)}, path.name
    for path in python_files("data"):
        modules = {module.split(".")[0] for module, _ in imports(path)}
        assert not (ours | {"ldm_minimal"}) & modules, path.relative_to(ROOT)


def test_no_pickle_is_opened_blindly():
    for path in python_files("ldm_minimal", "chapters", "data", "tests", "docs"):
        for node in ast.walk(tree(path)):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in [name.name for name in node.names], (
                    f"{where} renames torch.load"
                )
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                only = given.get("weights_only")
                safe = isinstance(only, ast.Constant) and only.value is True
                assert safe, f"{where} needs weights_only=True"
        if "tests" not in path.parts:
            modules = {module for module, _ in imports(path)}
            uses = [ast.unparse(n) for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)]
            uses = [name for name in uses if name.split(".")[0] == "pickle"]
            if "pickle" in modules:  # only as the base of a class that says which names it knows
                where = path.relative_to(ROOT)
                assert uses == ["pickle.Unpickler"], f"{where} uses {uses}"
                assert restricted_unpicklers(path) == 1, f"{where} must override find_class"


def restricted_unpicklers(path):
    """How many classes derive from pickle.Unpickler and have a find_class of their own."""
    found = 0
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            found += "find_class" in methods
    return found


# ---- the table of contents ----


def test_all_names_what_the_method_file_defines():
    defined = {node.name for node in tree(PACKAGE / "ldm.py").body if isinstance(node, DEFINITIONS)}
    public = {name for name in defined if not name.startswith("_")}
    assert len(ldm.__all__) == len(set(ldm.__all__)), "__all__ names something twice"
    assert not public - set(ldm.__all__), "not in __all__: name it there, or begin it with _"


def test_package_re_exports_exactly_the_method_file():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    public = {name for name in vars(ldm_minimal) if not name.startswith("_")}
    assert public - modules == set(ldm.__all__)
    for name in ldm.__all__:
        assert getattr(ldm_minimal, name) is getattr(ldm, name), name
