"""The page in a real browser, and what programs and attackers get from it. The server runs in a process of its own."""

import base64
import csv
import gc
import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from calls import call
from server import page

import seguncert
from seguncert.render import overlay_doubt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser_only = pytest.mark.skipif(
    CHROMIUM is None and "SEGUNCERT_BROWSER" not in os.environ,
    reason="Chromium is not installed: apt-get install chromium",
)
READY = ".sg[data-state=ready]"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address and log of outside requests of a page with the street model."""
    log = tmp_path_factory.mktemp("page") / "outside.log"
    with page(log) as (address, _):
        yield address, log


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of streets' colours, with a non-ASCII name."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("photos") / "Straße & <i>x.png"
    cv2.imwrite(str(file), cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC))
    return file


@pytest.fixture(scope="module")
def chromium():
    """One for all tests; what it asks of other hosts fails them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, served):
    """A tab of a session of its own, with what it asked for since it was opened."""
    address, _ = served
    context = chromium.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    context.set_default_timeout(90_000)  # a machine that does other things too
    tab = context.new_page()
    tab.asked, tab.wrong = [], []
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("#photo input[type=file]", state="attached")
    yield tab
    outside = [url for url in tab.asked if not url.startswith((address, "data:", "blob:"))]
    context.close()
    assert not outside and not tab.wrong


def upload(tab, file):
    before = tab.get_attribute(".sg", "data-token")
    tab.set_input_files("#photo input[type=file]", str(file))
    new_photo(tab, before)


def put(tab, place, files):
    """Upload files to a list of them, until it shows them all."""
    tab.set_input_files(f"{place} input[type=file]", [str(file) for file in files])
    tab.locator(f"{place} td.filename").nth(len(files) - 1).wait_for()  # while they come in, other words name them


def new_photo(tab, before):
    tab.wait_for_function(
        "before => { const page = document.querySelector('.sg'); return page.dataset.state === 'ready' && page.dataset.token !== before && page.dataset.drawn }",
        arg=before,
    )  # fmt: skip


def drawn(tab, which="first"):
    url = tab.evaluate(f"document.querySelector('.sg-{which}').toDataURL('image/png')")
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR_RGB)
    return picture.astype(float)


def click(tab, x, y):
    """A pixel of the photo of 160 x 120."""
    stage = tab.locator(".sg-stage").first
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    tab.mouse.click(box["x"] + box["width"] * (x + 0.5) / 160, box["y"] + box["height"] * (y + 0.5) / 120)


def after(tab, act):
    """What is drawn after an act that changes it; no request may be made."""
    before, asked = tab.get_attribute(".sg", "data-drawn"), len(tab.asked)
    act()
    tab.wait_for_function("before => document.querySelector('.sg').dataset.drawn !== before", arg=before)
    assert not [url for url in tab.asked[asked:] if not url.startswith(("data:", "blob:"))]
    return drawn(tab)


def slide(tab, name, value):
    tab.eval_on_selector(
        f".sg-{name}", "(it, value) => { it.value = value; it.dispatchEvent(new Event('input')) }", value
    )


