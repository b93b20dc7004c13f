"""How long from a photo to its overlay in a browser, and what many visitors at once do to the page.

    python tests/benchmarks/page.py PHOTO [--rounds 9] [--clients 30] [--minutes 2]

PHOTO is of the size to be timed, as one of CamVid's 480x360. The page runs in a process of its own with the model street; times are
medians from choosing the file to the drawn overlay, in Chromium, beside a bare forward pass of the net in this process, in turn.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from server import page

import seguncert
from seguncert.model import evaluating, net_logits
from seguncert.predict import at_scale, net_input
from seguncert.render import thumbnail

DRAWN = """before => { const page = document.querySelector('.sg');
    return page.dataset.state === 'ready' && page.dataset.token !== before && page.dataset.drawn }"""


def overlays(address, photo, rounds, model):
    """Seconds from the file to its overlay, and of a forward pass, in turn."""
    import shutil

    from playwright.sync_api import sync_playwright

    waits, passes = [], []
    value = net_input(model, at_scale(model, seguncert.read_image(photo).rgb))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.goto(address)
        tab.wait_for_selector("#photo input[type=file]", state="attached")
        for number in range(rounds + 2):
            before = tab.get_attribute(".sg", "data-token")
            started = time.perf_counter()
            tab.set_input_files("#photo input[type=file]", str(photo))
            tab.wait_for_function(DRAWN, arg=before, timeout=120_000)
            took = time.perf_counter() - started
            tab.click("#photo button[aria-label='Remove Image'], #photo button[aria-label='Clear']")
            tab.wait_for_selector("#photo input[type=file]", state="attached")
            started = time.perf_counter()
            with torch.inference_mode(), evaluating(model.module):
                net_logits(model, value)
            if number > 1:
                waits.append(took)
                passes.append(time.perf_counter() - started)
        browser.close()
    return waits, passes


def resident(process):
    """MiB."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def crowd(address, photos, seconds, clients):
    """What each of many clients got until the time was over: right, busy, wrong, other errors."""
    from gradio_client import Client, handle_file

    model = seguncert.load_model("street")
    truth = [seguncert.analyse(model, photo).probabilities[:, 7, 9] for photo in photos]
    counts, lock, until = Counter(), threading.Lock(), time.monotonic() + seconds

    def visit(number):
        client = Client(address, verbose=False, analytics_enabled=False)
        while time.monotonic() < until:
            k = (number + 1) % len(photos)
            number += 1
            try:
                found = client.predict(handle_file(photos[k]), "street", "none", 20, True, api_name="/look")
                told = client.predict(found["token"], 9, 7, api_name="/pixel")
                p = {each["index"]: each["probability"] for each in told["classes"]}
                kind = "right" if np.abs([p[c] - truth[k][c] for c in range(len(p))]).max() < 1e-4 else "WRONG"
            except Exception as error:
                kind = (
                    "busy"
                    if "queue is full" in str(error).lower() or "busy" in str(error).lower()
                    else f"ERROR {error}"[:200]
                )
                if kind == "busy":
                    time.sleep(0.5)
            with lock:
                counts[kind] += 1
        client.close()

    threads = [threading.Thread(target=visit, args=[number]) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=2)
    chosen = parser.parse_args()
    model = seguncert.load_model("street")
    with tempfile.TemporaryDirectory() as place:
        rgb = seguncert.read_image(chosen.photo).rgb
        large = Path(place) / "large.jpg"
        cv2.imwrite(str(large), cv2.resize(rgb, (4000, 3000), interpolation=cv2.INTER_CUBIC)[..., ::-1])
        with page(Path(place) / "outside.log") as (address, _):
            for photo, rounds in ((chosen.photo, chosen.rounds), (large, max(3, chosen.rounds // 3))):
                waits, passes = overlays(address, photo, rounds, model)
                H, W = seguncert.read_image(photo).rgb.shape[:2]
                print(
                    f"{W}x{H}: overlay after {statistics.median(waits):.2f} s (longest {max(waits):.2f});"
                    f" bare forward pass {statistics.median(passes):.2f} s; {rounds} rounds",
                    flush=True,
                )
        if not chosen.clients:
            return
        photos = []
        for k in range(5):
            photos.append(Path(place) / f"{k}.png")
            cv2.imwrite(str(photos[-1]), np.roll(thumbnail(rgb, 480), 31 * k, 1)[..., ::-1])
        with page(Path(place) / "outside.log") as (address, process):
            crowd(address, photos, 10, chosen.clients)
            time.sleep(40)  # sessions end when a heartbeat is missed
            before = resident(process)
            counts = crowd(address, photos, 60 * chosen.minutes, chosen.clients)
            time.sleep(40)  # sessions end when a heartbeat is missed
            after = resident(process)
            print(f"{chosen.clients} clients for {chosen.minutes:g} minutes: {dict(counts)};"
                  f" memory {before:.0f} MiB before, {after:.0f} after ({100 * (after / before - 1):+.0f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
