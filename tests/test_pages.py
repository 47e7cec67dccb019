"""The pages of docs/: their links and anchors lead somewhere, their blocks run, the site is built offline."""

import functools
import importlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
TEXTS = PAGES | {name: ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
TRAINING = {name for name, path in PAGES.items() if "from small import" in path.read_text(encoding="utf-8")}
"""Pages whose blocks train: only the build runs them."""
FENCE = re.compile(r"^( *)(`{3,}).*?^\1\2`*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"\]\[(triglot[\w.]*)\]")
NAMED = re.compile(r"`((?:docs|tests|benchmarks|recipes|examples|src)/[\w./-]+)`")


def module(name: str) -> ModuleType:
    """A module that lies beside the pages."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@functools.cache
def printed(name: str) -> str:
    """What the blocks of a page print, all of it; a page that trains prints nothing here."""
    out = io.StringIO()
    if name not in TRAINING:
        with redirect_stdout(out), torch.random.fork_rng():
            module("run").run(PAGES[name])
    return out.getvalue()


def prose(name: str) -> str:
    """A text without its code blocks."""
    return FENCE.sub("", TEXTS[name].read_text(encoding="utf-8"))


@functools.cache
def anchors(name: str) -> set[str]:
    """The ids of a page's headings, those among what its blocks print included."""
    toc = pytest.importorskip("markdown.extensions.toc")
    text = prose(name) + (FENCE.sub("", printed(name)) if name in PAGES else "")
    found: list[str] = []
    for title, own in re.findall(r"^#+ (.+?)(?: \{#([\w-]+)\})?$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])|[`*]", r"\1", title)
        found.append(own or toc.unique(toc.slugify(plain, "-"), set(found)))
    return set(found)


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_anchor_resolves(name):
    for link in LINK.findall(prose(name)):
        where = urlsplit(link)
        if where.scheme in ("http", "https"):
            continue
        target = (TEXTS[name].parent / unquote(where.path)).resolve() if where.path else TEXTS[name]
        assert target.exists(), f"{link}: there is no such file"
        page = target.relative_to(ROOT).as_posix()
        if where.fragment and page not in TRAINING:
            assert where.fragment in anchors(page), f"{link}: there is no such heading"
    for path in NAMED.findall(prose(name)):
        assert (ROOT / path).exists() or name == "CHANGELOG.md", f"`{path}` is not there"


@pytest.mark.parametrize("name", PAGES)
def test_every_name_that_is_referred_to_exists(name):
    for path in REFERENCE.findall(prose(name)):
        found: Any = importlib.import_module("triglot")
        for number, part in enumerate(path.split(".")[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(path.split(".")[:number]))
            found = getattr(found, part)


@pytest.mark.parametrize("name", sorted(PAGES.keys() - TRAINING))
def test_the_blocks_of_a_page_run(name):
    has_blocks = 'exec="true"' in PAGES[name].read_text(encoding="utf-8")
    assert bool(printed(name).strip()) == has_blocks


def test_the_navigation_has_every_page_and_no_other():
    yaml = pytest.importorskip("yaml")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    found = pages(nav)
    assert len(found) == len(set(found))
    assert {f"docs/{page}" for page in found} == set(PAGES)


def test_every_module_is_in_the_reference():
    told = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r'"(triglot[\w.]*)"', told)
    for path in sorted((ROOT / "src" / "triglot").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        if name not in ("triglot", "triglot.__main__") and not name.startswith("triglot.cli"):
            assert any(f"{name}.".startswith(f"{one}.") for one in named), f"{name} is on no page"


def test_every_name_of_the_document_is_told(document):
    told = set(re.findall(r"^([\w.]+)\(", PAGES["docs/reference/names.md"].read_text(encoding="utf-8"), re.MULTILINE))
    defined = set()
    for program in document:
        for owner, name in re.findall(r"^(?:class (\w+)|def (\w+))", program, re.MULTILINE):
            defined.add(owner or name)
    assert defined <= told


# The whole site

OFFLINE = """
import sys

def refuse(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and not isinstance(arguments[1], (str, bytes))):
        raise OSError(f"the network is closed: {arguments}")

sys.addaudithook(refuse)
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(out)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "WARNING" not in done.stdout + done.stderr
    return out


class Loads(HTMLParser):
    """What a page loads when it is shown, where its links lead, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.ids |= {told[name] for name in ("id", "name") if name in told}
        if tag == "a":
            self.links += [told["href"]] if "href" in told else []
        elif tag != "meta":
            self.loads += [told[name] for name in ("src", "href", "data", "poster") if name in told]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_site_is_built_offline_and_without_warnings(site):
    assert {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")} >= {
        page.removeprefix("docs/") for page in PAGES
    }


@pytest.mark.slow
def test_no_page_of_the_site_loads_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert sum(len(Loads(page).loads) for page in pages) > len(pages)
    for page in pages:
        assert [load for load in Loads(page).loads if urlsplit(load).netloc] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(\s*['\"]?|@import\s+['\"]?)(https?:)?//", style.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site):
    pages = {page: Loads(page) for page in site.rglob("*.html") if page.name != "404.html"}
    for page, found in pages.items():
        for link in (*found.links, *found.loads):
            where = urlsplit(link)
            if where.scheme or where.netloc:
                continue
            target = (page.parent / unquote(where.path)).resolve() if where.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page.name}: {link}"
            if where.fragment and target in pages:
                assert unquote(where.fragment) in pages[target].ids | {"__skip", "__toc"}, f"{page.name}: {link}"


@pytest.fixture(scope="module")
def browser() -> Any:
    """Chromium, the system's or playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with playwright.sync_playwright() as found:
        try:
            started = found.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(site: Path) -> Any:
    """Where the site is served."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen_nor_complains_nor_asks_elsewhere(browser, address, site, width, scheme):
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    complaints, asked = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("request", lambda request: asked.append(request.url))
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        if name == "404.html":
            continue
        page.goto(address + name)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} wide"
        shown = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
        assert shown == {"light": "default", "dark": "slate"}[scheme]
    assert not complaints
    assert {url for url in asked if not url.startswith(address)} == set()


@pytest.mark.slow
def test_a_keyboard_reaches_colours_search_and_navigation(browser, address):
    page = browser.new_context(viewport={"width": 390, "height": 900}, color_scheme="light").new_page()
    page.goto(f"{address}guide/02-attention.html")
    page.wait_for_function("document.querySelector('.md-skip') !== null")
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert "md-skip" in page.evaluate(f"{focused}.className")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.body.getAttribute('data-md-color-scheme')") == "slate"
    for _ in range(30):
        page.keyboard.press("Tab")
        if "md-nav__link" in page.evaluate(f"{focused}.className"):
            break
    page.wait_for_function(f"{focused}.getBoundingClientRect().left >= 0")  # the navigation slides in
    with page.expect_navigation():  # or keys are pressed on the page that is left
        page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.md-skip') !== null")
    page.keyboard.press("/")
    page.keyboard.type("rotary")
    page.wait_for_selector(".md-search-result__item")