@browser_only
def test_upload_draws_the_overlay_and_the_knobs_ask_nobody(tab, photo):
    upload(tab, photo)
    result = seguncert.analyse(seguncert.load_model("street"), photo)
    rgb = result.rgb.astype(float)
    for name in ("confidence", "entropy", "margin"):
        if name != "confidence":
            picture = after(tab, lambda name=name: tab.select_option(".sg-map", name))
        else:
            picture = drawn(tab)
        wanted = overlay_doubt(result.rgb, result.maps[name], "low" if name == "entropy" else "high").astype(float)
        assert np.abs(picture - wanted).mean() < 3  # the photo came as JPEG, the map in 256 steps
        assert np.abs(picture - rgb).mean() > 20
    half = after(tab, lambda: slide(tab, "opacity", 50))
    assert np.abs(half - (wanted + rgb) / 2).mean() < 3
    bare = after(tab, lambda: slide(tab, "opacity", 0))
    assert np.abs(bare - rgb).mean() < 3
    after(tab, lambda: slide(tab, "opacity", 100))
    some = after(tab, lambda: slide(tab, "below", 60))
    doubted = result.maps["confidence"] < 0.6
    assert 0.05 < doubted.mean() < 0.95
    assert np.abs(some - np.where(doubted[..., None], wanted, rgb)).mean() < 3
    assert f"{100 * doubted.mean():.0f} %" in tab.inner_text(".sg-told") and "60 %" in tab.inner_text(".sg-below-told")
    after(tab, lambda: slide(tab, "below", 100))
    chip = tab.locator(".sg-classes button").first
    only = after(tab, chip.click)
    shown = (result.labels == int(chip.get_attribute("data-index")))[..., None]
    assert chip.get_attribute("aria-pressed") == "true"
    assert np.abs(only - np.where(shown, wanted, rgb)).mean() < 3
    after(tab, chip.click)
    split = after(tab, lambda: tab.select_option(".sg-other", "photo"))
    assert np.abs(split[:, :78] - wanted[:, :78]).mean() < 3 and np.abs(split[:, 82:] - rgb[:, 82:]).mean() < 3
    tab.focus(".sg-divide")
    moved = after(tab, lambda: tab.keyboard.press("End"))
    assert np.abs(moved - wanted).mean() < 3
    sides = after(tab, lambda: (tab.select_option(".sg-how", "sides"), tab.select_option(".sg-other", "entropy")))
    assert np.abs(sides - wanted).mean() < 3 and np.abs(drawn(tab, "second") - wanted).mean() > 1


@browser_only
def test_hiding_by_key_shows_the_photo(tab, photo):
    upload(tab, photo)
    covered, url = drawn(tab), "document.querySelector('.sg-first').toDataURL()"
    before = tab.evaluate(url)
    tab.focus(".sg-stage")
    tab.keyboard.down("h")
    tab.wait_for_function(f"before => {url} !== before", arg=before)
    assert np.abs(drawn(tab) - seguncert.read_image(photo).rgb).mean() < 3
    tab.keyboard.up("h")
    tab.wait_for_function(f"before => {url} === before", arg=before)
    assert (drawn(tab) == covered).all()


@browser_only
@pytest.mark.parametrize("method", ["One pass", "MC dropout"])
def test_a_click_reads_the_pixel_of_the_arrays(tab, photo, method):
    upload(tab, photo)
    sampled = method != "One pass"
    if sampled:
        before = tab.get_attribute(".sg", "data-token")
        tab.get_by_label(method, exact=True).first.check()
        new_photo(tab, before)
    result = seguncert.analyse(seguncert.load_model("street"), photo, method="mc-dropout" if sampled else "none")
    for x, y in [(40, 30), (151, 113)]:
        click(tab, x, y)
        tab.wait_for_function(f"document.querySelector('.sg').dataset.read === '{x},{y}'")
        bars = tab.eval_on_selector_all(
            ".sg-number", "all => all.map(it => [it.dataset.name, Number(it.dataset.probability)])"
        )
        wanted = dict(zip(result.classes, result.probabilities[:, y, x].tolist(), strict=True))
        assert len(bars) >= 2 and all(abs(p - wanted[name]) < 1e-5 for name, p in bars)
        assert bars[0][0] == result.classes[result.labels[y, x]]
        assert (
            "Calibrated: " in tab.inner_text(".sg-reading") and ("samples" in tab.inner_text(".sg-reading")) == sampled
        )


@browser_only
def test_keys_read_a_pixel_and_zoom(tab, photo):
    upload(tab, photo)
    tab.focus(".sg-stage")
    for key in ("ArrowRight", "Shift+ArrowDown", "Enter"):
        tab.keyboard.press(key)
    tab.wait_for_function("document.querySelector('.sg').dataset.read === '81,70'")
    tab.keyboard.press("+")
    tab.wait_for_function("document.querySelector('.sg-first').style.transform.includes('scale(1.6)')")
    box = tab.locator(".sg-stage").first.bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2 + 1)  # the middle stays
    tab.wait_for_function("document.querySelector('.sg').dataset.read === '80,60'")


