"""Checks of a release that no other tool makes: `make release-check` runs them.

python .ci/release.py files         # version, list of changes, and what sdist and wheel hold
python .ci/release.py snippet       # README's first snippet, by the package that is installed
python .ci/release.py homepage URL  # README's links, metadata and citation lead to this address
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check_files() -> None:
    """Compare version, list of changes, sdist and wheel."""
    found = re.search(
        r'^__version__ = "(.+)"', (ROOT / "lla_callbacks" / "version.py").read_text(), re.M
    )
    assert found, "lla_callbacks/version.py names no version"
    version = found[1]
    entry = re.search(
        rf"^## {re.escape(version)}\b(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert entry, f"CHANGELOG.md has no entry '## {version}': write one"
    built = sorted(path.name for path in (ROOT / "dist").iterdir())
    wheel, sdist = f"lla_callbacks-{version}-py3-none-any.whl", f"lla_callbacks-{version}.tar.gz"
    assert built == [wheel, sdist], f"dist/ holds {built}, not {[wheel, sdist]}"
    with zipfile.ZipFile(ROOT / "dist" / wheel) as archive:
        names = archive.namelist()
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "lla_callbacks").glob("**/*.py")}
    pages = (p for p in (ROOT / "lla_callbacks").glob("page/*") if p.is_file())
    package |= {str(p.relative_to(ROOT)) for p in pages} | {"lla_callbacks/py.typed"}
    missing = sorted(package - set(names))
    assert not missing, f"the wheel lacks {missing}"
    own = ("lla_callbacks/", f"lla_callbacks-{version}.dist-info/")
    foreign = [name for name in names if not name.startswith(own)]
    assert not foreign, f"the wheel holds {foreign}, which is not the package"
    with tarfile.open(ROOT / "dist" / sdist) as source:
        sources = {name.partition("/")[2] for name in source.getnames()}
    missing = sorted((package | {"LICENSE", "README.md", "CITATION.cff"}) - sources)
    assert not missing, f"the sdist lacks {missing}"
    print(f"lla_callbacks {version}: sdist and wheel hold the package, and nothing else.")
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited, "CITATION.cff names no version"
    assert cited[1] == version, f"CITATION.cff is of version {cited[1]}, not {version}"
    relative = relative_links((ROOT / "README.md").read_text())
    if relative:
        print(
            f"README.md has {len(relative)} links within the repository, which lead nowhere on a "
            "package index: make homepage URL=https://... once the repository has an address."
        )
    if entry[1].strip() == "(unreleased)":
        print("CHANGELOG.md still says '(unreleased)': put the date there before you tag.")


# Pages are read at a branch; pictures are fetched raw.
PAGES, PICTURES = "blob/main", "raw/main"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def relative_links(text: str) -> list[str]:
    """Return what a page links to within its own repository."""
    return [m[3] for m in LINK.finditer(text) if not re.match(r"[a-z]+:|#", m[3])]


def absolute(text: str, url: str) -> str:
    """Return a page whose links lead to a repository's address from wherever it is read."""

    def lead(m: re.Match[str]) -> str:
        if not relative_links(m[0]):
            return m[0]
        place = PICTURES if m[1] else PAGES
        return f"{m[1]}[{m[2]}]({url.rstrip('/')}/{place}/{m[3]})"

    return LINK.sub(lead, text)


def set_homepage() -> None:
    """Write the repository's address wherever it belongs."""
    url = sys.argv[2].rstrip("/")
    assert re.fullmatch(r"https://[\w.-]+/[\w./-]+", url), f"{url!r} is no address of a repository"
    readme = ROOT / "README.md"
    readme.write_text(absolute(readme.read_text(), url))
    config, cited = ROOT / "setup.cfg", ROOT / "CITATION.cff"
    text = re.sub(r"^(url|project_urls) =.*\n(    .*\n)*", "", config.read_text(), flags=re.M)
    urls = f"url = {url}\nproject_urls =\n    Documentation = {url}/{PAGES}/docs/index.md\n"
    urls += f"    Changes = {url}/{PAGES}/CHANGELOG.md\n    Issues = {url}/issues\n"
    config.write_text(text.replace("license = Apache-2.0\n", f"{urls}license = Apache-2.0\n", 1))
    text = re.sub(r"^repository-code:.*\n", "", cited.read_text(), flags=re.M)
    cited.write_text(f'{text.rstrip()}\nrepository-code: "{url}"\n')


def run_snippet() -> None:
    """Train a tiny network by README's first snippet."""
    import torch
    from pytorch_lightning import LightningModule
    from torch.utils.data import DataLoader, TensorDataset

    import lla_callbacks

    used = Path(lla_callbacks.__file__).parent
    assert used != ROOT / "lla_callbacks", "this is the checkout, not the package"

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
            )

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert block, "README.md has no python block"
    names: dict[str, object] = {}
    exec(compile(block[1], "README.md", "exec"), names)
    trainer = names["trainer"]
    trainer.fit_loop.max_epochs = 2
    data = TensorDataset(torch.randn(16, 3), torch.randint(0, 2, (16,)))
    trainer.fit(Module(), DataLoader(data, 4))
    report = trainer.callbacks[0].report
    assert report is not None, "the snippet measured nothing"
    print(report.summary())
    assert list(Path.cwd().glob("lightning_logs/**/events*")), "no event file was written"
    # The command of the second line, by the script that was installed with the package.
    command = Path(sys.executable).with_name("lla-callbacks")
    subprocess.run([command, "report", "lightning_logs"], check=True)
    assert list(Path.cwd().glob("lightning_logs/**/report.html")), "no page was written"


if __name__ == "__main__":
    {"files": check_files, "snippet": run_snippet, "homepage": set_homepage}[sys.argv[1]]()
