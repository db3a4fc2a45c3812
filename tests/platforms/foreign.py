"""Debian's packages for another processor, downloaded and never installed. They have their own package lists, so that
this machine's apt does not learn of a second architecture."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from tests.platforms.building import ROOT

CACHE = ROOT / "build" / "platforms"


class Apt:
    """apt-get and apt-cache for one architecture, with the sources of this machine's apt."""

    def __init__(self, architecture: str) -> None:
        self.folder = CACHE / architecture
        for name in ("lists/partial", "cache/archives/partial", "packages"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        settings = {
            "APT::Architecture": architecture,
            "APT::Architectures::": architecture,
            "Dir::State::lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder / "cache",
            # Started by root, apt becomes another user, who may not write to our folder, and warns of that.
            "APT::Sandbox::User": "root",
        }
        self._updated = False
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def _run(self, program: str, *words: str, cwd: Path | str | None = None) -> str:
        command = [program, "-q", *self._options, *words]
        done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(words)} failed; it needs Debian and the network:\n{done.stderr}")
        return done.stdout

    def update(self) -> None:
        """Get the lists of packages, once."""
        if not self._updated:
            self._run("apt-get", "update")
            self._updated = True

    def depends(self, name: str) -> str:
        """What apt-cache says of the package's dependencies, one line for each."""
        self.update()
        return self._run("apt-cache", "depends", name)

    def package(self, name: str) -> Path:
        """The package's file, from the cache or else downloaded. Where the package only depends on the newest kernel's
        (as linux-image-arm64 does), that one's."""
        found = self._cached(name)
        if found is None:
            newest = re.search(r"Depends: (linux-image-\d\S*)", self.depends(name))
            # An interrupted apt-get leaves a part of a file: packages/ gets only whole ones.
            with tempfile.TemporaryDirectory(dir=self.folder) as fresh:
                self._run("apt-get", "download", newest[1] if newest else name, cwd=fresh)
                for file in Path(fresh).glob("*.deb"):
                    file.rename(self.folder / "packages" / file.name)
            found = self._cached(name)
            assert found is not None
        return found

    def _cached(self, name: str) -> Path | None:
        pattern = name.replace("linux-image-", "linux-image-*-") + "_*.deb"
        return next(iter(sorted((self.folder / "packages").glob(pattern))), None)

    def unpacked(self, name: str) -> Path:
        """A folder with the unpacked files of a package."""
        package = self.package(name)
        folder = self.folder / package.stem
        if not folder.is_dir():
            making = folder.with_suffix(".making")
            subprocess.run(["dpkg-deb", "-x", package, making], check=True)
            making.rename(folder)
        return folder