@browser_only
def test_a_region_is_told_of_and_outlined(tab, photo):
    upload(tab, photo)
    plain = drawn(tab)
    row = tab.locator(".sg-regions tbody tr").nth(1)
    row.click()
    tab.wait_for_function("document.querySelector('.sg').dataset.region === '2'")
    tab.wait_for_timeout(200)
    result = seguncert.analyse(seguncert.load_model("street"), photo)
    told = tab.inner_text(".sg-region")
    found = re.fullmatch(
        r"(\w+): ([\d,]+) pixels, .* of the photo, .* sure on average; number 2 of the (\d+) listed, counted from the least trusted\.",
        told,
    )
    assert found and int(found[3]) == tab.locator(".sg-regions tbody tr").count()
    ring = np.abs(drawn(tab) - plain).max(2) > 30
    c = result.classes.index(found[1])
    assert 0 < ring.sum() <= int(found[2].replace(",", "")) and (result.labels[ring] == c).all()
    y, x = np.argwhere(ring)[0]
    tab.evaluate("document.querySelector('.sg').dataset.region = ''")
    click(tab, x, y)
    tab.wait_for_function("document.querySelector('.sg').dataset.region === '2'")


@browser_only
def test_stopping_keeps_the_samples_there_are(tab, tmp_path):
    large = tmp_path / "large.jpg"
    rng = np.random.default_rng(0)
    cv2.imwrite(str(large), cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (2400, 1800)))
    upload(tab, large)
    before = tab.get_attribute(".sg", "data-token")
    tab.get_by_label("MC dropout", exact=True).first.check()
    new_photo(tab, before)
    before = tab.get_attribute(".sg", "data-token")
    tab.fill("#samples input[type=number]", "100")
    tab.get_by_text(re.compile(r"\d+/100")).first.wait_for()  # the progress of the samples
    tab.click("#stop")
    new_photo(tab, before)
    told = tab.inner_text(".sg-told")
    found = re.search(r"(\d+) samples.*stopped after (\d+) of 100", told, re.DOTALL)
    assert found and found[1] == found[2] and 2 <= int(found[1]) < 100
    assert tab.evaluate("document.querySelector('.sg-first').width") == 1600


