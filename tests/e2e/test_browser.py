"""The page in a real browser, Debian's Chromium, with a real server process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from serving.images.decoding import read_image
from serving.images.limits import ImageLimits
from tests.serving.conftest import Server, encode, picture
from tests.serving.saved_models import save_colour_classifier, write_warmup_records

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
    "--force-prefers-reduced-motion",  # so that bars are not animated
)
HOSTILE_NAME = "<img src=x onerror=document.title=1>.png"
WAIT_S = 60

pytestmark = pytest.mark.skipif(
    not (CHROMIUM.exists() and CHROMEDRIVER.exists()),
    reason=f"needs {CHROMIUM} and {CHROMEDRIVER} (Debian: apt install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the warm-up of the model `colours` waits for."""
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, gate: Path) -> Path:
    """`colours` (32 x 32, with heat maps, blocked in its warm-up by the gate) and `wide` (48 x 20, with a guard)."""
    folder = tmp_path_factory.mktemp("models")
    colours = save_colour_classifier(folder / "colours" / "4", gate=gate, explain=True)
    write_warmup_records(colours, [np.zeros((1, 32, 32, 3), np.uint8)])
    save_colour_classifier(folder / "wide" / "1", size=(20, 48), guarded=True)
    return folder


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Callable[[], Server]]:
    """Starts servers, all on the port of the first."""
    logs = tmp_path_factory.mktemp("logs")
    servers: list[Server] = []

    def start() -> Server:
        options = ["--max-request-bytes", "3000000"]
        if servers:
            options += ["--rest-port", str(servers[0].port)]
        server = Server(models_dir, logs / f"server{len(servers)}.log", *options)
        if servers:
            server.port, server.url = servers[0].port, servers[0].url
        servers.append(server)
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def server(start_server: Callable[[], Server]) -> Server:
    return start_server()


class Page:
    """The page, used like by a visitor."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        self.url = url
        browser.get(url)
        self.wait(lambda: self.element("#status").text)  # `get` may return before the script has run

    def element(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def send(self, *files: Path) -> list[WebElement]:
        """Choose files, and return their cards."""
        self.element("#file-choice").send_keys("\n".join(map(str, files)))
        return self.browser.find_elements(By.CSS_SELECTOR, ".card")[: len(files)]

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.browser, WAIT_S, poll_frequency=0.05).until(lambda _: condition())

    def wait_for_state(self, state: str, cards: list[WebElement]) -> None:
        self.wait(lambda: all(card.get_attribute("data-state") == state for card in cards))

    def wait_for_status(self, text: str) -> None:
        self.wait(lambda: text in self.element("#status").text)

    def stroke(self, bar: WebElement) -> float:
        """Return the length of a bar, in percent."""
        size = self.browser.execute_script("return getComputedStyle(arguments[0], '::before').backgroundSize", bar)
        return float(size.split("%")[0])

    def canvas(self, card: WebElement, selector: str = "canvas") -> np.ndarray:
        """Return the pixels of a card's canvas, uint8 (height, width, 4)."""
        self.wait(lambda: card.find_element(By.CSS_SELECTOR, selector).is_displayed())
        width, height, data = self.browser.execute_script(
            "const {width, height} = arguments[0];"
            "return [width, height, [...arguments[0].getContext('2d').getImageData(0, 0, width, height).data]];",
            card.find_element(By.CSS_SELECTOR, selector),
        )
        return np.array(data, np.uint8).reshape(height, width, 4)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Chrome, server: Server, gate: Path) -> Iterator[Page]:
    """The page of a ready service; afterwards checks for script errors and requests to other hosts."""
    gate.touch()
    server.wait_for("/readyz")
    page = Page(browser, server.url + "/")
    yield page
    assert script_errors(browser) == []
    assert foreign_requests(browser, server.url) == []


