"""Which modules a command imports before it does anything else, according to its source: ``warm=True`` preloads them.

The source is read and not run. Installed modules are preloaded. Other modules, such as those in the script's own
folder, may be edited between two starts, so they are not preloaded, but the modules that they import at their top are.
The search ends where the program begins to do something, because it may set a variable, for instance, that a later
import reads.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder

from .._frozen import Frozen
from .command import first_folder, python_command

# Without torch._dynamo in the template each rank would import it for its first optimizer or DistributedDataParallel:
# that takes 0.8 to 7 s, and most of the memory that ranks share, because it walks all of torch.
_TOO = {"torch": "torch._dynamo"}

# A call of these in an assignment does nothing that a later import could notice.
_QUIET = {"logging.getLogger", "getLogger", "TypeVar", "typing.TypeVar", "Path", "pathlib.Path", "frozenset", "tuple"}
# The `with` blocks in which an import may stand; it may also stand in `try`.
_AROUND = {"suppress", "contextlib.suppress", "catch_warnings", "warnings.catch_warnings"}
_MOST_FILES = 200


class Found(Frozen):
    """What a command imports at its top.

    Attributes:
        modules: What can be preloaded, in the order of the imports.
        left_out: Names of modules that cannot, each with the reason.
    """

    modules: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def find(command: Sequence[str], cwd: str) -> Found:
    """Find what a command imports at its top.

    Args:
        command: ``python [FLAGS] SCRIPT``, ``-m MODULE`` or ``-c CODE``; another command imports nothing.
        cwd: The absolute folder that it starts in.
    """
    parsed = python_command(command)
    if isinstance(parsed, str):
        return Found((), ((command[0], parsed),))
    search = _Search(first_folder(parsed, cwd) or cwd, is_ours(parsed.python))
    if parsed.kind == "-c":
        search.source(parsed.target, "-c", "")
    elif parsed.kind == "-m":
        search.program(parsed.target)
    else:
        path = os.path.join(cwd, parsed.target)
        search.file(os.path.join(path, "__main__.py") if os.path.isdir(path) else path, "")
    for name, too in _TOO.items():
        if any(module.partition(".")[0] == name for module in search.modules):
            search.add(too)
    return Found(tuple(search.modules), tuple(search.left_out.items()))


def is_ours(python: str) -> bool:
    """Whether the interpreter ``python`` has the same packages as this interpreter."""
    path = shutil.which(python)
    return path is not None and os.path.dirname(os.path.abspath(path)) == os.path.dirname(sys.executable)


class _Search:
    """One walk through the statements of a program and of its own modules, in the order in which they run."""

    def __init__(self, folder: str, knows_packages: bool) -> None:
        self.modules: dict[str, None] = {}
        self.left_out: dict[str, str] = {}
        self._folder = folder
        self._knows_packages = knows_packages
        self._site = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        self._files: set[str] = set()
        self._end = ""
        """Where the program begins to do something else: the reason why later imports are left out."""

    def program(self, name: str) -> None:
        """The module that ``-m`` runs: the packages that it is in, and then the module, or its __main__."""
        package = name.rpartition(".")[0]
        if package:
            self.module(package)
        path = self._found(name)
        if path is None:
            self.left_out.setdefault(name, "it cannot be found")
        elif os.path.basename(path) == "__init__.py":
            self.module(name)
            self.file(os.path.join(os.path.dirname(path), "__main__.py"), name)
        else:
            self.file(path, package)

    def file(self, path: str, package: str) -> None:
        if path in self._files or len(self._files) > _MOST_FILES:
            return
        self._files.add(path)
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError as error:
            self.left_out[path] = f"it cannot be read: {error.strerror}"
        else:
            self.source(text, os.path.relpath(path, self._folder), package)

    def source(self, text: str | bytes, name: str, package: str) -> None:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            self.left_out[name] = f"it cannot be parsed: {error}"
        else:
            self._statements(tree.body, name, package)

    def installed(self, name: str) -> None:
        """Note a module of an installed package, unless the program does something before the import."""
        if not self._end:
            self.add(name)
        elif name not in self.modules and self._may_be(name):
            self.left_out.setdefault(name, self._end)

    def add(self, name: str) -> None:
        if self._may_be(name):
            self.modules[name] = None

    def _may_be(self, name: str) -> bool:
        return not self._knows_packages or _in(self._site, name) is not None

    def module(self, name: str) -> None:
        """Note a module that is imported, or search the modules that it imports."""
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "rankspawn":
            return
        if _in([self._folder], top) is None:
            if not self._knows_packages or _in(self._site, top) is not None:
                return self.installed(name)
            if self._found(top) is None:
                self.left_out.setdefault(top, "it is not installed")
                return None
            why = "it is not among the installed packages, and may be edited between two starts"
        else:
            why = "it is in the program's own folder, and may be edited between two starts"
        self.left_out.setdefault(top, why)
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            path = self._found(".".join(parts[:count]))
            if path is not None:
                is_package = os.path.basename(path) == "__init__.py"
                self.file(path, ".".join(parts[: count if is_package else count - 1]))
        return None

    def _found(self, name: str) -> str | None:
        """The source of a module that the program can import; None where there is none."""
        top, _, rest = name.partition(".")
        path = _in([self._folder], top)
        if path is None and self._knows_packages:
            try:
                spec = importlib.util.find_spec(top)
            except (ImportError, ValueError):
                return None
            path = None if spec is None else spec.origin
        if path is None or not path.endswith(".py"):
            return None
        return _in([os.path.dirname(path)], rest) if rest else path

    def _statements(self, body: list[ast.stmt], name: str, package: str) -> None:
        for node in body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for module, is_written in _imported(node, package):
                    if is_written or self._knows_packages:
                        self.module(module)
            elif isinstance(node, ast.Try):
                self._statements([*node.body, *node.orelse], name, package)
            elif isinstance(node, ast.With) and all(_calls(item.context_expr) in _AROUND for item in node.items):
                self._statements(node.body, name, package)
            elif isinstance(node, ast.If) and (branch := _branch(node)) is not None:
                self._statements(branch, name, package)
            elif not _is_quiet(node):
                self._end = self._end or f"line {node.lineno} of {name} does something before it is imported"


def _in(folders: list[str], name: str) -> str | None:
    """The file of the module ``name`` below one of the folders, or a folder that is a package without __init__.py."""
    for part in name.split("."):
        spec = PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or [])
        found = spec.origin or next(iter(folders), None)
    return found


def _imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, bool]]:
    """The names that may be modules, and for each whether the statement says that it is one."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, True) for alias in node.names)
        return
    parts = package.split(".") if package else []
    base = (
        ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
    )
    if base and base != "__future__":
        yield base, True
        yield from ((f"{base}.{alias.name}", False) for alias in node.names if alias.name != "*")


def _branch(node: ast.If) -> list[ast.stmt] | None:
    """The branch of an ``if`` that runs at an import; None if the source does not show which."""
    test = ast.unparse(node.test)
    if test in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return node.orelse
    names = {one.id for one in ast.walk(node.test) if isinstance(one, ast.Name)}
    if names == {"sys"} and test.startswith("sys.version_info") and not _calls_something(node.test):
        return node.body if eval(test, {"sys": sys}) else node.orelse
    return None


def _is_quiet(node: ast.stmt) -> bool:
    """Whether a statement does nothing that a later import could notice."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = all(isinstance(one, (ast.Name, ast.Tuple)) for one in targets)
        return names and (node.value is None or not _calls_something(node.value))
    return False


def _calls(node: ast.expr) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _calls_something(node: ast.expr) -> bool:
    calls = (one for one in ast.walk(node) if isinstance(one, (ast.Call, ast.Await, ast.NamedExpr)))
    return any(not isinstance(one, ast.Call) or _calls(one) not in _QUIET for one in calls)