@browser_only
def test_a_folder_gives_what_export_writes(tab, pictures, tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    files = sorted(pictures.rglob("*.*"))[:4]
    for file in files:
        shutil.copy(file, source)
    (source / "broken <b>.png").write_bytes(b"no picture")
    tab.get_by_role("tab", name="Folder").click()
    put(tab, "#files", list(source.iterdir()))
    tab.click("#folder-run")
    tab.wait_for_selector(".gal[data-state=ready]")
    assert tab.locator(".gal-cards li").count() == 4
    failed = tab.inner_text(".gal-failed")
    assert failed.startswith("broken <b>.png: cannot decode") and tab.locator(".gal b b").count() == 0
    with tab.expect_download() as download:
        tab.click("#folder-zip")
    seguncert.export(source, tmp_path / "out", "street", embeddings=True)
    archive = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    ours = {
        file.relative_to(tmp_path / "out").as_posix(): file.read_bytes()
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    assert set(archive.namelist()) == set(ours)
    for name, content in ours.items():
        if name.endswith((".png", ".jpg")):
            assert archive.read(name) == content, name
    run = json.loads(archive.read("run.json"))
    assert {key: value for key, value in run.items() if key != "input"} == {
        key: value for key, value in json.loads(ours["run.json"]).items() if key != "input"
    }
    scores = [float(re.search(r"entropy ([\d.]+)", card)[1]) for card in tab.locator(".gal-cards li").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)


@browser_only
def test_what_to_label_next_is_chosen_among_the_folder(tab, pictures, tmp_path):
    tab.get_by_role("tab", name="Select").click()
    tab.click("#select-run")
    tab.get_by_text("Run photos in the Folder tab first").first.wait_for()
    tab.get_by_role("tab", name="Folder").click()
    put(tab, "#files", sorted(pictures.rglob("*.*"))[:5])
    tab.click("#folder-run")
    tab.wait_for_selector(".gal[data-state=ready]")
    tab.get_by_role("tab", name="Select").click()
    tab.fill("#select-budget input", "2")
    tab.click("#select-run")
    sheet = tab.frame_locator("#select-shown iframe")
    sheet.get_by_role("heading", name="2 images to label next, of 5").wait_for()
    with tab.expect_download() as download:
        tab.click("#select-zip")
    archive = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    picked = list(csv.DictReader(io.StringIO(archive.read("selection.csv").decode())))
    assert [row["rank"] for row in picked] == ["1", "2"]
    assert {"selection.html", "coco.json", "cvat.xml", "label-studio.json", "random.csv"} <= set(archive.namelist())
    for row in picked:
        assert sheet.get_by_text(Path(row["path"]).name).count() >= 1


@browser_only
def test_another_session_sees_nothing(tab, chromium, served, photo):
    upload(tab, photo)
    other = chromium.new_context().new_page()
    other.goto(served[0])
    other.wait_for_selector(".sg", state="attached")
    other.wait_for_timeout(500)
    assert other.get_attribute(".sg", "data-state") == "empty" and other.get_attribute(".sg", "data-token") is None
    assert photo.name not in other.content()
    other.context.close()


@browser_only
def test_a_change_during_a_run_is_run_after_it(tab, tmp_path):
    large = tmp_path / "large.png"
    cv2.imwrite(str(large), np.random.default_rng(0).integers(0, 256, (1800, 2400, 3), dtype=np.uint8))
    upload(tab, large)
    tab.get_by_label("MC dropout", exact=True).first.check()
    tab.get_by_text(re.compile(r"\d+/20")).first.wait_for()
    tab.locator("#calibrated input").uncheck()
    tab.wait_for_function("document.querySelector('.sg-legend').textContent.includes('not calibrated')")
    assert "20 samples" in tab.inner_text(".sg-told") and "large.png" in tab.inner_text(".sg-told")


@browser_only
def test_a_photo_that_fails_takes_the_one_before_away(tab, photo, tmp_path):
    upload(tab, photo)
    (tmp_path / "bad.png").write_text("no picture")
    tab.click("#photo button[aria-label='Remove Image'], #photo button[aria-label='Clear']")
    tab.wait_for_selector(".sg[data-state=empty]")
    upload(tab, photo)
    tab.click("#photo button[aria-label='Remove Image'], #photo button[aria-label='Clear']")
    tab.set_input_files("#photo input[type=file]", str(tmp_path / "bad.png"))
    tab.get_by_text("cannot decode: expected a complete JPEG").first.wait_for()
    tab.wait_for_selector(".sg[data-state=empty]")
    assert not tab.locator(".sg-body").is_visible()


@browser_only
def test_what_is_no_picture_is_one_line(tab, tmp_path):
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_text("no picture")
    tab.set_input_files("#photo input[type=file]", str(tmp_path / "<img src=x onerror=alert(1)>.png"))
    tab.get_by_text("cannot decode: expected a complete JPEG").first.wait_for()
    assert tab.locator("img[src=x]").count() == 0


@browser_only
def test_errors_are_text_and_not_html(tab, tmp_path):
    """The tab's fixture fails if the browser asks another host for anything."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr('../<img src="http://203.0.113.9/x.png">', b"x")
    tab.get_by_role("tab", name="Folder").click()
    put(tab, "#files", [tmp_path / "photos.zip"])
    tab.click("#folder-run")
    tab.get_by_text("expected files that stay in their folder").first.wait_for()
    assert tab.locator("img[src^='http://203']").count() == 0


@browser_only
def test_the_drawer_shows_a_picture_whose_truth_is_known(tab):
    tab.get_by_text("What do these maps mean").click()
    picture = tab.locator("#truth img")
    picture.scroll_into_view_if_needed()
    assert picture.is_visible() and picture.evaluate("each => each.naturalWidth") > 600
    assert "exact" in picture.get_attribute("alt") and picture.get_attribute("src").startswith("data:image/png")
    assert "a 6 or an 8 behind a bar" in tab.inner_text("#truth figcaption")


@browser_only
def test_labels_of_ones_own_are_judged_and_fitted(tab, tmp_path):
    rng = np.random.default_rng(0)
    model = seguncert.load_model("street")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for k in range(3):
        picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / "images" / f"{k}.png"), picture[..., ::-1])
        labels = np.where(rng.random((120, 160)) < 0.6, seguncert.analyse(model, picture).labels, 3)
        cv2.imwrite(str(tmp_path / "labels" / f"{k}.png"), labels.astype(np.uint8))
    tab.get_by_role("tab", name="Calibration").click()
    held_out = seguncert.load_calibration(model.folder / "calibration-none.json").measured["scenes_held_out"]
    assert f"{held_out['none']['nll']:.4f}" in tab.inner_text("#card") and "fitted on 406" in tab.inner_text("#card")
    tab.click("#labels-judge")
    tab.get_by_text("Choose photos and their label PNGs").first.wait_for()
    for which in ("images", "labels"):
        put(tab, f"#labels-{which}", sorted((tmp_path / which).iterdir()))
    tab.click("#labels-judge")
    tab.wait_for_selector("#labels-shown iframe")
    frame = tab.frame_locator("#labels-shown iframe")
    assert "3 images judged" in frame.locator("body").inner_text() and frame.locator("svg").count() > 2
    tab.click("#labels-fit")
    tab.wait_for_selector("#labels-shown h3")
    with tab.expect_download() as download:
        tab.click("#labels-download")
    found = seguncert.load_calibration(download.value.path())
    assert found.model["name"] == "street" and found.protocol["pictures"] == 3


# --- programs


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client

    yield Client(served[0], verbose=False)
    gc.collect()  # here its open sockets may be warned of


def test_programs_look_and_read(client, photo):
    from gradio_client import handle_file

    named = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/look", "/pixel", "/models", "/folder", "/select", "/evaluate", "/calibrate"} == set(named)
    found = client.predict(handle_file(photo), "street", "none", 20, True, api_name="/look")
    result = seguncert.analyse(seguncert.load_model("street"), photo)
    assert (found["width"], found["height"]) == (160, 120)
    assert found["means"] == {name: pytest.approx(map_HW.mean(), abs=1e-5) for name, map_HW in result.maps.items()}
    told = client.predict(found["token"], 7, 9, api_name="/pixel")
    assert told["classes"][0]["probability"] == pytest.approx(result.probabilities[:, 9, 7].max(), abs=1e-5)
    assert client.predict(api_name="/models")[0]["name"] == "street"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("street", "none", 20, True), None),
        (("nosuch", "none", 20, True), "nosuch"),
        (("../../etc", "none", 20, True), "etc"),
        (("street", "magic", 20, True), "magic"),
        (("street", "mc-dropout", 10**9, True), "1000000000|maximum|samples"),
    ],
)
def test_wrong_calls_are_one_line(client, photo, arguments, words):
    from gradio_client import handle_file

    if words is None:
        for place in ((-1, 0), (160, 0), (0, 10**12)):
            token = client.predict(handle_file(photo), *arguments, api_name="/look")["token"]
            with pytest.raises(Exception, match="expected x in 0 to 159"):
                client.predict(token, *place, api_name="/pixel")
        with pytest.raises(Exception, match="no longer remembered"):
            client.predict("guess", 0, 0, api_name="/pixel")
        return
    with pytest.raises(Exception, match=words) as error:
        client.predict(handle_file(photo), *arguments, api_name="/look")
    assert "Traceback" not in str(error.value)


# --- attackers


def run(address, name, data, session="attacker"):
    """A call by plain HTTP, as gradio's queue takes it; what the server says at the end."""
    config = httpx.get(f"{address}config").json()
    number = next(each["id"] for each in config["dependencies"] if each["api_name"] == name or each["id"] == name)
    joined = httpx.post(
        f"{address}gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": session}, timeout=60
    )
    if joined.status_code != 200:
        return joined.text
    with httpx.stream("GET", f"{address}gradio_api/queue/data", params={"session_hash": session}, timeout=60) as stream:
        for line in stream.iter_lines():
            if "process_completed" in line:
                return line
    raise AssertionError


FILE = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png",
     "http://169.254.169.254/latest/meta-data", "https://example.com/x.png", "\\\\host\\share\\x.png"],
)  # fmt: skip
@pytest.mark.parametrize("call", ["look", "folder"])
def test_only_what_was_uploaded_is_read(served, path, call):
    address, log = served
    file = FILE | {"path": path}
    answer = run(
        address, call, [file if call == "look" else [file], "street", "none", 20, True], f"a{hash((path, call))}"
    )
    assert '"success": false' in answer.replace('":false', '": false') and "root:" not in answer
    assert not log.read_text()


