"""The site builds without a warning, and looks in a browser as it should.

Needs the extra `site` and a Chromium; without them these tests are skipped.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')

pytest.importorskip('myst_nb')
sync_api = pytest.importorskip('playwright.sync_api')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason='there is no Chromium'),
]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built pages: an exit code of 0 says that there was no warning."
    folder = tmp_path_factory.mktemp('site')
    subprocess.run([sys.executable, ROOT / '.site' / 'build.py', folder], check=True)
    return folder


@pytest.fixture(scope='module')
def browser():
    "A Chromium that has nowhere to go but the disk."
    with sync_api.sync_playwright() as playwright:
        options = ['--no-sandbox', '--allow-file-access-from-files']
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(site, browser):
    "Open a page, `width` pixels wide; it must ask for nothing that it does not get."
    failed = []

    def visit(name, width=1200):
        "The page, when its formulas are typeset."
        page = browser.new_page(viewport=dict(width=width, height=900))
        page.on('requestfailed', lambda request: failed.append(request.url))
        page.on('pageerror', lambda error: failed.append(str(error)))
        page.goto((site / name).as_uri())
        page.wait_for_function('!window.MathJax || !!MathJax.startup?.promise')
        page.evaluate('window.MathJax ? MathJax.startup.promise : null')
        return page

    yield visit
    assert failed == []


PAGES = sorted(p.relative_to(ROOT).with_suffix('.html') for p in (ROOT / 'nbs').rglob('*.ipynb'))


@pytest.mark.parametrize('name', ['index.html', *map(str, PAGES)])
def test_page(visit, name):
    "No formula is left as text, no picture is broken, nothing is wider than a telephone."
    page = visit(name, width=390)
    assert page.locator('.math').count() == page.locator('.math:has(mjx-container)').count()
    assert page.locator('mjx-merror').count() == 0
    broken = '[...document.images].filter(i => i.complete && i.naturalWidth == 0).length'
    assert page.evaluate(broken) == 0
    room = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'
    assert page.evaluate(room) <= 0


def test_solutions_are_closed(visit):
    page = visit('nbs/02_sampling.html')
    assert page.locator('details').count() > 3
    assert page.locator('details[open]').count() == 0


def test_search_needs_no_server(visit):
    page = visit('search.html')
    page.goto(page.url + '?q=importance')
    page.wait_for_selector('#search-results li')
    assert '04_ppo' in page.inner_html('#search-results')


def test_next_leads_through_the_main_line(visit):
    page = visit('nbs/00_start.html')
    for number in range(1, 7):
        page.click('.related-pages .next-page')
        assert f'/nbs/0{number}_' in page.url
