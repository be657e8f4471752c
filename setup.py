"""Copies the folders of the repository's root that the package reads (`vispeft/resources.py`) into a wheel.

Everything else is in pyproject.toml. An editable install reads them where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "model_zoo")
UNWANTED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


class BuildWithFolders(build_py):
    """Builds the package, then puts the folders into it."""

    def run(self) -> None:
        """Build, and copy the folders, unless the install is an editable one."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib, "vispeft")
        shutil.rmtree(package, ignore_errors=True)  # it may hold files of an earlier build that are gone
        super().run()
        for folder in FOLDERS:
            shutil.copytree(folder, package / folder, ignore=UNWANTED)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List what was built, with the files of the folders."""
        own = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return own
        return own + [
            str(path)
            for folder in FOLDERS
            for path in Path(self.build_lib, "vispeft", folder).rglob("*")
            if path.is_file()
        ]

    def get_source_files(self) -> list[str]:
        """List what a source distribution needs, with the files of the folders."""
        kept = (path for folder in FOLDERS for path in Path(folder).rglob("*") if "__pycache__" not in path.parts)
        return super().get_source_files() + [str(path) for path in kept if path.is_file()]


setup(cmdclass={"build_py": BuildWithFolders})
