"""What a browser makes of the report and of the dashboard: every figure drawn, nothing in the console."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import FOUR, grown_storage, planted_spec

from optuna_ohgw.beside import Side
from optuna_ohgw.evidence import gather
from optuna_ohgw.opening import open_storage
from optuna_ohgw.report import Page, write_report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ETAS = ("asha-baseline", *(f"asha-ohgw-1step@{eta}" for eta in ("1e-4", "3e-4", "1e-3", "3e-3")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium is not None, "install Debian's chromium"
    assert driver is not None, "install Debian's chromium-driver"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def titles(browser: Any, expected: int) -> list[str]:
    """Return the titles of the figures that are drawn, once there are as many as expected."""
    script = """return [...document.querySelectorAll('.js-plotly-plot')]
        .filter(plot => plot.querySelector('.main-svg') && plot.getBoundingClientRect().height > 100)
        .map(plot => plot.querySelector('.gtitle')?.textContent ?? '')"""
    deadline, found = time.monotonic() + 60, []
    while time.monotonic() < deadline:
        found = browser.execute_script(script)
        if len(found) >= expected and all(found):
            break
        time.sleep(0.5)
    return list(found)


def plain(figure: Any) -> str:
    """Return the first line of a figure's title, as the browser shows it."""
    return str(figure.layout.title.text).partition("<br>")[0].replace("<b>", "").replace("</b>", "")


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def page() -> Page:
    spec = planted_spec(FOUR, range(8), pilot_seeds=(100, 101), beside=["sweep.yaml"])
    sweep = planted_spec(ETAS, range(4), target=0.7, name="sweep")
    side = Side("sweep.yaml", "eta", gather(grown_storage(sweep), sweep, "sweep.yaml"))
    return Page(gather(grown_storage(spec, workers=2), spec, "planted.yaml"), (side,))


def test_the_report_opens_from_disk_and_draws_every_figure(browser: Any, page: Page, tmp_path: Path) -> None:
    write_report(page, tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    found = titles(browser, len(page.figures))
    assert len(found) == len(page.figures)
    for figure in page.figures.values():
        assert any(plain(figure) in title for title in found), (plain(figure), found)
    assert complaints(browser) == []
    width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0


def test_the_dashboard_shows_every_figure_of_a_study_and_of_a_cell(browser: Any, tmp_path: Path) -> None:
    study = Path(__file__).parents[1] / "studies/digits.yaml"
    from optuna_ohgw.spec import load_spec

    settings = (f"output={tmp_path / 'out'}", "seeds=3", "pilot_seeds=[1000]")
    spec = load_spec(study, settings)
    (tmp_path / "out").mkdir()
    storage = open_storage(spec.storage_url, create=True)
    grown_storage(spec, storage, trials=6, epochs=9)
    own = Page(gather(storage, spec, study))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [part for pair in settings for part in ("--set", pair)]
    command = [
        sys.executable,
        "-c",
        "from optuna_ohgw.cli import main; main()",
        "dashboard",
        str(study),
        *flags,
    ]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, text=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/studies", server)
        ids = {s.study_name: s._study_id for s in storage.get_all_studies()}
        cell = f"{spec.name}/asha-ohgw-1step/seed-0001"
        shown = {f"{spec.name}/summary": own.figures, cell: own.cell_figures()[cell]}
        for name, figures in shown.items():
            browser.get(f"http://127.0.0.1:{port}/dashboard/studies/{ids[name]}")
            wanted = {plain(figure) for figure in figures.values()}
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                found = titles(browser, len(wanted))
                if all(any(w in title for title in found) for w in wanted):
                    break
            assert all(any(w in title for title in found) for w in wanted), (wanted, found)
            assert complaints(browser) == []
    finally:
        server.terminate()
        server.wait(20)


def wait_for(url: str, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the dashboard ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the dashboard did not start")
