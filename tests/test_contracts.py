"""The house's rules that no linter knows: how an op is laid out, sizes, single sources of truth."""

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from types import FunctionType

import pytest
import torch

import tailor_fast
from tailor_fast import errors
from tailor_fast._core.extension import load_extension
from tailor_fast.ops import OPS
from tests.source_tree import PACKAGE, ROOT, files, parse

PUBLIC = [
    "CalibrationReport",
    "Patch",
    "PatchPlan",
    "Recipe",
    "Report",
    "RunOptions",
    "Tailored",
    "Task",
    "__version__",
    "backends",
    "calibrate",
    "join_processes",
    "patch_checkpoint",
    "plan_patch",
    "save_batches",
    "stitch_checkpoints",
    "tailor_model",
]
PYTHON = [ROOT / "setup.py", *files("tailor_fast"), *files("tests"), *files("benchmarks")]
NATIVE = [path for path in files("csrc", "*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]
LINES = {"tests": 400, "tailor_fast": 350, "benchmarks": 350, "setup.py": 350, "csrc": 350}
FUNCTION_LINES = {"kernel": 120, "": 50}


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def public_functions() -> list[tuple[str, FunctionType]]:
    found = []
    for op in OPS:
        module = import_module(f"tailor_fast.ops.{op}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__module__ == f"{module.__name__}.api":
                found.append((name, value))
    return found


FUNCTIONS = public_functions()
NAMES = [name for name, _ in FUNCTIONS]


def test_the_public_names_are_these() -> None:
    assert sorted(tailor_fast.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(tailor_fast, name) is not None


@pytest.mark.parametrize("module", ["batch", "errors", "evaluation", "integrations", "ops"])
def test_public_modules_are_there_without_an_import_of_their_own(module: str) -> None:
    assert getattr(tailor_fast, module) is import_module(f"tailor_fast.{module}")
    assert module in dir(tailor_fast)


@pytest.mark.parametrize("op", OPS)
def test_ops_are_there_without_an_import_of_their_own(op: str) -> None:
    code = f"import tailor_fast; print(tailor_fast.ops.{op}.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"tailor_fast.ops.{op}\n"


@pytest.mark.parametrize("name", ["tailor_fast", "tailor_fast.ops"])
def test_an_unknown_name_is_named(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nonsense'"):
        _ = import_module(name).nonsense


def test_every_error_that_ends_a_job_is_public() -> None:
    kinds = [errors.TailorError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    homes = {"tailor_fast._core.errors"}
    ours = {kind.__name__ for kind in kinds if kind.__module__ in homes}
    assert ours == set(errors.__all__)


def test_every_folder_of_ops_is_an_op() -> None:
    folders = {path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py")}
    assert folders == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_layout_of_an_op(op: str) -> None:
    folder = PACKAGE / "ops" / op
    assert (folder / "api.py").is_file()
    assert (folder / "schema.py").is_file()
    assert (folder / "reference.py").is_file() or (folder / "reference" / "__init__.py").is_file()
    order = import_module(f"tailor_fast.ops.{op}.schema").ORDER
    assert set(order) == {"cpu", "cuda"}
    # On the CPU Triton's interpreter comes last: for tests, never what `auto` takes.
    assert order["cpu"][-1 if "triton" not in order["cpu"] else -2] == "reference"
    assert order["cuda"][-1] == "reference"
    for backends in order.values():
        for backend in backends:
            assert (folder / f"{backend}.py").is_file() or (folder / backend).is_dir()


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=NAMES)
def test_signature(name: str, function: FunctionType) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    last = parameters[-1]
    assert (last.name, last.default, last.kind) == ("backend", "auto", last.KEYWORD_ONLY)
    for parameter in parameters:
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if (
            parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        ):  # tensors; only an optional one may be left out
            assert parameter.default in (parameter.empty, None)
        assert parameter.annotation is not parameter.empty


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=NAMES)
def test_docstring(name: str, function: FunctionType) -> None:
    text = inspect.getdoc(function) or ""
    sections = [text.find(f"\n\n{section}:\n") for section in ("Args", "Returns", "Raises")]
    assert 0 < sections[0] < sections[1] < sections[2]
    arguments = text[sections[0] : sections[1]]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^    ([\w*]+, )*{parameter}(, \w+)*:", arguments, re.MULTILINE), (
            parameter
        )


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=NAMES)
def test_registered_with_torch(name: str, function: FunctionType) -> None:
    schema = getattr(torch.ops.tailor_fast, name).default._schema
    assert schema.arguments[-1].name == "backend"
    mutated = [argument.is_out or bool(argument.alias_info) for argument in schema.arguments]
    assert any(mutated) == name.endswith("_")
    assert schema.is_mutable == name.endswith("_")


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=ids(PYTHON + NATIVE))
def test_length_of_files(path: Path) -> None:
    limit = LINES[path.relative_to(ROOT).parts[0]]
    limit = 60 if path.name == "bindings.cpp" else limit
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", PYTHON, ids=ids(PYTHON))
def test_length_of_functions(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = "triton.jit" in map(ast.unparse, node.decorator_list)
            limit = FUNCTION_LINES["kernel" if kernel else ""]
            documented = ast.get_docstring(node) is not None
            start = node.body[0].end_lineno if documented else node.lineno - 1
            assert node.end_lineno - start <= limit, node.name


@pytest.mark.parametrize("path", PYTHON, ids=ids(PYTHON))
def test_comments(path: Path) -> None:
    """No open ends, and every silenced check names its code, with the reason at the first one."""
    explained = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type != tokenize.COMMENT:
            continue
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", token.string), token.line
        if re.search(r"\bnoqa\b|type: ignore", token.string):
            found = re.search(r"(noqa: |type: ignore\[)([\w, -]+?)(\]|  |$)(.*)", token.string)
            assert found, f"which check? {token.line}"
            code, reason = found[2], found[4]
            assert re.search(r"\w+ \w+", reason) or code in explained, f"why? {token.line}"
            explained.add(code)


@pytest.mark.parametrize("path", NATIVE, ids=ids(NATIVE))
def test_native_sources(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), "no Torch headers"


@pytest.mark.parametrize("path", files("tailor_fast"), ids=ids(files("tailor_fast")))
def test_banned_calls(path: Path) -> None:
    """Pickle runs code from a file; autotuning runs a mutating kernel several times."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"torch.load", "torch.save", "triton.autotune"}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(names)


def test_one_version() -> None:
    assert metadata.version("tailor_fast") == tailor_fast.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assigned = [
        path
        for path in PYTHON
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert assigned == [PACKAGE / "_version.py"]


def test_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:] == sorted(headings[1:], key=lambda v: tuple(map(int, v.split("."))))[::-1]


def test_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"gpu", "peft", "mergekit", "ray", "test", "dev", "docs"} <= set(extras)


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", " ".join(code_of(readme))))
    assert {"demo", "test"} <= named <= targets
    folders = "tailor_fast|tests|benchmarks|csrc|docs"
    for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", readme):
        assert (ROOT / path).exists(), path


def code_of(markdown: str) -> list[str]:
    """What stands in backticks: ``make sure`` in a sentence is no command."""
    return re.findall(r"```.*?```|`[^`\n]+`", markdown, re.DOTALL)


def test_the_stub_describes_the_extension() -> None:
    extension = load_extension()
    if isinstance(extension, ImportError):
        pytest.skip(f"the C++ extension did not load: {extension}")
    stub = parse(PACKAGE / "_C.pyi").body
    functions = {node.name: node for node in stub if isinstance(node, ast.FunctionDef)}
    values = {ast.unparse(node.target) for node in stub if isinstance(node, ast.AnnAssign)}
    assert {name for name in dir(extension) if not name.startswith("__")} == values | set(functions)
    for name, node in functions.items():
        described = getattr(extension, name).__doc__
        names = re.findall(r"(\w+): ", described.partition("(")[2])
        assert names == [argument.arg for argument in node.args.args]