def test_a_data_url_is_refused(served):
    answer = run(
        served[0],
        "look",
        [FILE | {"path": None, "url": "data:image/png;base64,AAAA"}, "street", "none", 20, True],
        "data",
    )
    assert "expected an uploaded file" in answer


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", os.path.abspath(seguncert.__file__), "/proc/self/environ"]
)
def test_files_of_the_machine_are_not_served(served, path):
    for route in ("gradio_api/file=", "file="):
        answer = httpx.get(f"{served[0]}{route}{path}")
        assert answer.status_code in (403, 404) and "root:" not in answer.text


def test_too_much_is_refused(served, tmp_path):
    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(500):
            yield bytes(1 << 20)
        yield b"\r\n--x--\r\n"

    try:
        answer = httpx.post(
            f"{served[0]}gradio_api/upload",
            content=endless(),
            headers={"Content-Type": "multipart/form-data; boundary=x"},
            timeout=120,
        )
        assert answer.status_code == 413 and len(answer.text) < 300
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # the server hung up in the middle, which is a refusal too
    assert httpx.get(served[0]).status_code == 200


def uploaded(address, name, content):
    return httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)}, timeout=60).json()[0]


def test_a_bomb_is_refused_before_it_is_unpacked(served):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )
    path = uploaded(served[0], "bomb.png", bomb)
    answer = run(served[0], "look", [FILE | {"path": path}, "street", "none", 20, True], "bomb")
    assert "expected at most 50" in answer and "10000000000" in answer


