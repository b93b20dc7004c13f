"""Pictures of the page, made by a real browser: every tab and the drawer, light, dark and on a phone.

    python -m seguncert.apps.screens OUT [PHOTO]

needs Chromium (apt-get install chromium) and playwright. The two in README.md, page-light.jpg and page-phone.jpg,
are of a drawn picture of nuclei.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from seguncert.apps.app import launch
from seguncert.apps.samples import write_samples

WIDE, PHONE = {"width": 1280, "height": 1080}, {"width": 390, "height": 844}


def shoot(out: Path, photo: Path | None = None) -> list[Path]:
    """Write a JPEG of each tab in each look; their paths."""
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    name = "street" if photo else "nuclei"
    samples = write_samples(out / "pictures")[name]
    photo = photo or samples / "drawn-out-of-focus.png"
    several = [str(photo), *(str(file) for file in sorted(samples.iterdir()) if file.name != photo.name)]
    blocks, address = launch([name], port=None, wait=False)
    made = []
    with sync_playwright() as playwright:
        browser: Any = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        for look, size, scheme in (("light", WIDE, "light"), ("dark", WIDE, "dark"), ("phone", PHONE, "light")):
            tab = browser.new_context(
                viewport=size, color_scheme=scheme, device_scale_factor=2 if size is PHONE else 1
            ).new_page()
            tab.goto(f"{address}?__theme={scheme}")
            tab.set_input_files("#photo input[type=file]", str(photo))
            tab.wait_for_selector(".sg[data-state=ready]", timeout=120_000)
            _read_a_doubtful_pixel(tab)
            made.append(_picture(tab, out / f"page-{look}.jpg"))
            tab.get_by_role("tab", name="Folder").click()
            tab.set_input_files("#files input[type=file]", several)
            tab.locator("#files td.filename").nth(len(several) - 1).wait_for()
            tab.click("#folder-run")
            tab.wait_for_selector(".gal[data-state=ready]", timeout=120_000)
            made.append(_picture(tab, out / f"folder-{look}.jpg"))
            tab.get_by_role("tab", name="Select").click()
            tab.fill("#select-budget input", "2")
            tab.click("#select-run")
            tab.frame_locator("#select-shown iframe").get_by_role("heading", level=1).wait_for(timeout=120_000)
            made.append(_picture(tab, out / f"select-{look}.jpg"))
            tab.get_by_role("tab", name="Calibration").click()
            tab.get_by_text("What do these maps mean").click()
            made.append(_picture(tab, out / f"calibration-{look}.jpg"))
        browser.close()
    blocks.close()
    return made


def _read_a_doubtful_pixel(tab: Any) -> None:
    """Click the middle of the region that is trusted least."""
    tab.locator(".sg-regions tbody tr").first.click()
    box = tab.locator(".sg-stage").first
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    tab.mouse.click(place["x"] + place["width"] * 0.42, place["y"] + place["height"] * 0.56)
    tab.wait_for_function("document.querySelector('.sg').dataset.read")
    tab.evaluate("scrollTo(0, 0)")


def _picture(tab: Any, file: Path) -> Path:
    tab.wait_for_timeout(500)
    tab.screenshot(path=file, type="jpeg", quality=82, full_page=True)
    return file


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    for file in shoot(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None):
        print(file)
