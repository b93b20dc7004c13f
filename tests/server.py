"""A page in a process of its own, which writes down every address outside of this machine that it tries to reach."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request

START = """
import sys, ipaddress

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else args[0]
        try:
            inside = not isinstance(host, str) or host in ("localhost", "") or ipaddress.ip_address(host).is_loopback or host == "0.0.0.0"
        except ValueError:
            inside = False
        if not inside:
            with open(sys.argv[1], "a") as log:
                log.write(f"{event} {args[1:] if event == 'socket.connect' else args[:2]}\\n")

sys.addaudithook(watch)
from seguncert.cli import main
sys.argv = ["seguncert", *sys.argv[2:]]
main()
"""


@contextlib.contextmanager
def page(log, *options, seconds=120):
    """Its address, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.touch()
    said = log.with_suffix(".said")
    with said.open("w") as out:
        command = [sys.executable, "-c", START, str(log), "app", "--port", str(port), *options]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the page did not start: {said.read_text()}") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.terminate()
        process.wait(20)