@pytest.mark.parametrize("data", [None, {}, {"token": 7, "x": "a"}, {"token": "t", "x": {}, "y": []}, "x", [1, 2]])
def test_private_functions_by_plain_http(served, data):
    address, _ = served
    config = httpx.get(f"{address}config").json()
    viewer = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == "viewer")
    answer = httpx.post(
        f"{address}gradio_api/component_server",
        json={"data": data, "component_id": viewer, "fn_name": "pixel", "session_hash": "x"},
    )
    assert answer.status_code == 200 and set(answer.json()) == {"error"} and "\n" not in answer.json()["error"]
    for name in ("__init__", "postprocess", "nosuch"):
        answer = httpx.post(
            f"{address}gradio_api/component_server",
            json={"data": [], "component_id": viewer, "fn_name": name, "session_hash": "x"},
        )
        assert answer.status_code == 404


def test_private_events_take_no_wrong_data(served):
    config = httpx.get(f"{served[0]}config").json()
    private = [each for each in config["dependencies"] if each["api_visibility"] == "private" and each["inputs"]]
    assert len(private) > 4
    for each in private:
        answer = run(served[0], each["id"], [{"path": "/etc/passwd"}] * len(each["inputs"]), f"p{each['id']}")
        assert "root:" not in answer and "site-packages" not in answer
        assert '"success":false' in answer.replace(" ", "") or each["targets"][0][1] in ("change", "select"), answer


def test_a_folder_is_no_upload(served):
    """It would be deleted as one, and all cleaning would end with that."""
    path = uploaded(served[0], "a.png", b"x")
    answer = run(served[0], "folder", [[FILE | {"path": str(Path(path).parent)}], "street", "none", 20, True], "dir")
    assert '"success":false' in answer.replace(" ", "") and httpx.get(served[0]).status_code == 200


@pytest.mark.parametrize("place", [(1e999, 0), ("x", 0), (None, 0)])
def test_places_that_are_none(served, place):
    assert '"success":false' in run(served[0], "pixel", ["token", *map(str, place)], f"n{place}").replace(" ", "")


def test_nothing_left_the_machine(served):
    """Last: of all that this file asked of the server."""
    assert served[1].read_text() == ""


@pytest.mark.parametrize("options", [["--host", "0.0.0.0"], ["--auth", "nobody"], ["--auth", ":x"]])
def test_more_than_this_machine_needs_a_password(options):
    code, _, told = call("app", *options)
    assert code == 2 and len(told.strip().splitlines()) == 1 and "auth" in told


def test_with_a_password_nothing_is_shown_without(tmp_path):
    with page(tmp_path / "log", "--auth", "ann:secret word") as (address, _):
        assert "detail" in httpx.get(f"{address}config").json()
        assert httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
        body = {"data": {}, "component_id": 1, "fn_name": "pixel", "session_hash": "x"}
        assert httpx.post(f"{address}gradio_api/component_server", json=body).status_code == 401
        with httpx.Client() as entered:
            assert (
                entered.post(f"{address}login", data={"username": "ann", "password": "secret word"}).status_code == 200
            )
            assert "components" in entered.get(f"{address}config").json()