def script_errors(browser: Chrome) -> list[str]:
    """Return the console's messages, except those for refused requests."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["source"] != "network"]


def foreign_requests(browser: Chrome, url: str) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # Chromium's initial tab also sends requests.
    addresses = [params["request"]["url"] for params in requests if params["documentURL"].startswith(url)]
    assert url + "/" in addresses
    return [address for address in addresses if not address.startswith((url + "/", f"blob:{url}/"))]


def text(card: WebElement, selector: str) -> str:
    return card.find_element(By.CSS_SELECTOR, selector).text


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_images_are_queued_while_the_service_is_unavailable_or_loading(
    browser: Chrome,
    start_server: Callable[[], Server],
    gate: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    earlier = start_server()
    earlier.wait_for("/readyz", 503)
    page = Page(browser, earlier.url + "/")
    page.wait_for_status("Loading colours")
    earlier.stop()
    cards = page.send(write(tmp_path / "a.png", picture("red")), write(tmp_path / "b.png", picture("blue")))
    page.wait_for_status("No connection")
    request.getfixturevalue("server")  # starts the server
    page.wait_for_status("Not ready: loading")
    assert [text(card, ".headline") for card in cards] == ["Waiting", "Waiting"]
    gate.touch()
    page.wait_for_state("classified", cards)
    assert [text(card, ".label") for card in cards] == ["red", "blue"]
    assert page.element("#status").text == "Ready"
    assert page.element("h1").text == "colours version 4"
    assert script_errors(browser) == []


def test_each_image_gets_a_card_with_its_label_and_bars(page: Page, tmp_path: Path) -> None:
    assert page.browser.title == "colours, version 4"
    assert page.element("#status").text == "Ready"
    assert [item.text for item in page.browser.find_elements(By.CSS_SELECTOR, "#class-names li")] == [
        "red",
        "green",
        "blue",
    ]
    colours = ("red", "lime", "blue")
    cards = page.send(*(write(tmp_path / f"{colour}.png", picture(colour)) for colour in colours))
    page.wait_for_state("classified", cards)
    assert page.element("#results-title").text == "3 pictures"
    for card, colour, label in zip(cards, colours, ("red", "green", "blue"), strict=True):
        assert text(card, ".file") == f"{colour}.png"
        assert text(card, ".headline").split() == [label, ">99.9%"]
        bars = card.find_elements(By.CSS_SELECTOR, ".bars li")
        assert len(bars) == 3
        assert bars[0].text.split() == [label, ">99.9%"]
        assert [round(page.stroke(bar)) for bar in bars] == [100, 0, 0]
        assert "colours, version 4" in text(card, ".timing")
        assert "32 \N{MULTIPLICATION SIGN} 32" in text(card, ".sent figcaption")
    assert "3 pictures classified" in str(page.element("#announcement").get_attribute("textContent"))


def test_the_resized_image_equals_pillows(page: Page, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (333, 500, 3), dtype=np.uint8)
    cases = {
        "photo.png": Image.fromarray(pixels),
        "exact.png": Image.fromarray(pixels[:32, :32]),
        "tiny.png": Image.fromarray(pixels[:7, :40]),
        "tall.png": Image.fromarray(np.concatenate([pixels[:, :50].repeat(10, axis=1)] * 9)),  # read in strips
    }
    cases["transparent.png"] = Image.fromarray(np.concatenate([pixels, pixels[..., :1] // 128 * 255], axis=2))
    cards = page.send(*(write(tmp_path / name, encode(image)) for name, image in cases.items()))
    page.wait_for_state("classified", cards)
    for card, image in zip(cards, cases.values(), strict=True):
        seen = page.canvas(card)
        white = Image.new("RGBA", image.size, "white")
        shown = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        expected = np.asarray(shown.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(seen[..., :3] - expected).max() <= 1
        assert np.all(seen[..., 3] == 255)
        assert text(card, ".seen figcaption").endswith("32 \N{MULTIPLICATION SIGN} 32")


def test_the_resized_image_has_its_exif_orientation_applied(page: Page, tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: the dark side is at the right
    image = Image.fromarray(np.ascontiguousarray(ramp))
    kinds = ("JPEG", "PNG", "WEBP")
    cards = page.send(*(write(tmp_path / kind, encode(image, kind, exif=exif, quality=95)) for kind in kinds))
    page.wait_for_state("classified", cards)
    for card, file in zip(cards[:2], kinds[:2], strict=True):
        seen = page.canvas(card)[..., :3].astype(int)
        read = read_image((tmp_path / file).read_bytes(), size=(32, 32), limits=ImageLimits(64 * 64, 64)).astype(int)
        assert np.abs(seen - read).max() <= 2, file  # JPEG decoders may also differ by a level
    # Chromium does not apply a WebP's orientation, so the page shows no resized image.
    page.wait(lambda: "cannot be shown" in text(cards[2], ".seen figcaption"))
    assert not cards[2].find_element(By.CSS_SELECTOR, "canvas").is_displayed()


def test_a_refused_image_has_the_services_reason(page: Page, tmp_path: Path) -> None:
    cards = page.send(
        write(tmp_path / "notes.png", b"Remember the milk"),
        write(tmp_path / "good.png", picture("red")),
        write(tmp_path / "huge.bmp", picture("red", (1200, 1200), "BMP")),
    )
    page.wait_for_state("classified", cards[1:2])
    page.wait_for_state("refused", [cards[0], cards[2]])
    assert text(cards[0], ".headline") == "Could not be read"
    assert "expected JPEG, PNG, WebP, AVIF, BMP or GIF" in text(cards[0], ".details")
    assert not cards[0].find_element(By.CSS_SELECTOR, ".seen").is_displayed()
    assert text(cards[2], ".headline") == "Too large"
    assert "at most 3,000,000 bytes" in text(cards[2], ".details")
    announced = page.element("#announcement").get_attribute("textContent")
    assert announced == "1 picture classified, 2 refused"


def test_a_file_name_with_markup_is_escaped(page: Page, tmp_path: Path) -> None:
    (card,) = page.send(write(tmp_path / HOSTILE_NAME, picture("lime")))
    page.wait_for_state("classified", [card])
    assert text(card, ".file") == HOSTILE_NAME
    assert len(card.find_elements(By.TAG_NAME, "img")) == 1
    assert page.browser.title == "colours, version 4"


def test_another_model_can_be_chosen(page: Page, tmp_path: Path) -> None:
    Select(page.element("#model-choice")).select_by_visible_text("wide")
    assert page.element("h1").text == "wide version 1"
    assert page.element("#curl").text == f'curl -F image=@picture.jpg "{page.url}predict?model=wide"'
    (card,) = page.send(write(tmp_path / "red.png", picture("red", (100, 100))))
    page.wait_for_state("classified", [card])
    assert "wide, version 1" in text(card, ".timing")
    assert page.canvas(card).shape == (20, 48, 4)


def half_red(path: Path) -> Path:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:, 0] = 255
    return write(path, encode(Image.fromarray(pixels)))


def test_a_heat_map_is_shown_on_request(page: Page, tmp_path: Path) -> None:
    (card,) = page.send(half_red(tmp_path / "half.png"))
    page.wait_for_state("classified", [card])
    page.wait(lambda: card.find_element(By.CSS_SELECTOR, ".explain").is_displayed())
    button = card.find_element(By.CSS_SELECTOR, ".explain")
    heat = card.find_element(By.CSS_SELECTOR, ".heat")
    assert not heat.is_displayed()
    button.click()
    alpha = page.canvas(card, ".heat")[..., 3]
    assert np.all(alpha[:, :16] == 0)
    assert np.all(alpha[:, 16:] == 200)
    top = "const box = arguments[0].getBoundingClientRect(); return document.elementFromPoint(box.x + 9, box.y + 9)"
    page.browser.execute_script("arguments[0].scrollIntoView()", heat)
    assert page.browser.execute_script(top, heat) == heat
    assert text(card, ".statement") == "yellow speaks for red"
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    page.wait(lambda: not heat.is_displayed())
    assert (text(card, ".statement"), button.get_attribute("aria-pressed")) == ("", "false")
    page.browser.execute_script("window.fetch = () => Promise.reject(new Error('requested again'))")
    button.click()
    page.wait(heat.is_displayed)
    assert text(card, ".statement") == "yellow speaks for red"


def test_a_heat_map_that_cannot_be_computed_has_the_services_reason(page: Page, tmp_path: Path) -> None:
    (card,) = page.send(half_red(tmp_path / "half.png"))
    page.wait_for_state("classified", [card])
    page.wait(lambda: card.find_element(By.CSS_SELECTOR, ".explain").is_displayed())
    page.browser.execute_script(
        'window.fetch = async () => new Response(\'{"error": "version 4 is gone"}\', {status: 404})'
    )
    card.find_element(By.CSS_SELECTOR, ".explain").click()
    page.wait(lambda: text(card, ".statement") == "no explanation: version 4 is gone")
    assert not card.find_element(By.CSS_SELECTOR, ".heat").is_displayed()
    assert card.find_element(By.CSS_SELECTOR, ".explain").is_enabled()


def test_the_limits_of_a_prediction_are_below_it(page: Page, tmp_path: Path) -> None:
    Select(page.element("#model-choice")).select_by_visible_text("wide")
    grey, red = page.send(write(tmp_path / "grey.png", picture("grey")), write(tmp_path / "red.png", picture("red")))
    page.wait_for_state("classified", [grey, red])
    unlike, plausible = grey.find_elements(By.CSS_SELECTOR, ".limits li")
    assert unlike.text == "Unlike the training images typicality 33.3%"
    assert plausible.text == "red, green or blue at the 90% level"
    above, below = (grey.find_element(By.CSS_SELECTOR, selector) for selector in (".headline", ".bars"))
    assert above.rect["y"] < unlike.rect["y"] < plausible.rect["y"] < below.rect["y"]
    level = plausible.find_element(By.CSS_SELECTOR, "span")
    assert plausible.rect["y"] <= level.rect["y"] <= plausible.rect["y"] + plausible.rect["height"]
    assert not red.find_element(By.CSS_SELECTOR, ".limits").is_displayed()


def test_a_model_without_heat_maps_has_no_button_for_them(page: Page, tmp_path: Path) -> None:
    Select(page.element("#model-choice")).select_by_visible_text("wide")
    (card,) = page.send(half_red(tmp_path / "half.png"))
    page.wait_for_state("classified", [card])
    page.canvas(card)
    assert not card.find_element(By.CSS_SELECTOR, ".explain").is_displayed()


def test_images_can_be_pasted_and_dropped(page: Page) -> None:
    for kind, carrier in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.browser.execute_script(
            """
            const [bytes, type, carrier] = arguments;
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], `${type}.png`, {type: "image/png"}));
            const event = type === "paste" ? ClipboardEvent : DragEvent;
            document.body.dispatchEvent(new event(type, {[carrier]: data, bubbles: true, cancelable: true}));
            """,
            list(picture("lime")),
            kind,
            carrier,
        )
        card = page.element(".card")
        page.wait_for_state("classified", [card])
        assert (text(card, ".file"), text(card, ".label")) == (f"{kind}.png", "green")
    page.element("#clear").click()
    assert page.browser.find_elements(By.CSS_SELECTOR, ".card") == []
    assert page.browser.switch_to.active_element == page.element("#file-choice")


def test_a_service_without_models(browser: Chrome, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    server = Server(tmp_path / "models", tmp_path / "log")
    try:
        server.wait_for("/readyz", 503)
        page = Page(browser, server.url + "/")
        assert page.element("h1").text == "No model yet"
        assert "The service has no model yet" in page.element("#model-problem").text
        # Of a model that cannot be loaded it says so, not that it takes no pictures.
        (tmp_path / "models" / "broken" / "1").mkdir(parents=True)
        (tmp_path / "models" / "broken" / "1" / "saved_model.pb").write_bytes(b"no model")
        server.wait_until(lambda: "saved_model.pb" in httpx.get(server.url + "/readyz").text)
        page = Page(browser, server.url + "/")
        assert page.element("#status").text == "Not available"
        assert page.element("h1").text == "broken"
        problem = page.element("#model-problem").text
        assert "saved_model.pb" in problem
        assert str(tmp_path) not in problem
        assert script_errors(browser) == []
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()
